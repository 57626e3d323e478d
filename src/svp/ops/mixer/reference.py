"""The core of a Vision Mamba block in terms of the convolution and the scan. This file defines the op."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from svp.ops.causal_conv1d import causal_conv1d
from svp.ops.selective_scan import selective_scan


def mixer(xz: Tensor, forward, backward, scale: float, kernel: str) -> Tensor:
    """Shapes as `svp.ops.mixer`."""
    x, z = xz.chunk(2, dim=-1)  # (b, l, e) each
    y = one_way(x, forward, False, kernel) + one_way(x, backward, True, kernel)
    return y * F.silu(z) * scale


def one_way(x: Tensor, w, reverse: bool, kernel: str) -> Tensor:
    """x (b, l, e) -> the scan of one direction with its skip term (b, l, e)."""
    u = causal_conv1d(x, w.conv, w.conv_bias, activation="silu", past=w.past, reverse=reverse, kernel=kernel)
    r, n = w.dt_proj.shape[1], w.A.shape[1]
    code, B, C = F.linear(u, w.x_proj, w.x_proj_bias).split([r, n, n], dim=-1)  # (b, l, r), (b, l, n) each
    delta = F.linear(code, w.dt_proj)  # (b, l, e)
    return selective_scan(  # type: ignore[return-value]
        u, delta, w.A, B, C, w.D, delta_bias=w.dt_bias, delta_softplus=True,
        h0=w.h0, offset=w.offset, bias=w.bias, reverse=reverse, kernel=kernel,
    )  # fmt: skip
