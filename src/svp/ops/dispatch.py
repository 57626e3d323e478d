"""Picks a kernel by stated reasons: the first row that fits answers, and every other can say why it did not."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from svp.errors import SvpError, unknown

ENV = "SVP_KERNEL"  # overrides "auto"


class Kernel(NamedTuple):
    """One way to compute an op. target: "module:function"; device None: any; dtypes (): any."""

    name: str
    target: str
    device: str | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    max_state: int | None = None
    complex_A: bool = False

    def unfit(self, u: Tensor, A: Tensor | None = None) -> str | None:
        """Why this kernel cannot take tensors like these, or None. A: what has the states on its last axis, if anything."""
        if self.device not in (None, u.device.type):
            return f"it needs {self.device}, the tensors are on {u.device.type}"
        if A is not None and A.is_complex() and not self.complex_A:
            return "A is complex"
        if self.dtypes and u.dtype not in self.dtypes:
            return f"the dtype is {_short(u.dtype)}, it takes {', '.join(map(_short, self.dtypes))}"
        if A is not None and self.max_state is not None and A.shape[-1] > self.max_state:
            return f"there are {A.shape[-1]} states, it takes at most {self.max_state}"
        return missing(self.target)

    def function(self) -> Callable:
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)


class Row(NamedTuple):
    """A kernel as `svp doctor` shows it: reason is None for those that fit."""

    name: str
    chosen: bool
    reason: str | None


def pick(kernels: Sequence[Kernel], wanted: str, u: Tensor, A: Tensor | None = None) -> Callable:
    """The function of the named kernel, or with "auto" of the first that fits; raises SvpError with the reasons.

    "auto" may fall back, a named kernel never does.
    """
    wanted = environment() if wanted == "auto" else wanted
    rows = kernels if wanted == "auto" else [row for row in kernels if row.name == wanted]
    if not rows:
        raise unknown("kernel", wanted, [row.name for row in kernels], "svp doctor")
    reasons = []
    for row in rows:
        reason = row.unfit(u, A)
        if reason is None:
            return row.function()
        reasons.append(f"{row.name}: {reason}")
    raise SvpError(f"no kernel can answer ({'; '.join(reasons)})", "--kernel auto; `svp doctor` shows all", kind="env")


def table(kernels: Sequence[Kernel], u: Tensor, A: Tensor | None = None) -> list[Row]:
    """Every kernel, which one "auto" chooses for tensors like these, and why not the others."""
    reasons = [row.unfit(u, A) for row in kernels]
    first = next((row.name for row, reason in zip(kernels, reasons, strict=True) if reason is None), None)
    return [Row(row.name, row.name == first, reason) for row, reason in zip(kernels, reasons, strict=True)]


@torch.compiler.assume_constant_result
def environment() -> str:
    """The kernel that the environment variable SVP_KERNEL names, or "auto"."""
    return os.environ.get(ENV, "auto")


@torch.compiler.assume_constant_result
def missing(target: str) -> str | None:
    """What the kernel's module lacks on this machine, or None."""
    module = importlib.import_module(target.partition(":")[0])
    return module.missing() if hasattr(module, "missing") else None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
