"""What happens between two blocks, as one op: prompts and the running sum are added, the result is normed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from svp.errors import SvpError
from svp.ops.dispatch import Kernel, environment, pick


class Term(NamedTuple):
    """scale * act(pre), one summand. pre (b, l, d); scale (d,), (1,) or None for 1; act: "none", "silu", "gelu", "relu"."""

    pre: Tensor
    scale: Tensor | None = None
    act: str = "none"


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = (
    Kernel("cpu", "svp.ops.add_norm.cpu:add_norm", "cpu", DTYPES),
    Kernel("triton", "svp.ops.add_norm.triton:add_norm", "cuda", DTYPES),
    Kernel("reference", "svp.ops.add_norm.reference:add_norm"),
)


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    terms: tuple[Term, ...] = (),
    skip: tuple[int, ...] = (),
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add what enters the stream, and norm the stream.

        stream = x + residual + sum_j scale_j act_j(pre_j),   h = stream / sqrt(mean(stream²) + eps) * weight

    x, residual  (b, l, d)   residual None: zero
    weight       (d,)
    terms        summands, left out for the tokens at the positions `skip`
    returns      h (b, l, d) in the dtype of weight, stream (b, l, d) in float32 or wider
    Raises SvpError for shapes that do not belong together and for a named kernel that cannot answer.
    Source: RMSNorm, arXiv 1910.07467 Eq. 4; residual order of arXiv 2401.09417's code.
    """
    shapes = [None if t is None else t.shape for t in (residual, *(term.pre for term in terms))]
    if x.dim() != 3 or weight.shape != x.shape[2:] or any(shape not in (None, x.shape) for shape in shapes):
        raise SvpError(
            f"x is {tuple(x.shape)}, weight {tuple(weight.shape)}, the summands {[s and tuple(s) for s in shapes]}; expected "
            "(b, l, d), (d,) and (b, l, d)"
        )
    d, length = x.shape[2], x.shape[1]
    for term in terms:
        if term.scale is not None and tuple(term.scale.shape) not in ((d,), (1,)):
            raise SvpError(f"a scale is {tuple(term.scale.shape)}, expected {(d,)} or (1,)")
    if any(not 0 <= position < length for position in skip) and length:
        raise SvpError(f"skip is {skip}, expected positions from 0 to {length - 1}")
    kernel = environment() if kernel == "auto" else kernel
    named = kernel if kernel in ("auto", "cpu", "triton") else "reference"
    return pick(KERNELS, named, x)(x, residual, weight, eps, terms, skip)
