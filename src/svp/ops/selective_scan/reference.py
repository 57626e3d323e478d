"""The selective scan in plain PyTorch. This file defines the op; every kernel is tested against it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, h0: Tensor | None, offset: Tensor | None, bias: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Shapes as `selective_scan`, with B, C (b, l, g, n) or (e, n). -> y (b, l, e) and the last state (b, e, n)."""
    wide = torch.promote_types(torch.promote_types(A.real.dtype, u.dtype), torch.float32)
    x, delta = u.to(wide), delta.to(wide)  # the state is float32 or wider
    A = A if A.is_complex() else A.to(wide)
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)
    e, n = A.shape
    h = A.new_zeros(len(u), e, n) if h0 is None else h0.to(A.dtype).expand(len(u), e, n)
    # unbind: an index per step would make the backward write a tensor of full size per step
    each = (delta.unbind(1), (delta * x).unbind(1), per_token(B, u, e, n), per_token(C, u, e, n))
    steps = list(zip(*each, strict=True))
    y = []
    for d, du, b, c in reversed(steps) if reverse else steps:
        forget = torch.exp(d[:, :, None] * A)  # (b, e, n)
        h = forget * h + du[:, :, None] * b
        read = h if offset is None else h + offset  # what C sees
        y.append((read * c).sum(-1))  # (b, e)
    out = torch.stack(y[::-1] if reverse else y, dim=1) if y else torch.zeros_like(x)  # (b, l, e)
    out = 2 * out.real if out.is_complex() else out  # a conjugate pair is stored once
    out = out if D is None else out + D * x
    out = out if bias is None else out + bias
    out = out if z is None else out * F.silu(z.to(wide))  # the gate comes after the skip term
    return out.to(u.dtype), h.clone() if h0 is not None and not y else h


def per_token(B: Tensor, u: Tensor, e: int, n: int) -> tuple[Tensor, ...]:
    """(b, l, g, n) -> one (b, e | 1, n) a token; constant (e, n) -> the same tensor for every token."""
    if B.dim() == 2:
        return (B[None],) * u.shape[1]
    if B.shape[2] > 1:
        B = B.repeat_interleave(e // B.shape[2], dim=2)
    return B.unbind(1)
