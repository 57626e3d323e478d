"""Picks a kernel by stated reasons: the first row that fits answers, and every other can say why it did not."""

from __future__ import annotations

import importlib
import os
import types
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from svp.errors import SvpError, unknown
from svp.ops.gpu import interpreted

ENV = "SVP_KERNEL"  # overrides "auto"
# by target (a slash for each dot), once loaded. torch.compile cannot follow an import, and takes a table as it was when
# first met; of a module it reads what is there now.
FUNCTIONS = types.ModuleType("svp.ops.dispatch.FUNCTIONS")


class Kernel(NamedTuple):
    """One way to compute an op. target: "module:function"; device None: any; dtypes (): any."""

    name: str
    target: str
    device: str | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    max_state: int | None = None
    complex_A: bool = False
    constant_BC: bool = False

    def runs_on(self, device: str) -> bool:
        """Whether such tensors are this kernel's: those of its own device; Triton's interpreter takes those of the CPU."""
        return self.device in (None, device) or (self.name == "triton" and device == "cpu" and _interpreted())

    def unfit(self, u: Tensor, A: Tensor | None = None, constant_BC: bool = False) -> str | None:
        """Why this kernel cannot take tensors like these, or None. A: what has the states on its last axis, if anything."""
        if not self.runs_on(u.device.type):
            return f"it needs {self.device}, the tensors are on {u.device.type}"
        if A is not None and A.is_complex() and not self.complex_A:
            return "A is complex"
        if constant_BC and not self.constant_BC:
            return "B or C is constant"
        if self.dtypes and u.dtype not in self.dtypes:
            return f"the dtype is {_short(u.dtype)}, it takes {', '.join(map(_short, self.dtypes))}"
        if self.dtypes and A is not None and A.dtype == torch.float64 and torch.float64 not in self.dtypes:
            return "A is float64"
        if A is not None and self.max_state is not None and A.shape[-1] > self.max_state:
            return f"there are {A.shape[-1]} states, it takes at most {self.max_state}"
        if self.dtypes and transformed():
            return "torch.func or forward-mode derivatives look inside, which a compiled kernel does not let them"
        return missing(self.target)

    def function(self) -> Callable:
        """What a kernel without a reason against it is called by."""
        return getattr(FUNCTIONS, self.target.replace(".", "/"))


class Row(NamedTuple):
    """A kernel as `svp doctor` shows it: reason is None for those that fit."""

    name: str
    chosen: bool
    reason: str | None


def pick(
    kernels: Sequence[Kernel], wanted: str, u: Tensor, A: Tensor | None = None, constant_BC: bool = False
) -> Callable:
    """The function of the named kernel, or with "auto" of the first that fits; raises SvpError with the reasons.

    "auto" may fall back, a named kernel never does.
    """
    wanted = environment() if wanted == "auto" else wanted
    rows = kernels if wanted == "auto" else [row for row in kernels if row.name == wanted]
    if not rows:
        raise unknown("kernel", wanted, [row.name for row in kernels], "svp doctor")
    reasons = []
    for row in rows:
        reason = row.unfit(u, A, constant_BC)
        if reason is None:
            return row.function()
        reasons.append(f"{row.name}: {reason}")
    raise SvpError(f"no kernel can answer ({'; '.join(reasons)})", "--kernel auto; `svp doctor` shows all", kind="env")


def table(op: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Row]:
    """Every kernel of "selective_scan" or "causal_conv1d": which one would answer for such tensors, why not the others."""
    kernels = importlib.import_module(f"svp.ops.{op}").KERNELS
    reasons = []
    for row in kernels:
        wrong_device = not row.runs_on(device)  # said without making a tensor there
        u = torch.empty(1, 1, 1, dtype=dtype)
        fits_here = row._replace(device=None)
        reasons.append(f"it needs {row.device}, the tensors are on {device}" if wrong_device else fits_here.unfit(u))
    wanted = environment()
    chosen = next(
        (row.name for row, why in zip(kernels, reasons, strict=True) if why is None and wanted in ("auto", row.name)),
        None,
    )
    return [Row(row.name, row.name == chosen, reason) for row, reason in zip(kernels, reasons, strict=True)]


def transformed() -> bool:
    """Whether vmap, torch.func or forward-mode derivatives are at work: of a compiled kernel they would see nothing."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def constant(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result, which would load the compiler (2 s) to set this one attribute."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def environment() -> str:
    """The kernel that the environment variable SVP_KERNEL names, or "auto"."""
    return os.environ.get(ENV, "auto")


@constant
def _interpreted() -> bool:
    return interpreted()


@constant
def missing(target: str) -> str | None:
    """What the kernel's module lacks on this machine, or None. Loads it: afterwards FUNCTIONS knows the target."""
    path, _, name = target.partition(":")
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as err:  # a package that only this kernel needs
        if err.name is None or err.name.startswith("svp"):
            raise
        return f"{err.name} is not installed"
    setattr(FUNCTIONS, target.replace(".", "/"), getattr(module, name))
    return module.missing() if hasattr(module, "missing") else None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
