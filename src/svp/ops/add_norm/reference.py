"""Add and norm in plain PyTorch. This file defines the op."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from svp.ops.precision import wide


def identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": identity, "silu": F.silu, "gelu": F.gelu, "relu": F.relu}


def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, terms: tuple, skip: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Shapes as `svp.ops.add_norm`."""
    x = with_terms(x, terms, skip)
    stream = x if residual is None else x + residual
    stream = wide(stream)
    return rms_norm(stream, weight, eps, weight.dtype), stream


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last axis, in float32 or wider, returned as dtype."""
    x = wide(x)
    return (F.rms_norm(x, x.shape[-1:], None, eps) * weight.to(x.dtype)).to(dtype)


def with_terms(x: Tensor, terms: tuple, skip: tuple[int, ...]) -> Tensor:
    """x + the sum of scale * act(pre), the tokens at `skip` as they are: (b, l, d) -> (b, l, d)."""
    for pre, scale, act in terms:
        p = ACTIVATIONS[act](pre)
        p = p if scale is None else scale * p
        x = x + (p.index_fill(1, torch.tensor(skip, device=p.device), 0.0) if skip else p).to(x.dtype)
    return x
