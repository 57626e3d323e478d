"""The convolution in Triton, registered as `svp::conv_triton`.

  pre_t = bias + sum_k w_k x_{t - (taps - 1) + k},   y_t = silu(pre_t)

with dpre_t = dy_t silu'(pre_t):
  dx_s = sum_k w_k dpre_{s + (taps - 1) - k}, for s < 0 that of the past;   dw_k = sum_t dpre_t x_{t - (taps - 1) + k}

A program is one warp: it walks over SPAN tokens of one picture and BLOCK channels, the last taps - 1 tokens in registers,
so that each number is read once. ROWS rows are asked for together. The backward makes pre again, and walks taps - 1 tokens
further than it writes: those look back on its own. t counts in scan order, direction is the sign of a row's stride. Every
program writes a share of the weight's gradient of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import impl

from svp.ops import gpu
from svp.ops.causal_conv1d.operator import declare

SPAN, ROWS, BLOCK = 32, 4, 64  # tokens of a program, rows asked for together, channels


def missing() -> str | None:
    return gpu.missing()


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, past: Tensor | None, reverse: bool) -> Tensor:
    """As the reference."""
    weight, bias, past = (None if t is None else t.float() for t in (weight, bias, past))
    return torch.ops.svp.conv_triton(x, weight, bias, past, silu, reverse)


# -- the op ------------------------------------------------------------------------------------------------------------

LIB = declare("conv_triton")


def forward(x, weight, bias, past, silu, reverse):
    y = x.new_empty(x.shape)
    grid, numbers = _spans(y)
    if grid[0]:
        wide, ends = _from_the_start((x, y), reverse)
        with torch.cuda.device_of(y):
            _forward[grid](
                *(t for t, *_ in ends), *_tables(weight, bias, past), *(number for _, *two in ends for number in two),
                _per_picture(past), *numbers,
                TAPS=weight.shape[1], SPAN=SPAN, ROWS=ROWS, BLOCK=BLOCK, WIDE=wide, SILU=silu, num_warps=1,
            )  # fmt: skip
    return y


def backward(dy, x, weight, bias, past, silu, reverse, needs):
    b, _, e = x.shape
    taps = weight.shape[1]
    dx = x.new_empty(x.shape)
    dpast = weight.new_zeros(b, e, taps - 1) if needs[1] else None
    grid, numbers = _spans(dx)
    dweight = weight.new_empty(numbers[2], b, taps + 1, e) if needs[0] else None  # each span's share, the bias last
    if grid[0]:
        wide, ends = _from_the_start((dy, x, dx), reverse)
        with torch.cuda.device_of(dx):
            _backward[grid](
                *(t for t, *_ in ends), *_tables(weight, bias, past), dweight, dpast,
                *(number for _, *two in ends for number in two), _per_picture(past), *numbers, b,
                TAPS=taps, SPAN=SPAN, ROWS=ROWS, BLOCK=BLOCK, WIDE=wide, SILU=silu, num_warps=1,
            )  # fmt: skip
    return (
        dx, weight.new_empty(0) if dweight is None else dweight.sum((0, 1)), weight.new_empty(0) if dpast is None else dpast
    )  # fmt: skip


for _device in ("CUDA", "CPU") if gpu.interpreted() else ("CUDA",):
    impl(LIB, "conv_triton", _device)(forward)
    impl(LIB, "conv_triton_backward", _device)(backward)


def _spans(y: Tensor) -> tuple[tuple[int], tuple[int, int, int, int]]:
    """The grid of programs, and what a program needs to find its place: l, e, spans of tokens, blocks of channels."""
    b, l, e = y.shape
    spans, blocks = triton.cdiv(l, SPAN), triton.cdiv(e, BLOCK)
    return (b * spans * blocks,), (l, e, spans, blocks)


def _tables(weight: Tensor, bias: Tensor | None, past: Tensor | None) -> list[Tensor | None]:
    """Channels side by side, and None where there is nothing to read: (taps, e), (e,), (1|b, taps - 1, e)."""
    past = None if past is None or past.numel() == 0 else past.mT.contiguous()
    return [weight.T.contiguous(), None if bias is None else bias.contiguous(), past]


def _per_picture(past: Tensor | None) -> int:
    return 0 if past is None or len(past) == 1 else past.shape[1] * past.shape[2]


def _from_the_start(tensors: tuple[Tensor, ...], reverse: bool) -> tuple[int, list[tuple[Tensor, int, int]]]:
    """Views that begin where the convolution does, with their strides from picture to picture and step to step.

    Strides are in units of as many entries as divide all of them and can be loaded by one instruction (16 bytes), which
    so stays known to the compiler; the number comes first.
    """
    tensors = tuple(t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous() for t in tensors)
    wide = 16 // min(t.element_size() for t in tensors)
    if any(t.data_ptr() % 16 or t.stride(0) % wide or t.stride(1) % wide for t in tensors):
        wide = 1
    ends = [(t[:, -1:], -t.stride(1)) if reverse else (t, t.stride(1)) for t in tensors]
    return wide, [(t, t.stride(0) // wide, step // wide) for t, step in ends]


# -- kernels -----------------------------------------------------------------------------------------------------------

# numbers that change from call to call: each value would compile a kernel of its own
NUMBERS = ("dy_b", "dy_l", "x_b", "x_l", "y_b", "y_l", "past_b", "length", "e", "spans", "blocks", "batch")


@triton.jit(do_not_specialize=NUMBERS)
def _forward(
    x, y, weight, bias, past, x_b, x_l, y_b, y_l, past_b, length, e, spans, blocks,
    TAPS: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    picture, span, channel = _place(spans, blocks, BLOCK)
    inside = channel < e
    first = span * SPAN
    x += picture * x_b * WIDE + channel
    y += picture * y_b * WIDE + channel
    x_l, y_l = x_l.to(tl.int64) * WIDE, y_l.to(tl.int64) * WIDE
    if past is not None:
        past += picture * past_b
    shift, taps = _constants(weight, bias, channel, inside, e, TAPS, BLOCK)
    seen = _before(x, past, first, x_l, channel, inside, e, TAPS)
    for start in range(first, tl.minimum(first + SPAN, length), ROWS):
        rows = _rows(x, start, x_l, inside, length, ROWS)
        for r in tl.static_range(ROWS):
            pre, seen = _walked(seen, rows[r].to(tl.float32), shift, taps, TAPS)
            if SILU:
                pre *= tl.sigmoid(pre)
            tl.store(y + (start + r) * y_l, pre, mask=inside & (start + r < length))


@triton.jit(do_not_specialize=NUMBERS)
def _backward(
    dy, x, dx, weight, bias, past, dweight, dpast, dy_b, dy_l, x_b, x_l, y_b, y_l, past_b, length, e, spans, blocks, batch,
    TAPS: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    picture, span, channel = _place(spans, blocks, BLOCK)
    inside = channel < e
    first, end = span * SPAN, tl.minimum(span * SPAN + SPAN, length)
    dy += picture * dy_b * WIDE + channel
    x += picture * x_b * WIDE + channel
    dx += picture * y_b * WIDE + channel
    dy_l, x_l, y_l = dy_l.to(tl.int64) * WIDE, x_l.to(tl.int64) * WIDE, y_l.to(tl.int64) * WIDE
    if past is not None:
        past += picture * past_b
    shift, taps = _constants(weight, bias, channel, inside, e, TAPS, BLOCK)
    seen = _before(x, past, first, x_l, channel, inside, e, TAPS)
    dpres, dtaps = (), ()  # of the last taps - 1 tokens; sums
    for _ in tl.static_range(TAPS - 1):
        dpres = dpres + (tl.zeros((BLOCK,), tl.float32),)
    for _ in tl.static_range(TAPS):
        dtaps = dtaps + (tl.zeros((BLOCK,), tl.float32),)
    dshift = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, end + TAPS - 1, ROWS):
        rows, above = _rows(x, start, x_l, inside, length, ROWS), _rows(dy, start, dy_l, inside, length, ROWS)
        for r in tl.static_range(ROWS):
            t = start + r
            row, before = rows[r].to(tl.float32), seen
            pre, seen = _walked(seen, row, shift, taps, TAPS)
            dpre = above[r].to(tl.float32)
            if SILU:
                open_ = tl.sigmoid(pre)
                dpre *= open_ * (1.0 + pre * (1.0 - open_))
            if dweight is not None:
                ours = tl.where(t < end, dpre, 0.0)
                sums = ()
                for k in tl.static_range(TAPS - 1):
                    sums = sums + (dtaps[k] + ours * before[k],)
                dtaps = sums + (dtaps[TAPS - 1] + ours * row,)
                dshift += ours
            total = taps[0] * dpre  # of the token taps - 1 steps back
            for k in tl.static_range(1, TAPS):
                total += taps[k] * dpres[TAPS - 1 - k]
            at = t - (TAPS - 1)
            tl.store(dx + at * y_l, total, mask=inside & (at >= first) & (at < end))
            if dpast is not None:
                mask = inside & (at < 0) & (first == 0)
                tl.store(dpast + (picture * e + channel) * (TAPS - 1) + at + TAPS - 1, total, mask=mask)
            new = ()
            for k in tl.static_range(1, TAPS - 1):
                new = new + (dpres[k],)
            if TAPS > 1:
                new = new + (dpre,)
            dpres = new
    if dweight is not None:
        share = dweight + (span * batch + picture) * (TAPS + 1) * e + channel
        for k in tl.static_range(TAPS):
            tl.store(share + k * e, dtaps[k], mask=inside)
        tl.store(share + TAPS * e, dshift, mask=inside)


@triton.jit
def _place(spans, blocks, BLOCK: tl.constexpr):
    """Picture (64 bits: it is multiplied by strides), span of tokens and the channels of a program."""
    task = tl.program_id(0)
    picture = (task // (spans * blocks)).to(tl.int64)
    return picture, task // blocks % spans, task % blocks * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _constants(weight, bias, channel, inside, e, TAPS: tl.constexpr, BLOCK: tl.constexpr):
    """The bias and each tap of the channels."""
    taps = ()
    for k in tl.static_range(TAPS):
        taps = taps + (tl.load(weight + k * e + channel, mask=inside, other=0.0),)
    if bias is not None:
        return tl.load(bias + channel, mask=inside, other=0.0), taps
    else:
        return tl.zeros((BLOCK,), tl.float32), taps


@triton.jit
def _before(x, past, first, x_l, channel, inside, e, TAPS: tl.constexpr):
    """The taps - 1 inputs before a span: tokens, before the first token the past."""
    seen = ()
    for k in tl.static_range(TAPS - 1):
        t = first - (TAPS - 1) + k
        row = tl.load(x + t * x_l, mask=inside & (t >= 0), other=0.0).to(tl.float32)
        if past is not None:
            row += tl.load(past + (t + TAPS - 1) * e + channel, mask=inside & (t < 0), other=0.0)
        seen = seen + (row,)
    return seen


@triton.jit
def _rows(x, start, x_l, inside, length, ROWS: tl.constexpr):
    rows = ()
    for r in tl.static_range(ROWS):
        rows = rows + (tl.load(x + (start + r) * x_l, mask=inside & (start + r < length), other=0.0),)
    return rows


@triton.jit
def _walked(seen, row, shift, taps, TAPS: tl.constexpr):
    """The sum at a token, and the inputs that the next one looks back on."""
    pre = shift + taps[TAPS - 1] * row
    new = ()
    for k in tl.static_range(TAPS - 1):
        pre += taps[k] * seen[k]
        if k > 0:
            new = new + (seen[k],)
    if TAPS > 1:
        new = new + (row,)
    return pre, new
