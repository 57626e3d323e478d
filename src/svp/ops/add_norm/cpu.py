"""Add and norm in C++ (csrc/add_norm.cpp), registered as `svp::add_norm_cpu`: one pass forward, one backward."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.library import Library, impl, register_autograd, register_fake

from svp.errors import SvpError
from svp.ops import native
from svp.ops.add_norm.reference import with_terms
from svp.ops.native import Call, Rows, fields, threads

TERMS = 2  # kernels.h: TERMS, of one call; there may be more, which are then added before
INPUTS = (
    "Tensor x, Tensor? residual, Tensor? pre0, Tensor? scale0, Tensor? pre1, Tensor? scale1, Tensor weight, float eps, "
    "bool[2] silu, int[] skip"
)
LIB = Library("svp", "FRAGMENT")
LIB.define(f"add_norm_cpu({INPUTS}) -> (Tensor h, Tensor stream)")
LIB.define(
    "add_norm_cpu_backward(Tensor dh, Tensor? dstream, Tensor stream, Tensor? pre0, Tensor? scale0, Tensor? pre1, "
    "Tensor? scale1, Tensor weight, float eps, bool[2] silu, int[] skip, bool needs_weight) -> "
    "(Tensor ds, Tensor dpre0, Tensor dscale0, Tensor dpre1, Tensor dscale1, Tensor dweight)"
)


def missing() -> str | None:
    return None if native.available else native.reason


def add_norm(x, residual, weight, eps, terms, skip) -> tuple[Tensor, Tensor]:
    """As the reference, in float32. Other activations than SiLU, and the third summand and on, are added first."""
    able = [i for i, term in enumerate(terms) if term.act in ("none", "silu")][:TERMS]
    ready = [terms[i] for i in able]
    x = with_terms(x, tuple(term for i, term in enumerate(terms) if i not in able), skip)
    flat: list[Tensor | None] = []
    for pre, scale, _ in ready:
        flat += [pre.float(), pre.new_ones(1, dtype=torch.float32) if scale is None else scale.float()]
    flat += [None] * (2 * TERMS - len(flat))
    silu = [term.act == "silu" for term in ready] + [False] * (TERMS - len(ready))
    residual = None if residual is None else residual.float()
    h, stream = torch.ops.svp.add_norm_cpu(x, residual, *flat, weight.float(), eps, silu, list(skip))
    return h.to(weight.dtype), stream


@register_fake("svp::add_norm_cpu", lib=LIB)
def _(x, residual, pre0, scale0, pre1, scale1, weight, eps, silu, skip):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@register_fake("svp::add_norm_cpu_backward", lib=LIB)
def _(dh, dstream, stream, pre0, scale0, pre1, scale1, weight, eps, silu, skip, needs_weight):
    return (
        stream.new_empty(stream.shape), *(stream.new_empty((0,) if t is None else t.shape) for t in (pre0, scale0, pre1, scale1)),
        weight.new_empty(weight.shape if needs_weight else (0,)),
    )  # fmt: skip


@impl(LIB, "add_norm_cpu", "CPU")
def _forward(x, residual, pre0, scale0, pre1, scale1, weight, eps, silu, skip):
    h, stream = x.new_empty(x.shape), x.new_empty(x.shape)
    call = _call(x, pre0, scale0, pre1, scale1, weight, eps, silu, skip)
    call.put(x=x, residual=residual, h=h, stream=stream)
    call.run("svp_add_norm_forward")
    return h, stream


@impl(LIB, "add_norm_cpu_backward", "CPU")
def _backward(dh, dstream, stream, pre0, scale0, pre1, scale1, weight, eps, silu, skip, needs_weight):
    b, l, d = stream.shape
    ds = stream.new_empty(stream.shape)
    pieces = b * ((l + ROWS - 1) // ROWS)  # each leaves its part of the sums over tokens
    dpre = [None if t is None else t.new_empty(t.shape) for t in (pre0, pre1)]
    dscale = [None if t is None else t.new_empty(pieces, d) for t in (scale0, scale1)]
    dweight = stream.new_empty(pieces, d) if needs_weight else None
    call = _call(stream, pre0, scale0, pre1, scale1, weight, eps, silu, skip)
    call.put(x=stream, dh=dh, dstream=dstream, ds=ds, dpre0=dpre[0], dpre1=dpre[1])
    call.put(dscale0=dscale[0], dscale1=dscale[1], dweight=dweight)
    call.run("svp_add_norm_backward")

    def summed(parts: Tensor | None, like: Tensor | None) -> Tensor:
        if parts is None or like is None:
            return stream.new_empty(0)
        return parts.sum(0) if like.shape[0] == d and d > 1 else parts.sum().reshape(1)

    nothing = stream.new_empty(0)
    return (
        ds, nothing if dpre[0] is None else dpre[0], summed(dscale[0], scale0), nothing.clone() if dpre[1] is None else dpre[1],
        summed(dscale[1], scale1), summed(dweight, weight),
    )  # fmt: skip


ROWS = 16  # kernels.h: ROWS, tokens of a task


class _AddNorm(ctypes.Structure):  # kernels.h: AddNorm
    _fields_ = fields(
        (Rows, "x residual pre0 pre1 dh dstream"), (ctypes.c_void_p, "scale0 scale1 weight skip h stream ds dpre0 dpre1"),
        (ctypes.c_void_p, "dscale0 dscale1 dweight"), (ctypes.c_int64, "batch length width skips"),
        (ctypes.c_float, "eps"), (ctypes.c_int, "step0 step1 silu0 silu1 threads"),
    )  # fmt: skip


def _call(x, pre0, scale0, pre1, scale1, weight, eps, silu, skip) -> Call:
    b, l, d = x.shape
    steps = [int(t is not None and len(t) > 1) for t in (scale0, scale1)]  # 0: one scale for all channels
    call = Call(
        _AddNorm(
            batch=b, length=l, width=d, skips=len(skip), eps=eps, step0=steps[0], step1=steps[1], silu0=silu[0],
            silu1=silu[1], threads=threads(x),
        )
    )  # fmt: skip
    call.put(pre0=pre0, pre1=pre1, scale0=scale0, scale1=scale1, weight=weight)
    call.put(skip=torch.tensor(skip, dtype=torch.int64) if skip else None)
    return call


def _keep(ctx, inputs, output):
    _, residual, pre0, scale0, pre1, scale1, weight, *ctx.flags = inputs
    ctx.save_for_backward(output[1], pre0, scale0, pre1, scale1, weight)
    ctx.has_residual = residual is not None
    ctx.set_materialize_grads(False)


def _derivative(ctx, dh, dstream):
    stream, pre0, scale0, pre1, scale1, weight = ctx.saved_tensors
    asked = ctx.needs_input_grad
    if dh is None:
        dh = torch.zeros_like(stream)
    ds, dpre0, dscale0, dpre1, dscale1, dweight = torch.ops.svp.add_norm_cpu_backward(
        dh, dstream, stream, pre0, scale0, pre1, scale1, weight, *ctx.flags, asked[6]
    )
    grads = [ds, ds if ctx.has_residual else None, dpre0, dscale0, dpre1, dscale1, dweight]
    return *(grad if wanted else None for grad, wanted in zip(grads, asked, strict=False)), None, None, None


def _no_second(ctx, *grads):
    raise SvpError("second derivatives of add_norm are not offered by the C++ kernel", 'kernel="reference" has them')


register_autograd("svp::add_norm_cpu", _derivative, setup_context=_keep, lib=LIB)
register_autograd("svp::add_norm_cpu_backward", _no_second, lib=LIB)
