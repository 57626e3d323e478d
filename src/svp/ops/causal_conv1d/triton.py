"""The convolution in Triton, registered as `svp::conv_triton`.

  pre_t = bias + sum_k w_k x_{t - (taps - 1) + k},   y_t = silu(pre_t)

with dpre_t = dy_t silu'(pre_t):
  dx_s = sum_k w_k dpre_{s + (taps - 1) - k}, for s < 0 that of the past;   dw_k = sum_t dpre_t x_{t - (taps - 1) + k}

A program is a tile of ROWS tokens and BLOCK channels of one picture. Each tap reads the shifted tile again, which the
first one has brought near; the backward makes pre again for the tokens that look back on its tile. t counts in scan
order, direction is the sign of a row's stride. Every program writes a share of the weight's gradient of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import impl

from svp.ops import gpu
from svp.ops.causal_conv1d.operator import declare

ROWS, BLOCK = 8, 64  # tokens and channels of a program
WARPS = 4  # four numbers of a tile to a thread: the backward keeps several tiles
HALF = (torch.float32, torch.bfloat16, torch.float16)  # are read as they are


def missing() -> str | None:
    return gpu.missing()


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, past: Tensor | None, reverse: bool) -> Tensor:
    """As the reference."""
    weight, bias, past = (None if t is None else t.float() for t in (weight, bias, past))
    return torch.ops.svp.conv_triton(x, weight, bias, past, silu, reverse)


# -- the op ------------------------------------------------------------------------------------------------------------

LIB = declare("conv_triton")


def forward(x, weight, bias, past, silu, reverse):
    b, l, e = x.shape
    y = x.new_empty(b, l, e)
    grid, numbers = _tiles(y, l)
    if grid[0]:
        (x, *x_steps), (out, *y_steps) = _from_the_start(x, reverse), _from_the_start(y, reverse)
        with torch.cuda.device_of(y):
            _forward[grid](
                x, *_tables(weight, bias, past), out, *x_steps, *y_steps, _per_picture(past), *numbers,
                TAPS=weight.shape[1], ROWS=ROWS, BLOCK=BLOCK, SILU=silu, num_warps=WARPS,
            )  # fmt: skip
    return y


def backward(dy, x, weight, bias, past, silu, reverse, needs):
    b, l, e = x.shape
    taps = weight.shape[1]
    dx = x.new_empty(b, l, e)
    before = taps - 1 if needs[1] else 0  # tokens of the past whose gradient is asked for
    dpast = weight.new_empty(b, e, taps - 1) if needs[1] else None
    grid, numbers = _tiles(dx, before + l)
    tiles = triton.cdiv(before + l, ROWS)
    dweight = weight.new_empty(tiles, b, taps + 1, e) if needs[0] else None  # each tile's share, the bias last
    if grid[0]:
        (dy, *dy_steps), (x, *x_steps) = (_from_the_start(t, reverse) for t in (dy, x))
        out, *steps = _from_the_start(dx, reverse)
        with torch.cuda.device_of(dx):
            _backward[grid](
                dy, x, *_tables(weight, bias, past), out, dweight, dpast, *dy_steps, *x_steps, *steps,
                _per_picture(past), *numbers, before, b, TAPS=taps, ROWS=ROWS, BLOCK=BLOCK, SILU=silu, num_warps=WARPS,
            )  # fmt: skip
    return (
        dx, weight.new_empty(0) if dweight is None else dweight.sum((0, 1)), weight.new_empty(0) if dpast is None else dpast
    )  # fmt: skip


for _device in ("CUDA", "CPU") if gpu.interpreted() else ("CUDA",):
    impl(LIB, "conv_triton", _device)(forward)
    impl(LIB, "conv_triton_backward", _device)(backward)


def _tiles(y: Tensor, tokens: int) -> tuple[tuple[int], tuple[int, int, int, int]]:
    """The grid of programs, and what a program needs to find its tile: l, e, tiles of tokens, blocks of channels."""
    b, l, e = y.shape
    tiles, blocks = triton.cdiv(tokens, ROWS), triton.cdiv(e, BLOCK)
    return (b * tiles * blocks,), (l, e, tiles, blocks)


def _tables(*tables: Tensor | None) -> list[Tensor | None]:
    """Dense, and None where there is nothing to read."""
    return [None if t is None or t.numel() == 0 else t.contiguous() for t in tables]


def _per_picture(past: Tensor | None) -> int:
    return 0 if past is None or len(past) == 1 else past.shape[1] * past.shape[2]


def _from_the_start(t: Tensor, reverse: bool) -> tuple[Tensor, int, int]:
    """(b, l, e) -> a view that begins where the convolution does, its strides from picture to picture, step to step."""
    t = t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous()
    return (t[:, -1:], t.stride(0), -t.stride(1)) if reverse else (t, t.stride(0), t.stride(1))


# -- kernels -----------------------------------------------------------------------------------------------------------

# numbers that change from call to call: each value would compile a kernel of its own
NUMBERS = ("dy_b", "dy_l", "x_b", "x_l", "y_b", "y_l", "past_b", "length", "e", "tiles", "blocks", "before", "batch")


@triton.jit(do_not_specialize=NUMBERS)
def _forward(
    x, weight, bias, past, y, x_b, x_l, y_b, y_l, past_b, length, e, tiles, blocks,
    TAPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    picture, tile, channel = _place(tiles, blocks, BLOCK)
    inside = channel < e
    t = tile * ROWS + tl.arange(0, ROWS)
    x += picture * x_b
    if past is not None:
        past += picture * past_b
    pre = _before_activation(x, weight, bias, past, t, x_l, channel, inside, length, TAPS, ROWS, BLOCK)
    if SILU:
        pre *= tl.sigmoid(pre)
    at = t[:, None] * y_l.to(tl.int64) + channel[None, :]
    tl.store(y + picture * y_b + at, pre, mask=(t < length)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=NUMBERS)
def _backward(
    dy, x, weight, bias, past, dx, dweight, dpast, dy_b, dy_l, x_b, x_l, y_b, y_l, past_b, length, e, tiles, blocks,
    before, batch, TAPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    picture, tile, channel = _place(tiles, blocks, BLOCK)
    inside = channel < e
    t = tile * ROWS + tl.arange(0, ROWS) - before
    x += picture * x_b
    dy += picture * dy_b
    if past is not None:
        past += picture * past_b
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for k in tl.static_range(TAPS):  # the last of them is the tile itself
        later = t + (TAPS - 1 - k)
        is_token = ((later >= 0) & (later < length))[:, None] & inside[None, :]
        at = later[:, None] * dy_l.to(tl.int64) + channel[None, :]
        dpre = tl.load(dy + at, mask=is_token, other=0.0).to(tl.float32)
        if SILU:
            pre = _before_activation(x, weight, bias, past, later, x_l, channel, inside, length, TAPS, ROWS, BLOCK)
            open_ = tl.sigmoid(pre)
            dpre *= open_ * (1.0 + pre * (1.0 - open_))
        total += dpre * tl.load(weight + channel * TAPS + k, mask=inside, other=0.0)[None, :]
        if dweight is not None:
            if k == TAPS - 1:
                share = dweight + (tile * batch + picture) * (TAPS + 1) * e + channel
                for j in tl.static_range(TAPS):
                    seen = _seen(x, past, t - (TAPS - 1) + j, x_l, channel, inside, length, TAPS)
                    tl.store(share + j * e, tl.sum(dpre * seen, 0), mask=inside)
                tl.store(share + TAPS * e, tl.sum(dpre, 0), mask=inside)
    at = t[:, None] * y_l.to(tl.int64) + channel[None, :]
    tl.store(dx + picture * y_b + at, total, mask=((t >= 0) & (t < length))[:, None] & inside[None, :])
    if dpast is not None:
        at = (picture * e + channel)[None, :] * (TAPS - 1) + (t + TAPS - 1)[:, None]
        tl.store(dpast + at, total, mask=(t < 0)[:, None] & inside[None, :])


@triton.jit
def _place(tiles, blocks, BLOCK: tl.constexpr):
    """Picture (64 bits: it is multiplied by strides), tile of tokens and the channels of a program."""
    task = tl.program_id(0)
    picture = (task // (tiles * blocks)).to(tl.int64)
    return picture, task // blocks % tiles, task % blocks * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _before_activation(
    x, weight, bias, past, t, x_l, channel, inside, length, TAPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    if bias is not None:
        pre = tl.load(bias + channel, mask=inside, other=0.0)[None, :] + tl.zeros((ROWS, BLOCK), tl.float32)
    else:
        pre = tl.zeros((ROWS, BLOCK), tl.float32)
    for k in tl.static_range(TAPS):
        w = tl.load(weight + channel * TAPS + k, mask=inside, other=0.0)
        pre += w[None, :] * _seen(x, past, t - (TAPS - 1) + k, x_l, channel, inside, length, TAPS)
    return pre


@triton.jit
def _seen(x, past, t, x_l, channel, inside, length, TAPS: tl.constexpr):
    """The inputs at t: tokens, before them the past."""
    is_token = ((t >= 0) & (t < length))[:, None] & inside[None, :]
    seen = tl.load(x + t[:, None] * x_l.to(tl.int64) + channel[None, :], mask=is_token, other=0.0).to(tl.float32)
    if past is not None:
        is_past = ((t < 0) & (t >= 1 - TAPS))[:, None] & inside[None, :]
        seen += tl.load(past + channel[None, :] * (TAPS - 1) + (t + TAPS - 1)[:, None], mask=is_past, other=0.0)
    return seen
