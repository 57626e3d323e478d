"""The scan in Triton, registered as `svp::scan_triton`: time walked in registers, one channel to a thread.

  h_t = exp(delta_t A) h_{t-1} + (delta_t u_t) B_t          delta = softplus(delta + delta_bias)
  y_t = C_t (h_t + offset) + D u_t + bias,   out_t = y_t silu(z_t)

with dy_t = dout_t silu(z_t) and g_t = dL/dh_t:
  g_t   = C_t dy_t + exp(delta_{t+1} A) g_{t+1}
  dx_t  = sum_n g_t B_t                                     x = delta u
  dd_t  = dx_t u_t + sum_n g_t h_{t-1} exp(delta_t A) A
  dB_t  = sum_e g_t x_t,   dC_t = sum_e dy_t (h_t + offset),   dA = sum_t g_t h_{t-1} exp(delta_t A) delta_t

A program is one picture and BLOCK = 32 channels: one warp, each thread its channel with all its states, so that a sum over
states costs no communication and a row of a token is one memory transaction. No program waits for another and none adds to
another's memory: two runs give the same bits.

Forward: all states of a token at once, (N, BLOCK). The rows of ROWS tokens are asked for together, before the recurrence
needs the first. The state before every CHUNK tokens is kept.
Backward: state by state, T tokens at once, all unrolled, so that exp(delta_t A) and h_{t-1} of T tokens stay in registers
between the walk forward and the walk back. Where T < CHUNK, the states before each T tokens are first made again from the
kept one, into scratch. The walk back's g of each state waits in global memory (its end is dh0), as do dA and doffset.

t counts in scan order. Direction is the sign of a row's stride; B, C of the backward are laid out with T neighbours in
time side by side, there it decides from which end they are read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import impl

from svp.ops import gpu
from svp.ops.selective_scan.operator import Wanted, declare, is_recorded, same_groups

T, CHUNK = 8, 16  # tokens that the backward unrolls; tokens between kept states, a multiple of T and of ROWS
ROWS = 2  # tokens whose rows the forward asks for at once
BLOCK = 32  # channels of a program: the lanes of a warp, which `_sums` relies on
# Registers of a thread at most, for as many warps at once as fit without spilling (tests/ops/test_triton.py looks): 16 of
# the forward on a multiprocessor, 9 of the backward; 8 of either with more to keep.
FORWARD, BACKWARD, MOST = 128, 224, 255
HALF = (torch.float32, torch.bfloat16, torch.float16)  # are read as they are


def missing() -> str | None:
    return gpu.missing()


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, h0: Tensor | None, offset: Tensor | None, bias: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the reference, but for constant B or C."""
    B, C = same_groups(B, C)
    delta, B, C, z = (t if t is None or t.dtype in HALF else t.float() for t in (delta, B, C, z))
    A, D, delta_bias, h0, offset, bias = (
        None if t is None else t.float() for t in (A, D, delta_bias, h0, offset, bias)
    )
    inputs = u, delta, A, B, C, D, z, delta_bias, h0, offset, bias
    y, last, _ = torch.ops.svp.scan_triton(*inputs, delta_softplus, reverse, is_recorded(*inputs))
    return y, last


# -- the op ------------------------------------------------------------------------------------------------------------


def saved_shape(u: Tensor, A: Tensor, B: Tensor) -> tuple[int, ...]:
    """(b, chunks, n, e): the state before each CHUNK tokens in scan order."""
    b, l, e = u.shape
    return b, triton.cdiv(l, CHUNK), A.shape[1], e


LIB = declare("scan_triton", saved_shape)


def forward(u, delta, A, B, C, D, z, delta_bias, h0, offset, bias, softplus, reverse, save):
    b, l, e = u.shape
    n, groups = A.shape[1], B.shape[2]
    y, last = u.new_empty(b, l, e), A.new_empty(b, e, n)
    states = A.new_empty(saved_shape(u, A, B) if save else (0,))
    blocks = triton.cdiv(e // groups, BLOCK)
    if y.numel() == 0:
        last.zero_() if h0 is None else last.copy_(h0.expand(b, e, n))
        return y, last, states
    ends = [_from_the_start(t, reverse) for t in (u, delta, z, y)]
    rows, strides = [t for t, *_ in ends], [number for _, *two in ends for number in two]
    B, C = (t if t.stride(3) == 1 else t.contiguous() for t in (B, C))
    wide = [_wide(t) for t in (B, C)]
    B, C = (t[:, -1:] if reverse else t for t in (B, C))
    with torch.cuda.device_of(u):
        _forward[(b * groups * blocks,)](
            rows[0], rows[1], A.contiguous(), B, C, *map(_dense, (D, delta_bias, h0, offset, bias)), rows[2], rows[3],
            last, states if save else None, *strides, *_steps(B, reverse, wide[0]), *_steps(C, reverse, wide[1]),
            0 if h0 is None or len(h0) == 1 else e * n, l, groups, e // groups, blocks, n, 1,
            n=n, N=triton.next_power_of_2(n), BLOCK=BLOCK, ROWS=ROWS, CHUNK=CHUNK, B_WIDE=wide[0], C_WIDE=wide[1],
            SOFTPLUS=softplus, num_warps=max(1, triton.next_power_of_2(n) // 64),
            maxnreg=FORWARD if z is None and offset is None and n <= 16 else MOST,
        )  # fmt: skip
    return y, last, states


def backward(dy, dlast, states, u, delta, A, B, C, D, z, delta_bias, h0, offset, bias, softplus, reverse, needs):
    b, l, e = u.shape
    n, groups, wanted = A.shape[1], B.shape[2], Wanted(*needs)
    blocks, padded = triton.cdiv(e // groups, BLOCK), triton.cdiv(l, T) * T
    du, ddelta, dz = u.new_empty(b, l, e), delta.new_empty(b, l, e), None if z is None else z.new_empty(b, l, e)
    dB, dC = (A.new_empty(blocks, b, groups, n, padded) for _ in "BC")  # each block's share
    dh = A.new_zeros(b, n, e)
    if dlast is not None:
        dh.copy_(dlast.mT)
    dA, doffset = (
        A.new_zeros(b, n, e) if asked else None for asked in (wanted.A, wanted.offset)
    )  # each picture's share
    dD, ddelta_bias, dbias = (
        A.new_zeros(b, e) if asked else None for asked in (wanted.D, wanted.delta_bias, wanted.bias)
    )
    if du.numel() > 0:
        scratch = A.new_empty(b, CHUNK // T - 1, n, e)
        ends = [_from_the_start(t, reverse) for t in (dy, u, delta, z, du, ddelta, dz)]
        rows, strides = [t for t, *_ in ends], [number for _, *two in ends[:5] for number in two]
        with torch.cuda.device_of(u):
            _backward[(b * groups * blocks,)](
                *rows[:4], states, A.T.contiguous(), _by_state(B, padded, reverse), _by_state(C, padded, reverse),
                *map(_dense, (D, delta_bias, None if offset is None else offset.T, bias)), *rows[4:], dB, dC, dA, dD,
                ddelta_bias, dh, doffset, dbias, scratch, *strides, l, b, groups, e // groups, blocks,
                n=n, T=T, CHUNK=CHUNK, BLOCK=BLOCK, SOFTPLUS=softplus, DIRECTION=-1 if reverse else 1,
                num_warps=1, maxnreg=BACKWARD if z is None else MOST,
            )  # fmt: skip
    else:
        dB, dC = dB.zero_(), dC.zero_()

    def summed(t: Tensor | None) -> Tensor:
        return A.new_empty(0) if t is None else t.sum(0)

    def turned(t: Tensor | None) -> Tensor:  # (b, n, e) -> (e, n)
        return A.new_empty(0) if t is None else t.sum(0).T.contiguous()

    def in_rows(t: Tensor, like: Tensor) -> Tensor:
        kept = t.sum(0)[..., padded - l :] if reverse else t.sum(0)[..., :l]
        return like.new_empty(like.shape).copy_(kept.permute(0, 3, 1, 2))

    return (
        du, ddelta, turned(dA), in_rows(dB, B), in_rows(dC, C), summed(dD), u.new_empty(0) if dz is None else dz,
        summed(ddelta_bias), dh.mT.contiguous() if wanted.h0 else A.new_empty(0), turned(doffset), summed(dbias),
    )  # fmt: skip


for _device in ("CUDA", "CPU") if gpu.interpreted() else ("CUDA",):
    impl(LIB, "scan_triton", _device)(forward)
    impl(LIB, "scan_triton_backward", _device)(backward)


def _from_the_start(t: Tensor | None, reverse: bool) -> tuple[Tensor | None, int, int]:
    """(b, l, e) -> a view that begins where the scan does, and its strides from picture to picture and step to step."""
    if t is None:
        return None, 0, 0
    t = t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous()
    return (t[:, -1:], t.stride(0), -t.stride(1)) if reverse else (t, t.stride(0), t.stride(1))


def _steps(B: Tensor, reverse: bool, wide: int) -> tuple[int, int, int]:
    """Strides of (b, l, g, n) in units of `wide` entries, which so stays known to the compiler."""
    return B.stride(0) // wide, (-B.stride(1) if reverse else B.stride(1)) // wide, B.stride(2) // wide


def _wide(B: Tensor) -> int:
    """How many states can be loaded by one instruction (16 bytes): as many as divide every stride; else 1."""
    most = 16 // B.element_size()
    return most if B.data_ptr() % 16 == 0 and all(stride % most == 0 for stride in B.stride()[:3]) else 1


def _by_state(B: Tensor, padded: int, reverse: bool) -> Tensor:
    """(b, l, g, n) -> (b, g, n, padded) in float32, with zeros after the last step of the scan."""
    b, l, g, n = B.shape
    turned = B.new_zeros(b, g, n, padded, dtype=torch.float32)
    (turned[..., padded - l :] if reverse else turned[..., :l]).copy_(B.permute(0, 2, 3, 1))
    return turned


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


# -- kernels -----------------------------------------------------------------------------------------------------------

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
# Numbers that change from call to call would each compile a kernel of their own. And a stride of 1 that the compiler
# knows makes it load several channels by a thread: then a channel's states lie in several threads.
NUMBERS = (
    "dy_b", "dy_l", "u_b", "u_l", "delta_b", "delta_l", "z_b", "z_l", "y_b", "y_l", "B_b", "B_l", "B_g", "C_b", "C_l", "C_g",
    "h0_b", "length", "batch", "groups", "size", "blocks", "per_channel", "per_state",
)  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def _forward(
    u, delta, A, B, C, D, delta_bias, h0, offset, bias, z, y, last, states,
    u_b, u_l, delta_b, delta_l, z_b, z_l, y_b, y_l, B_b, B_l, B_g, C_b, C_l, C_g, h0_b,
    length, groups, size, blocks, per_channel, per_state,
    n: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    B_WIDE: tl.constexpr, C_WIDE: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    picture, group, block = _place(groups, blocks)
    e = groups * size
    inside = block * BLOCK + tl.arange(0, BLOCK) < size
    channel = group * size + block * BLOCK + tl.arange(0, BLOCK)
    state = tl.arange(0, N)
    both = (state < n)[:, None] & inside[None, :]
    table = channel[None, :] * per_channel + state[:, None] * per_state  # of (e, n)
    u += picture * u_b
    delta += picture * delta_b
    y += picture * y_b
    B += (picture * B_b + group * B_g) * B_WIDE
    C += (picture * C_b + group * C_g) * C_WIDE
    u_l, delta_l, z_l, y_l = u_l.to(tl.int64), delta_l.to(tl.int64), z_l.to(tl.int64), y_l.to(tl.int64)
    B_l, C_l = B_l.to(tl.int64) * B_WIDE, C_l.to(tl.int64) * C_WIDE
    if z is not None:
        z += picture * z_b
    if states is not None:
        states += picture * tl.cdiv(length, CHUNK) * n * e
        kept = state[:, None] * e + channel[None, :] * per_state  # of (n, e)

    A2 = _rate(tl.load(A + table, mask=both, other=0.0))
    if h0 is not None:
        h = tl.load(h0 + picture * h0_b + table, mask=both, other=0.0)
    else:
        h = tl.zeros((N, BLOCK), tl.float32)
    if offset is not None:
        off = tl.load(offset + table, mask=both, other=0.0)
    skip = _constants(D, channel, inside, BLOCK)
    step = _constants(delta_bias, channel, inside, BLOCK)
    shift = _constants(bias, channel, inside, BLOCK)

    for start in range(0, length, ROWS):
        if states is not None:
            if start % CHUNK == 0:
                tl.store(states + (start // CHUNK) * n * e.to(tl.int64) + kept, h, mask=both)
        us, ds, zs, ys = (), (), (), ()
        for t in tl.static_range(ROWS):
            here = inside & (start + t < length)
            us = us + (tl.load(u + (start + t) * u_l + channel, mask=here, other=0.0).to(tl.float32),)
            ds = ds + (tl.load(delta + (start + t) * delta_l + channel, mask=here, other=0.0).to(tl.float32),)
            if z is not None:
                zs = zs + (tl.load(z + (start + t) * z_l + channel, mask=here, other=0.0).to(tl.float32),)
        for t in tl.static_range(ROWS):
            is_token = start + t < length
            d = _step(ds[t], step, is_token, SOFTPLUS)
            known = is_token & (state < n)
            b = tl.load(B + (start + t) * B_l + state, mask=known, other=0.0).to(tl.float32)
            c = tl.load(C + (start + t) * C_l + state, mask=known, other=0.0).to(tl.float32)
            h = tl.exp2(d[None, :] * A2) * h + (d * us[t])[None, :] * b[:, None]
            read = h
            if offset is not None:
                read = h + off
            out = tl.sum(read * c[:, None], 0) + skip * us[t] + shift
            if z is not None:
                out *= zs[t] * tl.sigmoid(zs[t])
            ys = ys + (out,)
        for t in tl.static_range(ROWS):
            tl.store(y + (start + t) * y_l + channel, ys[t], mask=inside & (start + t < length))
    tl.store(last + picture * n * e + table, h, mask=both)


@triton.jit(do_not_specialize=NUMBERS)
def _backward(
    dy, u, delta, z, states, A, B, C, D, delta_bias, offset, bias,
    du, ddelta, dz, dB, dC, dA, dD, ddelta_bias, dh, doffset, dbias, scratch,
    dy_b, dy_l, u_b, u_l, delta_b, delta_l, z_b, z_l, y_b, y_l, length, batch, groups, size, blocks,
    n: tl.constexpr, T: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, SOFTPLUS: tl.constexpr,
    DIRECTION: tl.constexpr,
):  # fmt: skip
    picture, group, block = _place(groups, blocks)
    e = groups * size
    lane = tl.arange(0, BLOCK)
    is_first = lane % (BLOCK // T) == 0  # of the lanes with a token's sum
    inside = block * BLOCK + lane < size
    channel = group * size + block * BLOCK + lane
    padded = tl.cdiv(length, T) * T
    dy_l, u_l, delta_l = dy_l.to(tl.int64), u_l.to(tl.int64), delta_l.to(tl.int64)
    z_l, y_l = z_l.to(tl.int64), y_l.to(tl.int64)
    dy += picture * dy_b
    u += picture * u_b
    delta += picture * delta_b
    du += picture * y_b
    ddelta += picture * y_b
    B += (picture * groups + group) * n * padded
    C += (picture * groups + group) * n * padded
    share = ((block.to(tl.int64) * batch + picture) * groups + group) * n * padded
    dB += share
    dC += share
    states += picture * tl.cdiv(length, CHUNK) * n * e + channel
    scratch += picture * (CHUNK // T - 1) * n * e + channel
    table = picture * n * e + channel  # of (b, n, e)
    dh += table
    if dA is not None:
        dA += table
    if doffset is not None:
        doffset += table
    if z is not None:
        z += picture * z_b
        dz += picture * y_b
    skip = _constants(D, channel, inside, BLOCK)
    step = _constants(delta_bias, channel, inside, BLOCK)
    shift = _constants(bias, channel, inside, BLOCK)
    sum_D, sum_step, sum_shift = _zeros(3, BLOCK)

    for back in range(padded // T):
        start = padded - T - back * T  # of the T tokens now walked back
        chunk = start // CHUNK
        here_in = (start - chunk * CHUNK) // T  # how many T lie between the kept state and them
        if T < CHUNK:
            if start + T >= tl.minimum((chunk + 1) * CHUNK, padded):  # the first visit to this chunk
                for piece in range(here_in):
                    at = chunk * CHUNK + piece * T
                    ds, xs = _steps_and_inputs(delta, u, at, delta_l, u_l, step, channel, inside, length, T, SOFTPLUS)
                    for s in range(n):
                        A2 = _rate(tl.load(A + s * e + channel, mask=inside, other=0.0))
                        if piece == 0:
                            h = tl.load(states + (chunk.to(tl.int64) * n + s) * e, mask=inside, other=0.0)
                        else:
                            h = tl.load(scratch + ((piece - 1) * n + s) * e, mask=inside, other=0.0)
                        Bs = B + s * padded + (at if DIRECTION > 0 else padded - 1 - at)
                        for t in tl.static_range(T):
                            h = tl.exp2(ds[t] * A2) * h + xs[t] * tl.load(Bs + t * DIRECTION)
                        tl.store(scratch + (piece * n + s) * e, h, mask=inside)
                tl.debug_barrier()

        ds, xs = _steps_and_inputs(delta, u, start, delta_l, u_l, step, channel, inside, length, T, SOFTPLUS)
        dys, ys = (), ()
        for t in tl.static_range(T):
            here = inside & (start + t < length)
            out = tl.load(dy + (start + t) * dy_l + channel, mask=here, other=0.0).to(tl.float32)
            if z is not None:
                gate = tl.load(z + (start + t) * z_l + channel, mask=here, other=0.0).to(tl.float32)
                out *= gate * tl.sigmoid(gate)
                x = tl.load(u + (start + t) * u_l + channel, mask=here, other=0.0).to(tl.float32)
                ys = ys + (skip * x + shift,)
            dys = dys + (out,)
        dxs, dds = _zeros(T, BLOCK), _zeros(T, BLOCK)
        first = start if DIRECTION > 0 else padded - 1 - start
        for s in range(n):
            Bs, Cs = B + s * padded + first, C + s * padded + first
            A2 = _rate(tl.load(A + s * e + channel, mask=inside, other=0.0))
            g = tl.load(dh + s * e, mask=inside, other=0.0)
            if here_in == 0:
                h = tl.load(states + (chunk.to(tl.int64) * n + s) * e, mask=inside, other=0.0)
            else:
                h = tl.load(scratch + ((here_in - 1) * n + s) * e, mask=inside, other=0.0)
            if offset is not None:
                off = tl.load(offset + s * e + channel, mask=inside, other=0.0)
            if doffset is not None:
                sum_offset = tl.load(doffset + s * e, mask=inside, other=0.0)
            if dA is not None:
                sum_A = tl.load(dA + s * e, mask=inside, other=0.0)
            forgets, befores, parts, new_ys = (), (), (), ()
            for t in tl.static_range(T):  # forward in time
                forget = tl.exp2(ds[t] * A2)
                forgets = forgets + (forget,)
                befores = befores + (h,)
                h = forget * h + xs[t] * tl.load(Bs + t * DIRECTION)
                read = h
                if offset is not None:
                    read = h + off
                parts = parts + (dys[t] * read,)
                if z is not None:
                    new_ys = new_ys + (ys[t] + read * tl.load(Cs + t * DIRECTION),)
            if z is not None:
                ys = new_ys
            tl.store(dC + s * padded + first + lane // (BLOCK // T) * DIRECTION, _sums(parts, lane), mask=is_first)
            parts, new_dxs, new_dds = (), (), ()
            for t in tl.static_range(T - 1, -1, -1):  # and back
                c = tl.load(Cs + t * DIRECTION)
                g += dys[t] * c
                parts = (g * xs[t],) + parts
                new_dxs = (dxs[t] + g * tl.load(Bs + t * DIRECTION),) + new_dxs
                g *= forgets[t]
                gh = g * befores[t]
                new_dds = (dds[t] + gh * A2,) + new_dds
                if doffset is not None:
                    sum_offset += dys[t] * c
                if dA is not None:
                    sum_A += gh * ds[t]
            dxs, dds = new_dxs, new_dds
            tl.store(dB + s * padded + first + lane // (BLOCK // T) * DIRECTION, _sums(parts, lane), mask=is_first)
            tl.store(dh + s * e, g, mask=inside)
            if doffset is not None:
                tl.store(doffset + s * e, sum_offset, mask=inside)
            if dA is not None:
                tl.store(dA + s * e, sum_A, mask=inside)
        for t in tl.static_range(T):
            here = inside & (start + t < length)
            x = tl.load(u + (start + t) * u_l + channel, mask=here, other=0.0).to(tl.float32)
            dd = dxs[t] * x + dds[t] * LN2  # A2 holds log2(e)
            if SOFTPLUS:
                dd *= tl.sigmoid(
                    tl.load(delta + (start + t) * delta_l + channel, mask=here, other=0.0).to(tl.float32) + step
                )
            tl.store(du + (start + t) * y_l + channel, dxs[t] * ds[t] + skip * dys[t], mask=here)
            tl.store(ddelta + (start + t) * y_l + channel, dd, mask=here)
            if z is not None:
                gate = tl.load(z + (start + t) * z_l + channel, mask=here, other=0.0).to(tl.float32)
                open_ = tl.sigmoid(gate)
                slope = open_ * (1.0 + gate * (1.0 - open_))  # silu'
                tl.store(
                    dz + (start + t) * y_l + channel,
                    ys[t] * slope * tl.load(dy + (start + t) * dy_l + channel, mask=here, other=0.0).to(tl.float32),
                    mask=here,
                )
            if dD is not None:
                sum_D += dys[t] * x
            if ddelta_bias is not None:
                sum_step += tl.where(here, dd, 0.0)
            if dbias is not None:
                sum_shift += dys[t]
        tl.debug_barrier()  # dh, dA, doffset and scratch are read again
    if dD is not None:
        tl.store(dD + picture * e + channel, sum_D, mask=inside)
    if ddelta_bias is not None:
        tl.store(ddelta_bias + picture * e + channel, sum_step, mask=inside)
    if dbias is not None:
        tl.store(dbias + picture * e + channel, sum_shift, mask=inside)


@triton.jit
def _place(groups, blocks):
    """Which picture (64 bits: it is multiplied by strides), group of channels and block of the group a program has."""
    task = tl.program_id(0)
    return (task // (groups * blocks)).to(tl.int64), task // blocks % groups, task % blocks


@triton.jit
def _steps_and_inputs(
    delta, u, start, delta_l, u_l, step, channel, inside, length, T: tl.constexpr, SOFTPLUS: tl.constexpr
):
    """delta_t and delta_t u_t of T tokens: all rows are asked for before the first is used."""
    raw, us, ds, xs = (), (), (), ()
    for t in tl.static_range(T):
        here = inside & (start + t < length)
        raw = raw + (tl.load(delta + (start + t) * delta_l + channel, mask=here, other=0.0).to(tl.float32),)
        us = us + (tl.load(u + (start + t) * u_l + channel, mask=here, other=0.0).to(tl.float32),)
    for t in tl.static_range(T):
        d = _step(raw[t], step, start + t < length, SOFTPLUS)
        ds = ds + (d,)
        xs = xs + (d * us[t],)
    return ds, xs


@triton.jit
def _step(raw, step, is_token, SOFTPLUS: tl.constexpr):
    """delta; 0 beyond the last token, which leaves the state as it is."""
    d = raw + step
    if SOFTPLUS:
        d = _softplus(d)
    return tl.where(is_token, d, 0.0)


@triton.jit
def _softplus(x):
    """max(x, 0) + log(1 + w): by the series of atanh(w / (2 + w)), exact for small w, where log(1 + w) is not."""
    w = tl.exp(-tl.abs(x))
    s = w / (2.0 + w)  # at most 1/3
    q = s * s
    p = q / 15.0 + 1.0 / 13.0
    p = p * q + 1.0 / 11.0
    p = p * q + 1.0 / 9.0
    p = p * q + 1.0 / 7.0
    p = p * q + 1.0 / 5.0
    p = p * q + 1.0 / 3.0
    return tl.maximum(x, 0.0) + 2.0 * s * (p * q + 1.0)


@triton.jit
def _rate(A):
    """A log2(e), for exp2; bounded, since an infinite one would make NaN of a step that is 0."""
    A2 = A * LOG2E
    return tl.where(A2 < -1e30, -1e30, A2)


@triton.jit
def _constants(p, channel, inside, BLOCK: tl.constexpr):
    if p is not None:
        return tl.load(p + channel, mask=inside, other=0.0)
    else:
        return tl.zeros((BLOCK,), tl.float32)


@triton.jit
def _zeros(count: tl.constexpr, BLOCK: tl.constexpr):
    out = ()
    for _ in tl.static_range(count):
        out = out + (tl.zeros((BLOCK,), tl.float32),)
    return out


@triton.jit
def _sums(parts, lane):
    """T vectors of 32 lanes -> their sums, the t-th in lanes 32/T t and following.

    Summing each by itself takes 5 exchanges between lanes. Here halves of the lanes take over halves of the vectors, so
    that the first exchange serves two vectors, the second four: 9 exchanges for 8 vectors instead of 40.
    """
    for level in tl.static_range(5):
        parts = _folded(parts, lane, 16 >> level)
    return parts[0]


@triton.jit
def _folded(parts, lane, BIT: tl.constexpr):
    half: tl.constexpr = len(parts) // 2
    out = ()
    if half == 0:
        out = (parts[0] + tl.gather(parts[0], lane ^ BIT, 0),)
    else:
        high = (lane & BIT) != 0
        for i in tl.static_range(half):
            kept = tl.where(high, parts[i + half], parts[i])
            given = tl.where(high, parts[i], parts[i + half])
            out = out + (kept + tl.gather(given, lane ^ BIT, 0),)
    return out
