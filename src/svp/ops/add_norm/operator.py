"""Add and norm as an operator of torch.library: shapes and derivative, the same for every compiled kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from svp.errors import SvpError
from svp.ops.add_norm.reference import with_terms

TERMS = 2  # of one call; there may be more, which are then added before
INPUTS = (
    "Tensor x, Tensor? residual, Tensor? pre0, Tensor? scale0, Tensor? pre1, Tensor? scale1, Tensor weight, float eps, "
    "bool[2] silu, int[] skip"
)


def declare(name: str) -> Library:
    """Defines svp::NAME and svp::NAME_backward, for which a kernel then brings the implementations.

    h, stream and ds are float32, other gradients have the dtype of their input; those that are not wanted are empty.
    """
    lib = Library("svp", "FRAGMENT")
    lib.define(f"{name}({INPUTS}) -> (Tensor h, Tensor stream)")
    lib.define(
        f"{name}_backward(Tensor dh, Tensor? dstream, Tensor stream, Tensor? pre0, Tensor? scale0, Tensor? pre1, "
        "Tensor? scale1, Tensor weight, float eps, bool[2] silu, int[] skip, bool needs_weight) -> "
        "(Tensor ds, Tensor dpre0, Tensor dscale0, Tensor dpre1, Tensor dscale1, Tensor dweight)"
    )

    def derivative(ctx, dh, dstream):
        stream, pre0, scale0, pre1, scale1, weight = ctx.saved_tensors
        asked = ctx.needs_input_grad
        dh = torch.zeros_like(stream) if dh is None else dh
        ds, dpre0, dscale0, dpre1, dscale1, dweight = getattr(torch.ops.svp, f"{name}_backward")(
            dh, dstream, stream, pre0, scale0, pre1, scale1, weight, *ctx.flags, asked[6]
        )
        grads = [ds.to(ctx.dtype), ds if ctx.has_residual else None, dpre0, dscale0, dpre1, dscale1, dweight]
        return *(grad if wanted else None for grad, wanted in zip(grads, asked, strict=False)), None, None, None

    register_fake(f"svp::{name}", _fake, lib=lib)
    register_fake(f"svp::{name}_backward", _fake_backward, lib=lib)
    register_autograd(f"svp::{name}", derivative, setup_context=_keep, lib=lib)
    register_autograd(f"svp::{name}_backward", _no_second, lib=lib)
    return lib


def called(
    op: Callable, x, residual, weight, eps, terms, skip, dtypes: tuple[torch.dtype, ...]
) -> tuple[Tensor, Tensor]:
    """As the reference, in float32. Other activations than SiLU, and the third summand and on, are added first.

    dtypes: those of x and of the summands that the op reads as they are; others are widened.
    """
    able = [i for i, term in enumerate(terms) if term.act in ("none", "silu")][:TERMS]
    ready = [terms[i] for i in able]
    x = with_terms(x, tuple(term for i, term in enumerate(terms) if i not in able), skip)
    flat: list[Tensor | None] = []
    for pre, scale, _ in ready:
        flat += [
            pre if pre.dtype in dtypes else pre.float(),
            pre.new_ones(1, dtype=torch.float32) if scale is None else scale.float(),
        ]
    flat += [None] * (2 * TERMS - len(flat))
    silu = [term.act == "silu" for term in ready] + [False] * (TERMS - len(ready))
    residual = None if residual is None else residual.float()
    h, stream = op(x, residual, *flat, weight.float(), eps, silu, list(skip))
    return h.to(weight.dtype), stream


def outputs(ds, dpre, dscale, dweight, scales, weight) -> tuple[Tensor, ...]:
    """Those of NAME_backward: dpre as they are, of dscale and dweight the sums of each program's share; None: nothing."""

    def whole(t: Tensor | None) -> Tensor:
        return ds.new_empty(0) if t is None else t

    def summed(parts: Tensor | None, like: Tensor | None) -> Tensor:  # (parts, d) -> (d,), or (1,) where that is all
        if parts is None or like is None:
            return ds.new_empty(0)
        return parts.sum(0) if like.shape[0] == parts.shape[1] else parts.sum().reshape(1)

    by_term = (
        t for pre, share, scale in zip(dpre, dscale, scales, strict=True) for t in (whole(pre), summed(share, scale))
    )
    return ds, *by_term, summed(dweight, weight)


def _fake(x, residual, pre0, scale0, pre1, scale1, weight, eps, silu, skip):
    h, stream = (x.new_empty(x.shape, dtype=torch.float32) for _ in range(2))
    return h, stream


def _fake_backward(dh, dstream, stream, pre0, scale0, pre1, scale1, weight, eps, silu, skip, needs_weight):
    return (
        stream.new_empty(stream.shape),
        *(stream.new_empty(0) if t is None else t.new_empty(t.shape) for t in (pre0, scale0, pre1, scale1)),
        weight.new_empty(weight.shape if needs_weight else (0,)),
    )


def _keep(ctx, inputs, output):
    x, residual, pre0, scale0, pre1, scale1, weight, *ctx.flags = inputs
    ctx.save_for_backward(output[1], pre0, scale0, pre1, scale1, weight)
    ctx.has_residual, ctx.dtype = residual is not None, x.dtype
    ctx.set_materialize_grads(False)


def _no_second(ctx, *grads):
    raise SvpError("second derivatives of add_norm are not offered by this kernel", 'kernel="reference" has them')
