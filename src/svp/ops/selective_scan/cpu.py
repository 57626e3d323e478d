"""The scan in C++ (csrc/selective_scan.cpp), reached through a plain C interface and registered as `svp::scan_cpu`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.library import impl

from svp.ops import native
from svp.ops.native import Call, Rows, fields, threads
from svp.ops.selective_scan.operator import Wanted, declare, is_recorded, same_groups

CHUNK, PANEL, PANELS = 64, 64, 3  # kernels.h: T, PANEL, PANELS


def missing() -> str | None:
    return None if native.available else native.reason


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, h0: Tensor | None, offset: Tensor | None, bias: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the reference, but for constant B or C."""
    B, C = same_groups(B, C)
    inputs = [
        None if t is None else t.to(torch.float32) for t in (u, delta, A, B, C, D, z, delta_bias, h0, offset, bias)
    ]
    y, last, _ = torch.ops.svp.scan_cpu(*inputs, delta_softplus, reverse, is_recorded(*inputs))
    return y.to(u.dtype), last


# -- the op ------------------------------------------------------------------------------------------------------------


def saved_shape(u: Tensor, A: Tensor, groups: int) -> tuple[int, ...]:
    """(b, chunks, panels, n, PANEL): the state before each chunk of tokens, as the kernel lays it out."""
    b, l, e = u.shape
    return b, _pieces(l, CHUNK), groups * _pieces(e // groups, PANEL), A.shape[1], PANEL


def _pieces(whole: int, part: int) -> int:
    return (whole + part - 1) // part


LIB = declare("scan_cpu", lambda u, A, B: saved_shape(u, A, B.shape[2]))


@impl(LIB, "scan_cpu", "CPU")
def forward(u, delta, A, B, C, D, z, delta_bias, h0, offset, bias, softplus, reverse, save):
    b, l, e = u.shape
    y, last = u.new_empty(b, l, e), u.new_empty(b, e, A.shape[1])
    states = u.new_empty(saved_shape(u, A, B.shape[2]) if save else (0,))
    call = scan_call(u, delta, A, B, C, D, z, delta_bias, h0, offset, bias, softplus, reverse)
    call.put(y=y, last=last, states=states if save else None)
    call.run("svp_scan_forward")
    return y, last, states


@impl(LIB, "scan_cpu_backward", "CPU")
def backward(dy, dlast, states, u, delta, A, B, C, D, z, delta_bias, h0, offset, bias, softplus, reverse, needs):
    wanted = Wanted(*needs)
    du, ddelta, dz = u.new_empty(u.shape), u.new_empty(u.shape), None if z is None else u.new_empty(u.shape)
    shares = backward_shares(u, A.shape[1], B.shape[2], wanted)
    call = scan_call(u, delta, A, B, C, D, z, delta_bias, None, offset, bias, softplus, reverse)
    call.put(dy=dy, dlast=dlast, states=states, du=du, ddelta=ddelta, dz=dz, **shares)
    call.run("svp_scan_backward")

    def summed(name: str) -> Tensor | None:
        t = shares[name]
        return None if t is None else t[0] if len(t) == 1 else t.sum(0)

    grads = (
        du, ddelta, *(summed(name) for name in ("dA", "dB", "dC", "dD")), dz, summed("ddelta_bias"), shares["dh0"],
        summed("doffset"), summed("dbias"),
    )  # fmt: skip
    return tuple(u.new_empty(0) if grad is None else grad for grad in grads)


def backward_shares(u: Tensor, n: int, groups: int, wanted: Wanted) -> dict[str, Tensor | None]:
    """Room for what the backward pass leaves in parts, the first axis to be summed: a part of dB and dC for each block of
    channels, of the others for each picture."""
    b, l, e = u.shape
    blocks = _pieces(_pieces(e // groups, PANEL), PANELS) if e else 0

    def one(*shape: int, asked: bool = True) -> Tensor | None:
        return u.new_empty(shape) if asked else None

    return {
        "dB": one(blocks, b, l, groups, n), "dC": one(blocks, b, l, groups, n),
        "dA": one(b, e, n, asked=wanted.A), "doffset": one(b, e, n, asked=wanted.offset),
        "dh0": one(b, e, n, asked=wanted.h0), "dD": one(b, e, asked=wanted.D),
        "ddelta_bias": one(b, e, asked=wanted.delta_bias), "dbias": one(b, e, asked=wanted.bias),
    }  # fmt: skip


# -- the C interface ---------------------------------------------------------------------------------------------------


class _Scan(ctypes.Structure):  # kernels.h: Scan
    _fields_ = fields(
        (Rows, "u delta B C z dy add gate"), (ctypes.c_void_p, "A D delta_bias bias offset h0"), (ctypes.c_int64, "h0_b"),
        (ctypes.c_void_p, "states y last dlast du ddelta"), (Rows, "dz"),
        (ctypes.c_void_p, "dB dC dA doffset dD ddelta_bias dbias dh0"),
        (ctypes.c_int64, "batch length channels groups n"), (ctypes.c_float, "scale"),
        (ctypes.c_int, "softplus reverse add_dz threads"),
    )  # fmt: skip


def scan_call(u, delta, A, B, C, D, z, delta_bias, h0, offset, bias, softplus, reverse) -> Call:
    b, l, e = u.shape
    n = A.shape[1]
    call = Call(
        _Scan(
            batch=b, length=l, channels=e, groups=B.shape[2], n=n, softplus=softplus, reverse=reverse,
            threads=threads(u), scale=1.0, h0_b=e * n if h0 is not None and h0.shape[0] > 1 else 0,
        )
    )  # fmt: skip
    call.put(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, h0=h0, offset=offset, bias=bias)
    return call
