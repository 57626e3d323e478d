"""Add and norm in Triton, registered as `svp::add_norm_triton`: one pass forward, one backward.

  s = x + residual + sum_j scale_j act_j(pre_j),   h = s r weight,   r = 1 / sqrt(mean(s²) + eps)
  ds = dstream + r (q - s r² mean(q s)),  q = dh weight
  dpre_j = ds scale_j act_j',  dscale_j = sum over tokens of ds act_j,  dweight = sum over tokens of dh s r

A program is ROWS tokens of one picture, a token's channels side by side in its threads. It leaves its part of the sums over
tokens; none waits for another.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import impl

from svp.ops import gpu
from svp.ops.add_norm.operator import called, declare, outputs

ROWS = 8  # tokens of a program
HALF = (torch.float32, torch.bfloat16, torch.float16)  # are read as they are


def missing() -> str | None:
    return gpu.missing()


def add_norm(x, residual, weight, eps, terms, skip) -> tuple[Tensor, Tensor]:
    """As the reference, in float32."""
    return called(torch.ops.svp.add_norm_triton, x, residual, weight, eps, terms, skip, HALF)


LIB = declare("add_norm_triton")


def forward(x, residual, pre0, scale0, pre1, scale1, weight, eps, silu, skip):
    h, stream = (x.new_empty(x.shape, dtype=torch.float32) for _ in range(2))
    if h.numel():
        (x, residual, pre0, pre1), strides = _rows(x, residual, pre0, pre1)
        grid, numbers = _place_of(h, skip)
        with torch.cuda.device_of(h):
            _forward[grid](
                x, residual, pre0, pre1, *_dense(scale0, scale1, weight), _positions(tuple(skip), h.device), h, stream,
                *strides, *numbers, eps, **_options(h, scale0, scale1, silu),
            )  # fmt: skip
    return h, stream


def backward(dh, dstream, stream, pre0, scale0, pre1, scale1, weight, eps, silu, skip, needs_weight):
    d = stream.shape[2]
    ds = stream.new_empty(stream.shape)
    grid, numbers = _place_of(ds, skip)
    dpre = [None if t is None else t.new_empty(t.shape) for t in (pre0, pre1)]
    dscale = [None if t is None else ds.new_empty(*grid, d) for t in (scale0, scale1)]
    dweight = ds.new_empty(*grid, d) if needs_weight else None
    if ds.numel():
        (dh, dstream, pre0, pre1), strides = _rows(dh, dstream, pre0, pre1)
        with torch.cuda.device_of(ds):
            _backward[grid](
                dh, dstream, stream, pre0, pre1, *_dense(scale0, scale1, weight), _positions(tuple(skip), ds.device), ds,
                *dpre, *dscale, dweight, *strides, *numbers, eps, **_options(ds, scale0, scale1, silu),
            )  # fmt: skip
    return outputs(ds, dpre, dscale, dweight, (scale0, scale1), weight)


for _device in ("CUDA", "CPU") if gpu.interpreted() else ("CUDA",):
    impl(LIB, "add_norm_triton", _device)(forward)
    impl(LIB, "add_norm_triton_backward", _device)(backward)


def _rows(*tensors: Tensor | None) -> tuple[list[Tensor | None], list[int]]:
    """(b, l, d) each, channels side by side, and the strides from picture to picture and token to token."""
    rows = [t if t is None or t.stride(2) == 1 else t.contiguous() for t in tensors]
    return rows, [0 if t is None else t.stride(axis) for t in rows for axis in (0, 1)]


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _place_of(like: Tensor, skip: list[int]) -> tuple[tuple[int], tuple[int, ...]]:
    """The grid of programs, and what a program needs to find its place."""
    b, l, d = like.shape
    pieces = triton.cdiv(l, ROWS)
    return (b * pieces,), (l, d, pieces, len(skip))


def _options(like: Tensor, scale0: Tensor | None, scale1: Tensor | None, silu: list[bool]) -> dict:
    block = triton.next_power_of_2(like.shape[2])
    shared = [t is not None and len(t) == 1 for t in (scale0, scale1)]  # one scale for all channels
    return {
        "ROWS": ROWS, "BLOCK": block, "SHARED0": shared[0], "SHARED1": shared[1], "SILU0": silu[0], "SILU1": silu[1],
        "num_warps": min(max(block // 256, 1), 8),
    }  # fmt: skip


@cache  # a copy to the GPU in every call would take longer than the kernel
def _positions(skip: tuple[int, ...], device: torch.device) -> Tensor | None:
    return torch.tensor(skip, device=device, dtype=torch.int32) if skip else None


# -- kernels -----------------------------------------------------------------------------------------------------------

# numbers that change from call to call: each value would compile a kernel of its own
NUMBERS = ("x_b", "x_l", "add_b", "add_l", "pre0_b", "pre0_l", "pre1_b", "pre1_l", "length", "width", "pieces", "skips")


@triton.jit(do_not_specialize=NUMBERS)
def _forward(
    x, residual, pre0, pre1, scale0, scale1, weight, skip, h, stream,
    x_b, x_l, add_b, add_l, pre0_b, pre0_l, pre1_b, pre1_l, length, width, pieces, skips, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SHARED0: tl.constexpr, SHARED1: tl.constexpr,
    SILU0: tl.constexpr, SILU1: tl.constexpr,
):  # fmt: skip
    picture, first, last, channel, inside = _place(length, width, pieces, ROWS, BLOCK)
    x_l, add_l, pre0_l, pre1_l = x_l.to(tl.int64), add_l.to(tl.int64), pre0_l.to(tl.int64), pre1_l.to(tl.int64)
    w = tl.load(weight + channel, mask=inside, other=0.0)
    by0, by1 = _scale(scale0, channel, inside, SHARED0), _scale(scale1, channel, inside, SHARED1)
    for t in range(first, last):
        s = _row(x, picture * x_b + t * x_l, channel, inside)
        if residual is not None:
            s += _row(residual, picture * add_b + t * add_l, channel, inside)
        wanted = _is_wanted(skip, skips, t)
        if pre0 is not None:
            act, _ = _activation(_row(pre0, picture * pre0_b + t * pre0_l, channel, inside), SILU0)
            s += tl.where(wanted, by0 * act, 0.0)
        if pre1 is not None:
            act, _ = _activation(_row(pre1, picture * pre1_b + t * pre1_l, channel, inside), SILU1)
            s += tl.where(wanted, by1 * act, 0.0)
        r = 1.0 / tl.sqrt(tl.sum(s * s, 0) / width + eps)
        at = (picture * length + t) * width + channel
        tl.store(stream + at, s, mask=inside)
        tl.store(h + at, s * r * w, mask=inside)


@triton.jit(do_not_specialize=NUMBERS)
def _backward(
    dh, dstream, stream, pre0, pre1, scale0, scale1, weight, skip, ds, dpre0, dpre1, dscale0, dscale1, dweight,
    x_b, x_l, add_b, add_l, pre0_b, pre0_l, pre1_b, pre1_l, length, width, pieces, skips, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SHARED0: tl.constexpr, SHARED1: tl.constexpr,
    SILU0: tl.constexpr, SILU1: tl.constexpr,
):  # fmt: skip
    picture, first, last, channel, inside = _place(length, width, pieces, ROWS, BLOCK)
    x_l, add_l, pre0_l, pre1_l = x_l.to(tl.int64), add_l.to(tl.int64), pre0_l.to(tl.int64), pre1_l.to(tl.int64)
    w = tl.load(weight + channel, mask=inside, other=0.0)
    by0, by1 = _scale(scale0, channel, inside, SHARED0), _scale(scale1, channel, inside, SHARED1)
    sum0, sum1, sum_w = (tl.zeros((BLOCK,), tl.float32),) * 3
    for t in range(first, last):
        at = (picture * length + t) * width + channel
        s = tl.load(stream + at, mask=inside, other=0.0)
        d = _row(dh, picture * x_b + t * x_l, channel, inside)
        mean = tl.sum(s * s, 0) / width + eps
        r = 1.0 / tl.sqrt(mean)
        total = (d * w - s * (tl.sum(d * w * s, 0) / width / mean)) * r
        if dstream is not None:
            total += _row(dstream, picture * add_b + t * add_l, channel, inside)
        tl.store(ds + at, total, mask=inside)
        if dweight is not None:
            sum_w += d * s * r
        given = tl.where(_is_wanted(skip, skips, t), total, 0.0)
        if pre0 is not None:
            act, slope = _activation(_row(pre0, picture * pre0_b + t * pre0_l, channel, inside), SILU0)
            tl.store(dpre0 + at, given * by0 * slope, mask=inside)
            sum0 += given * act
        if pre1 is not None:
            act, slope = _activation(_row(pre1, picture * pre1_b + t * pre1_l, channel, inside), SILU1)
            tl.store(dpre1 + at, given * by1 * slope, mask=inside)
            sum1 += given * act
    share = tl.program_id(0).to(tl.int64) * width + channel
    if pre0 is not None:
        tl.store(dscale0 + share, sum0, mask=inside)
    if pre1 is not None:
        tl.store(dscale1 + share, sum1, mask=inside)
    if dweight is not None:
        tl.store(dweight + share, sum_w, mask=inside)


@triton.jit
def _place(length, width, pieces, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Picture (64 bits: it is multiplied by strides), first token and the one after the last, and the channels."""
    task = tl.program_id(0)
    first = task % pieces * ROWS
    channel = tl.arange(0, BLOCK)
    return (task // pieces).to(tl.int64), first, tl.minimum(first + ROWS, length), channel, channel < width


@triton.jit
def _row(p, at, channel, inside):
    return tl.load(p + at + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _scale(p, channel, inside, SHARED: tl.constexpr):
    """Each channel's own, or one number for all."""
    if p is None:
        return 0.0
    elif SHARED:
        return tl.load(p)
    else:
        return tl.load(p + channel, mask=inside, other=0.0)


@triton.jit
def _is_wanted(skip, skips, t):
    """Whether a token gets the summands."""
    wanted = t >= 0
    if skip is not None:
        for i in range(skips):
            wanted = wanted & (tl.load(skip + i) != t)
    return wanted


@triton.jit
def _activation(x, SILU: tl.constexpr):
    """The value and its derivative."""
    if SILU:
        open_ = tl.sigmoid(x)
        return x * open_, open_ * (1.0 + x * (1.0 - open_))
    else:
        return x, tl.full(x.shape, 1.0, tl.float32)
