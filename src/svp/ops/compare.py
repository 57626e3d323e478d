"""A kernel beside the reference on this machine: its largest error against float64, and the time of both."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from svp.ops.causal_conv1d import causal_conv1d
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
    """Outputs and all gradients of "selective_scan" or "causal_conv1d" in float32, against the reference in float64."""
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


def _normal(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


OPS = {"selective_scan": (_scan, _scan_inputs), "causal_conv1d": (_conv, _conv_inputs)}
