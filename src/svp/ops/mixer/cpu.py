"""The mixer's core on the C++ kernels, registered as `svp::mixer_cpu`: nothing is flipped, joined or kept that can be recomputed.

The forward keeps the codes of delta, B and C, and a state every CHUNK tokens; the backward recomputes convolution, delta and
the scans' outputs. Pictures are taken a few at a time, so that the room for what lies between two steps stays small.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.library import Library, impl, register_autograd, register_fake

from svp.errors import SvpError
from svp.ops import native
from svp.ops.causal_conv1d.cpu import conv_call, weight_shares
from svp.ops.mixer import Direction
from svp.ops.native import Call, Rows, fields, room, threads
from svp.ops.selective_scan.cpu import backward_shares, saved_shape, scan_call
from svp.ops.selective_scan.operator import Wanted, is_recorded, kept

NAMES = Direction._fields
OPTIONAL = ("conv_bias", "x_proj_bias", "dt_bias", "D", "h0", "past", "offset", "bias")
SCHEMA = ", ".join(f"Tensor{'?' if name in OPTIONAL else ''} {name}{k}" for k in (0, 1) for name in NAMES)
COUNT = len(NAMES)

LIB = Library("svp", "FRAGMENT")
LIB.define(
    f"mixer_cpu(Tensor xz, {SCHEMA}, float scale, bool save)"
    " -> (Tensor out, Tensor codes, Tensor states0, Tensor states1)"
)
LIB.define(
    f"mixer_cpu_backward(Tensor dout, Tensor codes, Tensor states0, Tensor states1, Tensor xz, {SCHEMA},"
    f" float scale, bool[{2 * COUNT}] needs) -> Tensor[]"
)


def missing() -> str | None:
    return None if native.available else native.reason


def mixer(xz: Tensor, forward: Direction, backward: Direction, scale: float, kernel: str) -> Tensor:
    """As the reference, in float32 throughout."""
    inputs = [None if t is None else t.to(torch.float32) for t in (xz, *forward, *backward)]
    return torch.ops.svp.mixer_cpu(*inputs, scale, is_recorded(*inputs))[0].to(xz.dtype)


# -- the op ------------------------------------------------------------------------------------------------------------


@register_fake("svp::mixer_cpu", lib=LIB)
def _(xz, *rest):
    *tensors, _, save = rest
    b, l, e = xz.shape[0], xz.shape[1], xz.shape[2] // 2
    pair = Direction(*tensors[:COUNT]), Direction(*tensors[COUNT:])
    shape = saved_shape(xz[..., :e], pair[0].A, 1)
    return (
        xz.new_empty(b, l, e), xz.new_empty((2, b, l, pair[0].x_proj.shape[0]) if save else (0,)),
        *(xz.new_empty(shape if save else (0,)) for _ in pair),
    )  # fmt: skip


@register_fake("svp::mixer_cpu_backward", lib=LIB)
def _(dout, codes, states0, states1, xz, *rest):
    *tensors, _, needs = rest
    return [xz.new_empty(xz.shape)] + [
        xz.new_empty(t.shape if asked and t is not None else (0,)) for t, asked in zip(tensors, needs, strict=True)
    ]


@impl(LIB, "mixer_cpu", "CPU")
def _forward(xz, *rest):
    *tensors, scale, save = rest
    xz = xz if xz.stride(-1) == 1 else xz.contiguous()
    b, l, e = xz.shape[0], xz.shape[1], xz.shape[2] // 2
    pair = Direction(*tensors[:COUNT]), Direction(*tensors[COUNT:])
    shape = saved_shape(xz[..., :e], pair[0].A, 1)
    out = xz.new_empty(b, l, e)
    width = pair[0].x_proj.shape[0]
    codes = xz.new_empty((2, b, l, width) if save else (0,))
    states = [xz.new_empty(shape if save else (0,)) for _ in pair]
    for some in groups(b, l, e):
        x, z = xz[some, :, :e], xz[some, :, e:]
        u, delta, first, scratch = room(x.shape, x.shape, x.shape, (*x.shape[:2], width))
        for k, w in enumerate(pair):
            code = codes[k, some] if save else scratch
            convolve(x, w, some, k, u)
            encode(u, w, code)
            widen(code, w, delta)
            call = scan(u, delta, code, w, some, k)
            if k == 0:
                call.put(y=first)
            else:
                call.args.scale = scale
                call.put(add=first, z=z, y=out[some])
            call.put(states=states[k][some] if save else None)
            call.run("svp_scan_forward")
    return out, codes, *states


@impl(LIB, "mixer_cpu_backward", "CPU")
def _backward(dout, codes, states0, states1, xz, *rest):
    *tensors, scale, needs = rest
    xz = xz if xz.stride(-1) == 1 else xz.contiguous()
    b, l, e = xz.shape[0], xz.shape[1], xz.shape[2] // 2
    pair = Direction(*tensors[:COUNT]), Direction(*tensors[COUNT:])
    wanted = [dict(zip(NAMES, half, strict=True)) for half in (needs[:COUNT], needs[COUNT:])]
    states = states0, states1
    dxz = xz.new_empty(xz.shape)
    grads = [Grads(w, asked) for w, asked in zip(pair, wanted, strict=True)]
    for some in groups(b, l, e):
        x, z = xz[some, :, :e], xz[some, :, e:]
        u, slope, delta, dy, gate, du, ddelta, dcode = room(*[x.shape] * 7, (*x.shape[:2], codes.shape[-1]))
        share_gate(dout[some], z, dy, gate, scale)
        for k, w in enumerate(pair):
            code, add = codes[k, some], grads[k]
            convolve(x, w, some, k, u, slope)
            widen(code, w, delta)
            call = scan(u, delta, code, w, some, k, h0=False)
            call.args.add_dz = k == 1  # each direction has a share of y, and with it of dz
            call.put(dy=dy, gate=gate, states=states[k][some], du=du, ddelta=ddelta, dz=dxz[some, :, e:])
            shares = backward_shares(u, w.A.shape[1], 1, add.of_scan)
            call.put(**shares)
            call.run("svp_scan_backward")
            rows, r, n = dcode.flatten(0, 1), w.dt_proj.shape[1], w.A.shape[1]
            torch.mm(ddelta.flatten(0, 1), w.dt_proj, out=rows[:, :r])
            torch.sum(shares["dB"][:, :, :, 0], 0, out=dcode[..., r : r + n])
            torch.sum(shares["dC"][:, :, :, 0], 0, out=dcode[..., r + n :])
            torch.addmm(du.flatten(0, 1), rows, w.x_proj, out=du.flatten(0, 1))
            add.scan(shares, some)
            add.products(u, code, ddelta, dcode)
            add.convolution(convolve_backward(x, w, some, k, du, slope, dxz[some, :, :e], add.asked), some)
    return [dxz, *grads[0].list(), *grads[1].list()]


class Grads:
    """The gradients of one direction's tensors that are asked for, summed over the groups of pictures in their order."""

    def __init__(self, w: Direction, asked: dict[str, bool]):
        self.w, self.asked = w, asked
        self.of_scan = Wanted(*(asked[name] for name in ("A", "D", "dt_bias", "h0", "offset", "bias")))
        self.found: dict[str, Tensor] = {}

    def add(self, name: str, part: Tensor) -> None:
        self.found[name] = part if name not in self.found else self.found[name] + part

    def each(self, name: str, part: Tensor, some: slice) -> None:
        """Of a tensor that each picture may have for itself: (b, …), or summed where all share it."""
        t = getattr(self.w, name)
        if t.shape[0] == 1:
            self.add(name, part.sum(0, keepdim=True))
        else:
            self.found.setdefault(name, t.new_empty(t.shape))[some] = part

    def scan(self, shares: dict[str, Tensor | None], some: slice) -> None:
        names = {"A": "dA", "D": "dD", "dt_bias": "ddelta_bias", "offset": "doffset", "bias": "dbias"}
        for name, key in names.items():
            share = shares[key]
            if share is not None:
                self.add(name, share.sum(0))
        if shares["dh0"] is not None:
            self.each("h0", shares["dh0"], some)

    def products(self, u: Tensor, code: Tensor, ddelta: Tensor, dcode: Tensor) -> None:
        with torch.autocast("cpu", enabled=False):  # a backward may be called inside of it
            if self.asked["x_proj"]:
                self.add("x_proj", dcode.flatten(0, 1).T @ u.flatten(0, 1))
            if self.asked["x_proj_bias"]:
                self.add("x_proj_bias", dcode.sum((0, 1)))
            if self.asked["dt_proj"]:
                self.add("dt_proj", ddelta.flatten(0, 1).T @ code[..., : self.w.dt_proj.shape[1]].flatten(0, 1))

    def convolution(self, parts: tuple[Tensor | None, Tensor | None], some: slice) -> None:
        dweight, dpast = parts
        if dweight is not None:
            total = dweight.sum((0, 1))  # (taps + 1, e), the bias last
            if self.asked["conv"]:
                self.add("conv", total[:-1].T)
            if self.asked["conv_bias"]:
                self.add("conv_bias", total[-1])
        if dpast is not None:
            self.each("past", dpast.transpose(1, 2), some)

    def list(self) -> list[Tensor]:
        return [self.one(name, getattr(self.w, name), self.asked[name]) for name in NAMES]

    def one(self, name: str, t: Tensor | None, asked: bool) -> Tensor:
        if t is None or not asked:
            return self.w.conv.new_empty(0)
        return self.found[name].contiguous() if name in self.found else torch.zeros_like(t)  # no token: no gradient


# -- its steps ---------------------------------------------------------------------------------------------------------

GROUP_BYTES = 5 * 2**19  # of one (b, l, e) tensor; fixed, so that sums over pictures have one order


def groups(b: int, l: int, e: int) -> list[slice]:
    """The pictures in runs whose (b, l, e) tensors are small: their room is, too, and may stay in the cache between steps."""
    if not l:
        return []
    count = max(1, GROUP_BYTES // (4 * l * e))
    return [slice(first, min(first + count, b)) for first in range(0, b, count)]


def _of(t: Tensor | None, some: slice) -> Tensor | None:
    """The pictures' own rows of a tensor that all may share."""
    return t if t is None or t.shape[0] == 1 else t[some]


def convolve(x: Tensor, w: Direction, some: slice, k: int, u: Tensor, slope: Tensor | None = None) -> None:
    call = conv_call(x, w.conv, w.conv_bias, _of(w.past, some), True, k == 1)
    call.put(y=u, slope=slope)
    call.run("svp_conv_forward")


def convolve_backward(x, w, some, k, du, slope, dx, asked) -> tuple[Tensor | None, Tensor | None]:
    b, _, e = x.shape
    taps = w.conv.shape[1]
    dweight = weight_shares(x, taps) if asked["conv"] or asked["conv_bias"] else None
    dpast = x.new_zeros(b, taps - 1, e) if asked["past"] else None
    call = conv_call(x, w.conv, w.conv_bias, _of(w.past, some), True, k == 1)
    call.args.accumulate = k == 1  # the first direction wrote its part
    call.put(dy=du, slope=slope, y=dx, dweight=dweight, dpast=dpast)
    call.run("svp_conv_backward")
    return dweight, dpast


def encode(u: Tensor, w: Direction, code: Tensor) -> None:
    """code = x_proj u"""
    if w.x_proj_bias is None:
        torch.mm(u.flatten(0, 1), w.x_proj.T, out=code.flatten(0, 1))
    else:
        torch.addmm(w.x_proj_bias, u.flatten(0, 1), w.x_proj.T, out=code.flatten(0, 1))


def widen(code: Tensor, w: Direction, delta: Tensor) -> None:
    """delta = dt_proj code, of its first columns"""
    torch.mm(code.flatten(0, 1)[:, : w.dt_proj.shape[1]], w.dt_proj.T, out=delta.flatten(0, 1))


def scan(u: Tensor, delta: Tensor, code: Tensor, w: Direction, some: slice, k: int, h0: bool = True) -> Call:
    r, n = w.dt_proj.shape[1], w.A.shape[1]
    B, C = code[:, :, None, r : r + n], code[:, :, None, r + n :]
    start = _of(w.h0, some) if h0 else None
    return scan_call(u, delta, w.A, B, C, w.D, None, w.dt_bias, start, w.offset, w.bias, True, k == 1)


class _Gate(ctypes.Structure):  # kernels.h: Gate
    _fields_ = fields(
        (Rows, "dout z"), (ctypes.c_void_p, "dy gate"), (ctypes.c_int64, "batch length channels"), (ctypes.c_float, "scale"),
        (ctypes.c_int, "threads"),
    )  # fmt: skip


def share_gate(dout: Tensor, z: Tensor, dy: Tensor, gate: Tensor, scale: float) -> None:
    b, l, e = z.shape
    call = Call(_Gate(batch=b, length=l, channels=e, scale=scale, threads=threads(z)))
    call.put(dout=dout, z=z, dy=dy, gate=gate)
    call.run("svp_gate")


# -- its derivative ----------------------------------------------------------------------------------------------------


def _keep(ctx, inputs, output):
    *tensors, scale, _ = inputs
    ctx.save_for_backward(*output[1:], *tensors)
    ctx.scale = scale
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _derivative(ctx, dout, *_):
    if dout is None:
        return (None,) * (3 + 2 * COUNT)
    asked = ctx.needs_input_grad[1 : 1 + 2 * COUNT]
    saved = ctx.saved_tensors
    kept(dout, saved[1])
    dxz, *grads = torch.ops.svp.mixer_cpu_backward(dout, *saved, ctx.scale, list(asked))
    return dxz, *(grad if wanted else None for grad, wanted in zip(grads, asked, strict=True)), None, None


def _no_second(ctx, *grads):
    raise SvpError("second derivatives of the mixer are not offered by the C++ kernel", 'kernel="reference" has them')


register_autograd("svp::mixer_cpu", _derivative, setup_context=_keep, lib=LIB)
register_autograd("svp::mixer_cpu_backward", _no_second, lib=LIB)
