"""A kernel beside the reference on this machine: its largest error against float64, and the time of both."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from svp.ops.add_norm import Term, add_norm
from svp.ops.causal_conv1d import causal_conv1d
from svp.ops.mixer import Direction, mixer
from svp.ops.selective_scan import selective_scan

SHAPE = (2, 197, 384, 16)  # (b, l, e, n): two pictures of 224 pixels in a block of vim_tiny
TAPS = 4
ENOUGH = 1e-4  # largest relative error of float32 that is rounding, not a mistake


class Comparison(NamedTuple):
    """error is relative to the largest entry of the tensor `worst`; seconds are of forward and backward."""

    op: str
    kernel: str
    error: float
    worst: str
    seconds: float
    reference_seconds: float

    @property
    def is_right(self) -> bool:
        return self.error <= ENOUGH  # False for nan, too


def compare(op: str, kernel: str, device: str = "cpu", shape: tuple[int, int, int, int] = SHAPE) -> Comparison:
    """Outputs and all gradients of an op of OPS in float32, against the reference in float64."""
    run, inputs = OPS[op]
    made = {name: t.to(device) for name, t in inputs(*shape).items()}
    want = _with_grads(run, made, torch.float64, "reference")
    got = _with_grads(run, made, torch.float32, kernel)
    errors = {name: _relative(got[name].double(), t) for name, t in want.items()}
    worst = max(errors, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name])
    seconds = min(_seconds(run, made, kernel) for _ in range(5))
    return Comparison(op, kernel, errors[worst], worst, seconds, _seconds(run, made, "reference"))


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def _with_grads(run: Callable, inputs: dict[str, Tensor], dtype: torch.dtype, kernel: str) -> dict[str, Tensor]:
    leaves = {name: t.detach().to(dtype, copy=True).requires_grad_() for name, t in inputs.items()}
    with torch.enable_grad():
        y = run(**leaves, kernel=kernel)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (y * weight.to(y)).sum().backward()
    return {"y": y.detach(), **{f"d{name}": t.grad for name, t in leaves.items() if t.grad is not None}}


def _seconds(run: Callable, inputs: dict[str, Tensor], kernel: str) -> float:
    leaves = {name: t.detach().to(torch.float32, copy=True).requires_grad_() for name, t in inputs.items()}
    wait = torch.cuda.synchronize if next(iter(leaves.values())).is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    with torch.enable_grad():
        run(**leaves, kernel=kernel).sum().backward()
    wait()
    return time.perf_counter() - start


def _scan(**inputs) -> Tensor:
    return selective_scan(**inputs, delta_softplus=True)  # type: ignore[return-value]


def _scan_inputs(b: int, l: int, e: int, n: int) -> dict[str, Tensor]:
    normal = _normal(0)
    return {
        "u": normal(b, l, e), "delta": normal(b, l, e) - 1, "A": -torch.exp(normal(e, n)), "B": normal(b, l, n),
        "C": normal(b, l, n), "D": normal(e), "z": normal(b, l, e), "delta_bias": 0.5 * normal(e),
    }  # fmt: skip


def _conv(**inputs) -> Tensor:
    return causal_conv1d(**inputs, activation="silu")


def _conv_inputs(b: int, l: int, e: int, n: int) -> dict[str, Tensor]:
    normal = _normal(0)
    return {"x": normal(b, l, e), "weight": normal(e, TAPS), "bias": normal(e)}


def _mixer(xz: Tensor, kernel: str, **tensors: Tensor) -> Tensor:
    pair = [Direction(*(tensors.get(f"{name}{k}") for name in Direction._fields)) for k in (0, 1)]  # type: ignore[arg-type]
    return mixer(xz, *pair, scale=0.5, kernel=kernel)


def _mixer_inputs(b: int, l: int, e: int, n: int) -> dict[str, Tensor]:
    normal, r = _normal(0), max(1, e // 32)
    made = {"xz": normal(b, l, 2 * e)}
    for k in (0, 1):
        made |= {
            f"conv{k}": normal(e, TAPS), f"conv_bias{k}": normal(e), f"x_proj{k}": e**-0.5 * normal(r + 2 * n, e),
            f"dt_proj{k}": r**-0.5 * normal(e, r), f"dt_bias{k}": normal(e) - 1, f"A{k}": -torch.exp(normal(e, n)),
            f"D{k}": normal(e),
        }  # fmt: skip
    return made


def _add_norm(x: Tensor, residual: Tensor, weight: Tensor, pre: Tensor, scale: Tensor, kernel: str) -> Tensor:
    h, stream = add_norm(x, residual, weight, 1e-5, terms=(Term(pre, scale, "silu"),), kernel=kernel)
    return h + 0.1 * stream


def _add_norm_inputs(b: int, l: int, e: int, n: int) -> dict[str, Tensor]:
    normal, d = _normal(0), e // 2
    return {
        "x": normal(b, l, d), "residual": normal(b, l, d), "weight": normal(d), "pre": normal(b, l, d), "scale": normal(d),
    }  # fmt: skip


def _normal(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


OPS: dict[str, tuple[Callable, Callable]] = {
    "selective_scan": (_scan, _scan_inputs), "causal_conv1d": (_conv, _conv_inputs), "mixer": (_mixer, _mixer_inputs),
    "add_norm": (_add_norm, _add_norm_inputs),
}  # fmt: skip
COMPOSED = {"cpu": ("mixer", "add_norm"), "triton": ("add_norm",)}  # by kernel; elsewhere they are made of other ops
