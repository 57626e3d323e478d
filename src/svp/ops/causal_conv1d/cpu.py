"""The convolution in C++ (csrc/causal_conv1d.cpp), registered as `svp::conv_cpu`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.library import Library, impl, register_autograd, register_fake

from svp.errors import SvpError
from svp.ops import native
from svp.ops.selective_scan.cpu import _at, _dense, _fields, _Rows, _rows, _run, _threads

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
    args, alive = _args(x, None, weight, bias, past, y, None, None, silu, reverse)
    _run("svp_conv_forward", args)
    del alive
    return y


@impl(LIB, "conv_cpu_backward", "CPU")
def backward(dy, x, weight, bias, past, silu, reverse, needs):
    b, _, e = x.shape
    taps = weight.shape[1]
    dx = x.new_empty(x.shape)
    dweight = x.new_zeros(b, taps + 1, e) if needs[0] else None
    dpast = x.new_zeros(b, taps - 1, e) if needs[1] else None
    args, alive = _args(x, dy, weight, bias, past, dx, dweight, dpast, silu, reverse)
    _run("svp_conv_backward", args)
    del alive
    none = x.new_empty(0)
    return (
        dx,
        none if dweight is None else dweight.sum(0),
        none if dpast is None else dpast.transpose(1, 2).contiguous(),
    )


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


class _Conv(ctypes.Structure):
    _fields_ = _fields(
        (_Rows, "x dy"), (ctypes.c_void_p, "weight bias past"), (ctypes.c_int64, "past_b"),
        (ctypes.c_void_p, "y dweight dpast"), (ctypes.c_int64, "batch length channels taps"),
        (ctypes.c_int, "silu reverse threads"),
    )  # fmt: skip


def _args(x, dy, weight, bias, past, y, dweight, dpast, silu, reverse):
    b, l, e = x.shape
    taps = weight.shape[1]
    x, dy = _dense(x), None if dy is None else _dense(dy)
    weight = weight.T.contiguous()
    bias = None if bias is None else bias.contiguous()
    past_b = e * (taps - 1) if past is not None and past.shape[0] > 1 else 0
    past = None if past is None else past.transpose(1, 2).contiguous()
    rows = _rows(x), _Rows() if dy is None else _rows(dy)
    args = _Conv(
        *rows, _at(weight), _at(bias), _at(past), past_b, _at(y), _at(dweight), _at(dpast), b, l, e, taps, silu, reverse,
        _threads(x),
    )  # fmt: skip
    return args, (x, dy, weight, bias, past)
