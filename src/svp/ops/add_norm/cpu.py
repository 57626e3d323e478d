"""Add and norm in C++ (csrc/add_norm.cpp), registered as `svp::add_norm_cpu`: one pass forward, one backward."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.library import impl

from svp.ops import native
from svp.ops.add_norm.operator import called, declare, outputs
from svp.ops.native import Call, Rows, fields, threads

ROWS = 16  # kernels.h: ROWS, tokens of a task


def missing() -> str | None:
    return None if native.available else native.reason


def add_norm(x, residual, weight, eps, terms, skip) -> tuple[Tensor, Tensor]:
    """As the reference, in float32."""
    return called(torch.ops.svp.add_norm_cpu, x.float(), residual, weight, eps, terms, skip, (torch.float32,))


LIB = declare("add_norm_cpu")


@impl(LIB, "add_norm_cpu", "CPU")
def forward(x, residual, pre0, scale0, pre1, scale1, weight, eps, silu, skip):
    h, stream = x.new_empty(x.shape), x.new_empty(x.shape)
    call = _call(x, pre0, scale0, pre1, scale1, weight, eps, silu, skip)
    call.put(x=x, residual=residual, h=h, stream=stream)
    call.run("svp_add_norm_forward")
    return h, stream


@impl(LIB, "add_norm_cpu_backward", "CPU")
def backward(dh, dstream, stream, pre0, scale0, pre1, scale1, weight, eps, silu, skip, needs_weight):
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
    return outputs(ds, dpre, dscale, dweight, (scale0, scale1), weight)


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
