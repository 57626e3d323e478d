"""The core of a Vision Mamba block, from its input projection to its output projection, as one op."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from svp.errors import SvpError
from svp.ops.dispatch import Kernel, environment, pick


class Direction(NamedTuple):
    """The tensors of one scan order.

    conv       (e, taps)          conv_bias (e,) or None
    x_proj     (r + 2n, e)        x_proj_bias (r + 2n,) or None
    dt_proj    (e, r)             dt_bias (e,) or None
    A          (e, n)             negative; D (e,) or None
    h0         (1|b, e, n)        or None, as all that follow: the state before the first token
    past       (1|b, e, taps-1)   the inputs of the convolution before the first token
    offset     (e, n)             added to the state when it is read; bias (e,) added to the output
    """

    conv: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    x_proj_bias: Tensor | None
    dt_proj: Tensor
    dt_bias: Tensor | None
    A: Tensor
    D: Tensor | None
    h0: Tensor | None = None
    past: Tensor | None = None
    offset: Tensor | None = None
    bias: Tensor | None = None


KERNELS = (  # the last row is made of the ops around it, each with the kernel that fits it
    Kernel("cpu", "svp.ops.mixer.cpu:mixer", "cpu", (torch.float32, torch.bfloat16, torch.float16), max_state=256),
    Kernel("composed", "svp.ops.mixer.reference:mixer", complex_A=True),
)


def mixer(xz: Tensor, forward: Direction, backward: Direction, *, scale: float = 1.0, kernel: str = "auto") -> Tensor:
    """Two selective scans over the same tokens in both orders, summed and gated.

        u = silu(conv(x)),  (code, B, C) = x_proj u,  delta = softplus(dt_proj code + dt_bias)     in each order
        out = scale silu(z) (scan_forward(u, delta, A, B, C, D) + scan_backward(…))

    xz       (b, l, 2 e)   the input projection: x and the gate z side by side
    kernel   "auto", or a name of the scan's kernels: all steps use it
    returns  (b, l, e)     in the dtype of xz; the states are float32 or wider
    Raises SvpError for shapes that do not belong together and for a named kernel that cannot answer.
    Source: arXiv 2401.09417 Alg. 1; repository hustvl/Vim, mamba_inner_fn_no_out_proj with bimamba_type "v2".
    """
    e, n = forward.A.shape
    if xz.dim() != 3 or xz.shape[2] != 2 * e or backward.A.shape != (e, n):
        raise SvpError(
            f"xz is {tuple(xz.shape)}, A {tuple(forward.A.shape)} and {tuple(backward.A.shape)}, expected xz (b, l, 2 e) and "
            "both A (e, n)"
        )
    for w in (forward, backward):
        _check(w, len(xz), forward.dt_proj.shape[-1])
    kernel = environment() if kernel == "auto" else kernel
    named = kernel if kernel in ("auto", "cpu") else "composed"
    return pick(KERNELS, named, xz, forward.A)(xz, forward, backward, scale, kernel)


def _check(w: Direction, b: int, r: int) -> None:
    """Raises SvpError for a tensor of another shape than the others ask for: kernels read by pointers."""
    (e, n), taps = w.A.shape, w.conv.shape[-1]
    rows, one = r + 2 * n, (e,)
    want = ((e, taps), one, (rows, e), (rows,), (e, r), one, (e, n), one, (1, e, n), (1, e, taps - 1), (e, n), one)
    for name, t, shape in zip(w._fields, w, want, strict=True):
        if t is None or t.shape == shape or (len(shape) == 3 and t.shape == (b, *shape[1:])):
            continue
        each = f", or {b} of them" if len(shape) == 3 else ""
        raise SvpError(f"{name} is {tuple(t.shape)}, expected {shape}{each}: A is {(e, n)}, dt_proj has {r} columns")
