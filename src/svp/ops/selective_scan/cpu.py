"""The scan in C++ (csrc/selective_scan.cpp), reached through a plain C interface and registered as `svp::scan_cpu`."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor
from torch.library import Library, impl, register_autograd, register_fake

from svp.errors import SvpError
from svp.ops import native

CHUNK = 16  # tokens between two stored states; kernels.h: T
BLOCK = 256  # channels of one task at most; kernels.h: BLOCK
INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, Tensor? h0"

LIB = Library("svp", "FRAGMENT")
LIB.define(f"scan_cpu({INPUTS}, bool softplus, bool reverse, bool save) -> (Tensor y, Tensor last, Tensor states)")
LIB.define(
    f"scan_cpu_backward(Tensor dy, Tensor dlast, Tensor states, {INPUTS}, bool softplus, bool reverse, bool[3] needs) "
    "-> (Tensor du, Tensor ddelta, Tensor dB, Tensor dC, Tensor dA, Tensor dh0)"
)


def missing() -> str | None:
    return None if native.available else native.reason


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, h0: Tensor | None, offset: Tensor | None, bias: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the reference. The kernel runs the recurrence; read-out offset, bias and gate are products and sums around it."""
    wide = torch.float32
    b, l, _ = u.shape
    B, C = (
        t.expand(b, l, *t.shape) if t.dim() == 2 else t for t in (B, C)
    )  # constants: a group of its own each channel
    if B.shape[2] != C.shape[2]:
        g = max(B.shape[2], C.shape[2])
        B, C = (t.repeat_interleave(g // t.shape[2], dim=2) for t in (B, C))
    flat = [None if t is None else t.to(wide) for t in (u, delta, A, B, C, D, delta_bias, h0)]
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in flat)
    y, last, _ = torch.ops.svp.scan_cpu(*flat, delta_softplus, reverse, save)
    if offset is not None:
        y = y + read_offset(flat[4], offset.to(wide))
    y = y if bias is None else y + bias.to(wide)
    y = y if z is None else y * torch.nn.functional.silu(z.to(wide))
    return y.to(u.dtype), last


def read_offset(C: Tensor, offset: Tensor) -> Tensor:
    """C (b, l, g, n), offset (e, n) -> what the offset adds to y, (b, l, e)."""
    b, l, g, n = C.shape
    per_group = offset.unflatten(0, (g, -1))  # (g, e / g, n)
    return torch.einsum("blgn,gen->blge", C, per_group).reshape(b, l, -1)


# -- the op and its derivative -----------------------------------------------------------------------------------------


def chunks(length: int) -> int:
    return (length + CHUNK - 1) // CHUNK


@register_fake("svp::scan_cpu", lib=LIB)
def _(u, delta, A, B, C, D, delta_bias, h0, softplus, reverse, save):
    b, l, e = u.shape
    n = A.shape[1]
    return u.new_empty(b, l, e), u.new_empty(b, e, n), u.new_empty(b, chunks(l) if save else 0, n, e)


@register_fake("svp::scan_cpu_backward", lib=LIB)
def _(dy, dlast, states, u, delta, A, B, C, D, delta_bias, h0, softplus, reverse, needs):
    b, l, e = u.shape
    n = A.shape[1]
    grads = [u.new_empty(b, l, e), u.new_empty(b, l, e), B.new_empty(B.shape), C.new_empty(C.shape)]
    return *grads, u.new_empty((e, n) if needs[0] else (0,)), u.new_empty((b, e, n) if needs[1] else (0,))


@impl(LIB, "scan_cpu", "CPU")
def forward(u, delta, A, B, C, D, delta_bias, h0, softplus, reverse, save):
    b, l, e = u.shape
    n = A.shape[1]
    y, last = u.new_empty(b, l, e), u.new_empty(b, n, e)
    states = u.new_empty(b, chunks(l) if save else 0, n, e)
    held = _Held(u, delta, A, B, C, D, delta_bias, h0)
    args = _Forward(
        *held.rows, held.A2, held.D, held.delta_bias, held.h0, held.h0_b, _at(y), _at(states) if save else None,
        _at(last), *held.sizes, softplus, reverse, _threads(u),
    )  # fmt: skip
    _run("svp_scan_forward", args)
    return y, last.transpose(1, 2).contiguous(), states


@impl(LIB, "scan_cpu_backward", "CPU")
def backward(dy, dlast, states, u, delta, A, B, C, D, delta_bias, h0, softplus, reverse, needs):
    b, l, e = u.shape
    g, n = B.shape[2], A.shape[1]
    need_A, need_h0, has_last = needs
    blocks = (e // g + BLOCK - 1) // BLOCK
    du, ddelta = u.new_empty(b, l, e), u.new_empty(b, l, e)
    dB, dC = u.new_empty(blocks, b, l, g, n), u.new_empty(blocks, b, l, g, n)
    dA, dh0 = (u.new_empty(b, n, e) if need else None for need in (need_A, need_h0))
    held = _Held(u, delta, A, B, C, D, delta_bias, None)
    dy = _dense(dy)
    dlast = dlast.transpose(1, 2).contiguous() if has_last else None
    args = _Backward(
        *held.rows, _rows(dy), held.A2, held.D, held.delta_bias, _at(states), _at(dlast), _at(du), _at(ddelta), _at(dB),
        _at(dC), _at(dA), _at(dh0), *held.sizes, softplus, reverse, _threads(u),
    )  # fmt: skip
    _run("svp_scan_backward", args)
    none = u.new_empty(0)
    total_A = none if dA is None else dA.sum(0).T.contiguous()
    total_h0 = none if dh0 is None else dh0.transpose(1, 2).contiguous()
    # a fixed order: the same bits for any number of threads
    return du, ddelta, *((t[0] if blocks == 1 else t.sum(0)) for t in (dB, dC)), total_A, total_h0


def _keep(ctx, inputs, output):
    *tensors, softplus, reverse, _ = inputs
    ctx.save_for_backward(output[2], *tensors)
    ctx.flags = softplus, reverse
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])


def _derivative(ctx, dy, dlast, _):
    states, u, delta, A, B, C, D, delta_bias, h0 = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dy = torch.zeros_like(u) if dy is None else dy
    last = u.new_zeros(0) if dlast is None else dlast
    du, ddelta, dB, dC, dA, dh0 = torch.ops.svp.scan_cpu_backward(
        dy, last, states, u, delta, A, B, C, D, delta_bias, h0, *ctx.flags, [needs[2], needs[7], dlast is not None]
    )
    dD = (dy * u).sum((0, 1)) if needs[5] else None
    dbias = ddelta.sum((0, 1)) if needs[6] else None
    if needs[7] and h0.shape[0] == 1:
        dh0 = dh0.sum(0, keepdim=True)
    return du, ddelta, dA if needs[2] else None, dB, dC, dD, dbias, dh0 if needs[7] else None, None, None, None


register_autograd("svp::scan_cpu", _derivative, setup_context=_keep, lib=LIB)


def _no_second(ctx, *grads):
    raise SvpError("second derivatives of the scan are not offered by the C++ kernel", 'kernel="reference" has them')


register_autograd("svp::scan_cpu_backward", _no_second, lib=LIB)


# -- the C interface ---------------------------------------------------------------------------------------------------


class _Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("b", ctypes.c_int64), ("l", ctypes.c_int64), ("g", ctypes.c_int64)]


def _fields(*groups: tuple[type, str]) -> list[tuple[str, type]]:
    return [(name, kind) for kind, names in groups for name in names.split()]


SIZES = ((ctypes.c_int64, "batch length channels groups n"), (ctypes.c_int, "softplus reverse threads"))


class _Forward(ctypes.Structure):
    _fields_ = _fields(
        (_Rows, "u delta B C"), (ctypes.c_void_p, "A2 D delta_bias h0"), (ctypes.c_int64, "h0_b"),
        (ctypes.c_void_p, "y states last"), *SIZES,
    )  # fmt: skip


class _Backward(ctypes.Structure):
    _fields_ = _fields(
        (_Rows, "u delta B C dy"), (ctypes.c_void_p, "A2 D delta_bias states dlast du ddelta dB dC dA dh0"), *SIZES
    )


class _Held:
    """Inputs as the kernel wants them; keeps the converted ones alive during the call."""

    def __init__(self, u, delta, A, B, C, D, delta_bias, h0):
        self.alive = [_dense(t) for t in (u, delta, B, C)]
        b, l, e = u.shape
        self.rows = [_rows(t) for t in self.alive]
        self.sizes = (b, l, e, B.shape[2], A.shape[1])
        self.A2 = self.keep((A * math.log2(math.e)).T)
        self.D, self.delta_bias = self.keep(D), self.keep(delta_bias)
        self.h0 = self.keep(None if h0 is None else h0.transpose(1, 2))
        self.h0_b = e * A.shape[1] if h0 is not None and h0.shape[0] > 1 else 0

    def keep(self, t: Tensor | None) -> int | None:
        if t is None:
            return None
        self.alive.append(t.contiguous())
        return self.alive[-1].data_ptr()


def _dense(t: Tensor) -> Tensor:
    """The last axis must be dense; every other stride is free."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _rows(t: Tensor) -> _Rows:
    return _Rows(t.data_ptr(), t.stride(0), t.stride(1), t.stride(2) if t.dim() == 4 else 0)


def _at(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _threads(u: Tensor) -> int:
    return native.threads() if u.numel() >= 20_000 else 1


def _run(name: str, args: ctypes.Structure) -> None:
    function = getattr(native.library, name)
    function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_int
    if function(ctypes.addressof(args)) != 0:
        raise MemoryError("the scan's scratch memory could not be had")
