"""The selective scan: one public function, its kernels, and mamba_ssm's calling form."""

from __future__ import annotations

import torch
from torch import Tensor

from svp.errors import SvpError
from svp.ops.dispatch import Kernel, pick

KERNELS = (  # the fastest first; the last row answers everywhere
    Kernel(
        "triton",
        "svp.ops.selective_scan.triton:scan",
        "cuda",
        (torch.float32, torch.bfloat16, torch.float16),
        max_state=256,
    ),
    Kernel(
        "cpu", "svp.ops.selective_scan.cpu:scan", "cpu", (torch.float32, torch.bfloat16, torch.float16), max_state=256
    ),
    Kernel("reference", "svp.ops.selective_scan.reference:scan", complex_A=True, constant_BC=True),
)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    h0: Tensor | None = None,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
    reverse: bool = False,
    return_last_state: bool = False,
    kernel: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the selective state-space recurrence along a sequence.

        h_t = exp(delta_t A) h_{t-1} + (delta_t u_t) B_t,    y_t = (C_t (h_t + offset) + D u_t + bias) silu(z_t)

    u, delta     (b, l, e)     input and step size; any strides
    A            (e, n)        negative; complex: one of each conjugate pair (reference only)
    B, C         (b, l, n)     input-dependent; (b, l, g, n) for g groups of e / g channels; (e, n) for constants
    D, bias      (e,)          skip weight, output bias, or None
    z            (b, l, e)     gate, or None
    delta_bias   (e,)          added to delta first; delta_softplus: then softplus (threshold 20)
    h0           (1|b, e, n)   the state before the first token, or None for zero
    offset       (e, n)        added to the state when it is read, or None
    reverse      walk from the last token to the first; h0 then precedes the last token
    kernel       "auto", or a name of KERNELS, which never falls back
    returns      (b, l, e)     in the dtype of u, and with return_last_state the last state (b, e, n); the state is float32
                               or wider on every kernel
    Raises SvpError for shapes that do not belong together and for a named kernel that cannot answer.
    Source: arXiv 2312.00752 Eq. 2; arXiv 2412.08947 Eq. 11; repository state-spaces/mamba, selective_scan_ref.
    """
    B, C = _grouped(B), _grouped(C)
    _check(u, delta, A, B, C, D, z, delta_bias, h0, offset, bias)
    scan = pick(KERNELS, kernel, u, _widest(A, B, C), constant_BC=B.dim() == 2 or C.dim() == 2)
    y, last = scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, h0, offset, bias, reverse)
    return (y, last) if return_last_state else y


def selective_scan_fn(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`selective_scan` in the layout of mamba_ssm: a drop-in for its function of the same name.

    u, delta, z (b, e, l); B, C (e, n), (b, n, l) or (b, g, n, l), with complex A (b, [g,] n, 2 l) as interleaved real and
    imaginary parts; returns (b, e, l) and with return_last_state the last state (b, e, n).
    """
    B, C = (_channel_last(t, A.is_complex()) for t in (B, C))
    turned = None if z is None else z.transpose(1, 2)
    y, last = selective_scan(  # type: ignore[misc]
        u.transpose(1, 2), delta.transpose(1, 2), A, B, C, D, z=turned, delta_bias=delta_bias,
        delta_softplus=delta_softplus, return_last_state=True,
    )  # fmt: skip
    y = y.transpose(1, 2)
    return (y, last) if return_last_state else y


def _channel_last(B: Tensor, is_complex: bool) -> Tensor:
    if B.dim() == 2:
        return B
    B = B[:, None] if B.dim() == 3 else B
    if is_complex:
        B = torch.view_as_complex(B.unflatten(-1, (-1, 2)).contiguous())
    return B.permute(0, 3, 1, 2)  # (b, l, g, n)


def _grouped(B: Tensor) -> Tensor:
    return B[:, :, None] if B.dim() == 3 else B


def _widest(A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return next((t for t in (A, B, C) if t.is_complex()), A)


def _check(u, delta, A, B, C, D, z, delta_bias, h0, offset, bias) -> None:
    if u.dim() != 3 or A.dim() != 2 or A.shape[0] != u.shape[2]:
        raise SvpError(f"u is {tuple(u.shape)} and A is {tuple(A.shape)}, expected u (b, l, e) and A (e, n)")
    b, l, e = u.shape
    n = A.shape[1]
    for name, t in (("delta", delta), ("z", z)):
        if t is not None and t.shape != u.shape:
            raise SvpError(f"{name} is {tuple(t.shape)}, expected that of u: {(b, l, e)}")
    for name, t in (("B", B), ("C", C)):
        fits = t.shape == (e, n) if t.dim() == 2 else t.dim() == 4 and t.shape[:2] == (b, l) and t.shape[3] == n
        if not fits or (t.dim() == 4 and e % t.shape[2]):
            raise SvpError(
                f"{name} is {tuple(t.shape)}, expected ({b}, {l}, {n}), ({b}, {l}, g, {n}) with g a divisor of {e}, or ({e}, {n})"
            )
    for name, t, shape in (
        ("D", D, (e,)),
        ("delta_bias", delta_bias, (e,)),
        ("bias", bias, (e,)),
        ("offset", offset, (e, n)),
    ):
        if t is not None and t.shape != shape:
            raise SvpError(f"{name} is {tuple(t.shape)}, expected {shape}")
    if h0 is not None and h0.shape not in ((1, e, n), (b, e, n)):
        raise SvpError(f"h0 is {tuple(h0.shape)}, expected (1, {e}, {n}) or ({b}, {e}, {n})")
