"""The causal depthwise convolution in plain PyTorch. This file defines the op; every kernel is tested against it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, past: Tensor | None, reverse: bool) -> Tensor:
    """Shapes as `causal_conv1d`."""
    b, l, e = x.shape
    taps = weight.shape[1]
    wide = torch.promote_types(x.dtype, weight.dtype)
    before = x.new_zeros(b, taps - 1, e) if past is None else past.transpose(1, 2).expand(b, taps - 1, e)
    x32 = torch.cat([before.to(wide), (x.flip(1) if reverse else x).to(wide)], dim=1)
    y = torch.zeros(b, l, e, dtype=wide, device=x.device) if bias is None else bias.to(wide).expand(b, l, e)
    for k in range(taps):
        y = y + weight[:, k].to(wide) * x32[:, k : k + l]  # the last tap multiplies the current token
    y = F.silu(y) if silu else y
    return (y.flip(1) if reverse else y).to(x.dtype)
