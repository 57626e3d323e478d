"""The convolution in C++ (csrc/causal_conv1d.cpp), registered as `svp::conv_cpu`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.library import impl

from svp.ops import native
from svp.ops.causal_conv1d.operator import declare
from svp.ops.native import Call, Rows, fields, threads


def missing() -> str | None:
    return None if native.available else native.reason


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, past: Tensor | None, reverse: bool) -> Tensor:
    """As the reference."""
    wide = [None if t is None else t.to(torch.float32) for t in (x, weight, bias, past)]
    return torch.ops.svp.conv_cpu(*wide, silu, reverse).to(x.dtype)


LIB = declare("conv_cpu")


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
    dweight = weight_shares(x, taps) if needs[0] else None
    dpast = x.new_zeros(b, taps - 1, e) if needs[1] else None
    call = conv_call(x, weight, bias, past, silu, reverse)
    call.put(dy=dy, y=dx, dweight=dweight, dpast=dpast)
    call.run("svp_conv_backward")
    return (
        dx, x.new_empty(0) if dweight is None else dweight.sum((0, 1)),
        x.new_empty(0) if dpast is None else dpast.transpose(1, 2).contiguous(),
    )  # fmt: skip


SPAN = 32  # kernels.h: tokens of a task


def weight_shares(x: Tensor, taps: int) -> Tensor:
    """Room for each span's share of dweight, the bias last: (spans, b, taps + 1, e)"""
    b, l, e = x.shape
    return x.new_empty((l + SPAN - 1) // SPAN, b, taps + 1, e)


class _Conv(ctypes.Structure):  # kernels.h: Conv
    _fields_ = fields(
        (Rows, "x dy"), (ctypes.c_void_p, "weight bias past"), (ctypes.c_int64, "past_b"),
        (Rows, "y"), (ctypes.c_void_p, "slope dweight dpast"), (ctypes.c_int64, "batch length channels taps"),
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
