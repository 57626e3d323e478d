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

A GPU hides the latency of memory behind other warps, of which too few fit beside so many registers: so what the next round
reads is asked for before this one is computed.
Forward: all states of a token at once, (N, BLOCK). The state before every T tokens is kept.
Backward: state by state, T tokens at once, all unrolled, so that exp(delta_t A) and h_{t-1} of T tokens stay in registers
between the walk forward and the walk back. The walk back's g of each state waits in global memory (its end is dh0), as do
dA and doffset.

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

T = 8  # tokens that the backward unrolls, and between kept states
BLOCK = 32  # channels of a program: the lanes of a warp, which `_sums` relies on
# Registers of a thread at most: of the forward, of the backward of a frozen backbone, of one with sums beside it, of
# either with more to keep. On an H200 16 warps of the backward on a multiprocessor beat fewer with more registers
# (0.68 ms; 9 warps 0.94); none of them spills there (tests/ops/test_triton.py looks), on older GPUs a few numbers do.
FORWARD, BACKWARD, SUMS, MOST = 112, 128, 168, 255
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
    """(b, pieces, n, e): the state before each T tokens in scan order."""
    b, l, e = u.shape
    return b, triton.cdiv(l, T), A.shape[1], e


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
            rows[0], rows[1], A.T.contiguous(), B, C,
            *map(_dense, (D, delta_bias, None if h0 is None else h0.mT, None if offset is None else offset.T, bias)),
            rows[2], rows[3],
            last, states if save else None, *strides, *_steps(B, reverse, wide[0]), *_steps(C, reverse, wide[1]),
            0 if h0 is None or len(h0) == 1 else e * n, l, groups, e // groups, blocks, 1,
            n=n, N=triton.next_power_of_2(n), BLOCK=BLOCK, T=T, B_WIDE=wide[0], C_WIDE=wide[1],
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
        ends = [_from_the_start(t, reverse) for t in (dy, u, delta, z, du, ddelta, dz)]
        rows, strides = [t for t, *_ in ends], [number for _, *two in ends[:5] for number in two]
        with torch.cuda.device_of(u):
            _backward[(b * groups * blocks,)](
                *rows[:4], states, A.T.contiguous(), _by_state(B, padded, reverse), _by_state(C, padded, reverse),
                *map(_dense, (D, delta_bias, None if offset is None else offset.T, bias)), *rows[4:], dB, dC, dA, dD,
                ddelta_bias, dh, doffset, dbias, *strides, l, b, groups, e // groups, blocks,
                n=n, T=T, BLOCK=BLOCK, SOFTPLUS=softplus, DIRECTION=-1 if reverse else 1,
                num_warps=1, maxnreg=MOST if z is not None else SUMS if any(needs) else BACKWARD,
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
# Numbers that change from call to call would each compile a kernel of their own.
NUMBERS = (
    "dy_b", "dy_l", "u_b", "u_l", "delta_b", "delta_l", "z_b", "z_l", "y_b", "y_l", "B_b", "B_l", "B_g", "C_b", "C_l", "C_g",
    "h0_b", "length", "batch", "groups", "size", "blocks", "one",
)  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def _forward(
    u, delta, A, B, C, D, delta_bias, h0, offset, bias, z, y, last, states,
    u_b, u_l, delta_b, delta_l, z_b, z_l, y_b, y_l, B_b, B_l, B_g, C_b, C_l, C_g, h0_b,
    length, groups, size, blocks, one,
    n: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr,
    B_WIDE: tl.constexpr, C_WIDE: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    picture, group, block = _place(groups, blocks)
    e = groups * size
    inside = block * BLOCK + tl.arange(0, BLOCK) < size
    channel = group * size + block * BLOCK + tl.arange(0, BLOCK)
    state = tl.arange(0, N)
    both = (state < n)[:, None] & inside[None, :]
    # of (n, e). That channels lie side by side makes the compiler give a thread one channel with all its states; that
    # `one` is 1 it must not know, or it would load several channels by a thread, and their states by several threads.
    table = state[:, None] * e + tl.max_contiguous(channel * one, BLOCK)[None, :]
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
        states += picture * tl.cdiv(length, T) * n * e

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

    u += channel
    delta += channel
    y += channel
    B += state
    C += state
    if z is not None:
        z += channel
    known = state < n
    # a token's row is asked for while the token before it is computed; B and C are needed only after the exponentials
    next_u = tl.load(u, mask=inside, other=0.0)
    next_d = tl.load(delta, mask=inside, other=0.0)
    if z is not None:
        next_z = tl.load(z, mask=inside, other=0.0)
    for t in range(length):
        if states is not None:
            if t % T == 0:
                tl.store(states + table, h, mask=both)
                states += n * e
        b = tl.load(B, mask=known, other=0.0).to(tl.float32)
        c = tl.load(C, mask=known, other=0.0).to(tl.float32)
        x, raw = next_u.to(tl.float32), next_d.to(tl.float32)
        is_more = t + 1 < length
        u += u_l
        delta += delta_l
        B += B_l
        C += C_l
        next_u = tl.load(u, mask=inside & is_more, other=0.0)
        next_d = tl.load(delta, mask=inside & is_more, other=0.0)
        if z is not None:
            gate = next_z.to(tl.float32)
            z += z_l
            next_z = tl.load(z, mask=inside & is_more, other=0.0)
        d = _step(raw, step, SOFTPLUS)
        h = tl.exp2(d[None, :] * A2) * h + (d * x)[None, :] * b[:, None]
        read = h
        if offset is not None:
            read = h + off
        out = tl.sum(read * c[:, None], 0) + skip * x + shift
        if z is not None:
            out *= gate * tl.sigmoid(gate)
        tl.store(y, out, mask=inside)
        y += y_l
    tl.store(last + picture * n * e + channel[None, :] * n + state[:, None] * one, h, mask=both)


@triton.jit(do_not_specialize=NUMBERS)
def _backward(
    dy, u, delta, z, states, A, B, C, D, delta_bias, offset, bias,
    du, ddelta, dz, dB, dC, dA, dD, ddelta_bias, dh, doffset, dbias,
    dy_b, dy_l, u_b, u_l, delta_b, delta_l, z_b, z_l, y_b, y_l, length, batch, groups, size, blocks,
    n: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, SOFTPLUS: tl.constexpr,
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
    states += picture * (padded // T) * n * e + channel
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
        raw, us, dys, gates = (), (), (), ()
        for t in tl.static_range(T):
            here = inside & (start + t < length)
            raw = raw + (tl.load(delta + (start + t) * delta_l + channel, mask=here, other=0.0),)
            us = us + (tl.load(u + (start + t) * u_l + channel, mask=here, other=0.0),)
            dys = dys + (tl.load(dy + (start + t) * dy_l + channel, mask=here, other=0.0),)
            if z is not None:
                gates = gates + (tl.load(z + (start + t) * z_l + channel, mask=here, other=0.0),)
        first = start if DIRECTION > 0 else padded - 1 - start
        Bs, Cs, hs = B + first, C + first, states + (start // T).to(tl.int64) * n * e
        # what a state needs is asked for while the one before it is computed
        next_A, next_g, next_h = _of_a_state(A, dh, hs, channel, inside)
        next_B, next_C = _row(Bs, T, DIRECTION), _row(Cs, T, DIRECTION)
        ds, xs, out, ys = (), (), (), ()
        for t in tl.static_range(T):
            is_token = start + t < length
            x: tl.tensor = us[t].to(tl.float32)
            d = tl.where(is_token, _step(raw[t].to(tl.float32), step, SOFTPLUS), 0.0)  # 0 leaves the state as it is
            ds = ds + (d,)
            xs = xs + (d * x,)
            if z is not None:
                gate = gates[t].to(tl.float32)
                out = out + (dys[t].to(tl.float32) * gate * tl.sigmoid(gate),)
                ys = ys + (skip * x + shift,)
            else:
                out = out + (dys[t].to(tl.float32),)
        dys = out
        dxs, dds = _zeros(T, BLOCK), _zeros(T, BLOCK)
        for s in range(n):
            A2, g, h, b, c = _rate(next_A), next_g, next_h, next_B, next_C
            more = tl.minimum(s + 1, n - 1)
            next_A, next_g, next_h = _of_a_state(A + more * e, dh + more * e, hs + more * e, channel, inside)
            next_B, next_C = _row(Bs + more * padded, T, DIRECTION), _row(Cs + more * padded, T, DIRECTION)
            if offset is not None:
                off = tl.load(offset + s * e + channel, mask=inside, other=0.0)
            if doffset is not None:
                sum_offset = tl.load(doffset + s * e, mask=inside, other=0.0)
            if dA is not None:
                sum_A = tl.load(dA + s * e, mask=inside, other=0.0)
            forgets, befores, seen, new_ys = (), (), (), ()
            for t in tl.static_range(T):  # forward in time
                forget = tl.exp2(ds[t] * A2)
                forgets = forgets + (forget,)
                befores = befores + (h,)
                h = forget * h + xs[t] * b[t]
                read = h
                if offset is not None:
                    read = h + off
                seen = seen + (dys[t] * read,)
                if z is not None:
                    new_ys = new_ys + (ys[t] + read * c[t],)
            if z is not None:
                ys = new_ys
            parts, new_dxs, new_dds = (), (), ()
            for t in tl.static_range(T - 1, -1, -1):  # and back
                g += dys[t] * c[t]
                parts = (g * xs[t],) + parts
                new_dxs = (dxs[t] + g * b[t],) + new_dxs
                g *= forgets[t]
                gh = g * befores[t]
                new_dds = (dds[t] + gh * A2,) + new_dds
                if doffset is not None:
                    sum_offset += dys[t] * c[t]
                if dA is not None:
                    sum_A += gh * ds[t]
            dxs, dds = new_dxs, new_dds
            at = s * padded + first + lane // (BLOCK // T) * DIRECTION
            sum_C, sum_B = _sums(seen, lane), _sums(parts, lane)
            tl.store(dC + at, sum_C, mask=is_first)
            tl.store(dB + at, sum_B, mask=is_first)
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
        tl.debug_barrier()  # dh, dA and doffset are read again
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
def _of_a_state(A, dh, states, channel, inside):
    """A, the gradient that comes from later tokens, and the state before the first of T tokens, of one state."""
    return (
        tl.load(A + channel, mask=inside, other=0.0),
        tl.load(dh, mask=inside, other=0.0),
        tl.load(states, mask=inside, other=0.0),
    )


@triton.jit
def _row(p, T: tl.constexpr, DIRECTION: tl.constexpr):
    """T numbers that lie side by side, in scan order."""
    out = ()
    for t in tl.static_range(T):
        out = out + (tl.load(p + t * DIRECTION),)
    return out


@triton.jit
def _step(raw, step, SOFTPLUS: tl.constexpr):
    d = raw + step
    if SOFTPLUS:
        d = _softplus(d)
    return d


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
