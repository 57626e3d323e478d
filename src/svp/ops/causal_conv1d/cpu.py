"""The convolution in C++ (csrc/causal_conv1d.cpp), registered as `svp::conv_cpu`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.library import Library, impl, register_autograd, register_fake

from svp.errors import SvpError
from svp.ops import native
from svp.ops.native import Call, Rows, fields, threads

INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? past, bool silu, bool reverse"
LIB = Library("svp", "FRAGMENT")
LIB.define(f"conv_cpu({INPUTS}) -> Tensor")
LIB.define(f"conv_cpu_backward(Tensor dy, {INPUTS}, bool[2] needs) -> (Tensor dx, Tensor dweight, Tensor dpast)")


def missing() -> str | None:
    return None if native.available else native.reason


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, past: Tensor | None, reverse: bool) -> Tensor:
    """As the reference."""
    wide = [None if t is None else t.to(torch.float32) for t in (x, weight, bias, past)]
    return torch.ops.svp.conv_cpu(*wide, silu, reverse).to(x.dtype)


@register_fake("svp::conv_cpu", lib=LIB)
def _(x, weight, bias, past, silu, reverse):
    return x.new_empty(x.shape)


@register_fake("svp::conv_cpu_backward", lib=LIB)
def _(dy, x, weight, bias, past, silu, reverse, needs):
    b, _, e = x.shape
    taps = weight.shape[1]
    dweight = x.new_empty((taps + 1, e) if needs[0] else (0,))
    return x.new_empty(x.shape), dweight, x.new_empty((b, e, taps - 1) if needs[1] else (0,))


@impl(LIB, "conv_cpu", "CPU")
def forward(x, weight, bias, past, silu, reverse):
    y = x.new_empty(x.shape)
    call = conv_call(x, weight, bias, past, silu, reverse)
    call.put(y=y)
    call.run("svp_conv_forward")
    return y


@impl(LIB, "conv_cpu_backward", "CPU")
def backward(dy, x, weight, bias, past, silu, reverse, needs):
    b, _, e = x.shape
    taps = weight.shape[1]
    dx = x.new_empty(x.shape)
    dweight = x.new_empty(b, taps + 1, e) if needs[0] else None  # each picture's share, the bias last
    dpast = x.new_zeros(b, taps - 1, e) if needs[1] else None
    call = conv_call(x, weight, bias, past, silu, reverse)
    call.put(dy=dy, y=dx, dweight=dweight, dpast=dpast)
    call.run("svp_conv_backward")
    return (
        dx, x.new_empty(0) if dweight is None else dweight.sum(0),
        x.new_empty(0) if dpast is None else dpast.transpose(1, 2).contiguous(),
    )  # fmt: skip


def _keep(ctx, inputs, output):
    x, weight, bias, past, silu, reverse = inputs
    ctx.save_for_backward(x, weight, bias, past)
    ctx.flags = silu, reverse


def _derivative(ctx, dy):
    x, weight, bias, past = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dx, dweight, dpast = torch.ops.svp.conv_cpu_backward(
        dy, x, weight, bias, past, *ctx.flags, [needs[1] or needs[2], needs[3]]
    )
    if needs[3] and past.shape[0] == 1:
        dpast = dpast.sum(0, keepdim=True)
    grads = dweight[:-1].T if needs[1] else None, dweight[-1].clone() if needs[2] else None
    return dx, *grads, dpast if needs[3] else None, None, None


def _no_second(ctx, *grads):
    raise SvpError(
        "second derivatives of the convolution are not offered by the C++ kernel", 'kernel="reference" has them'
    )


register_autograd("svp::conv_cpu", _derivative, setup_context=_keep, lib=LIB)
register_autograd("svp::conv_cpu_backward", _no_second, lib=LIB)


class _Conv(ctypes.Structure):  # kernels.h: Conv
    _fields_ = fields(
        (Rows, "x dy"), (ctypes.c_void_p, "weight bias past"), (ctypes.c_int64, "past_b"),
        (Rows, "y"), (ctypes.c_void_p, "dweight dpast"), (ctypes.c_int64, "batch length channels taps"),
        (ctypes.c_int, "silu reverse accumulate threads"),
    )  # fmt: skip


def conv_call(x, weight, bias, past, silu, reverse) -> Call:
    b, l, e = x.shape
    taps = weight.shape[1]
    call = Call(
        _Conv(
            batch=b, length=l, channels=e, taps=taps, silu=silu, reverse=reverse, threads=threads(x),
            past_b=e * (taps - 1) if past is not None and past.shape[0] > 1 else 0,
        )
    )  # fmt: skip
    call.put(x=x, weight=weight.T, bias=bias, past=None if past is None else past.transpose(1, 2))
    return call
