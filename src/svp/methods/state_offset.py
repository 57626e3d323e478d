"""State-offset tuning: what the scan's state reads out is shifted by a trained constant (arXiv 2503.03499)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from svp.methods.base import Method
from svp.ops.precision import exactly
from svp.options import option
from svp.seams import Scan


class StateOffset(Method):
    """h: y_t = C_t (h_t + H) with H (e, n), which does not enter the recurrence;  y: y_t + v with v (e).

    Both act before the gate, for each direction of each block, and start at zero. rank factors H = up @ down, with
    up (e / ratio, rank) at zero and down (rank, n ratio) uniform as a linear layer.
    Published on language models; on Vim adapted. A ViT has no state.
    Ours: an offset for each direction.
    Left out: a random start (0.1 randn), which is not the frozen network; dropout of the factored offset's columns, so that
    one offset holds for training and evaluation.
    Source: arXiv 2503.03499; repository furiosa-ai/ssm-peft, state_offset_tuning.py.
    """

    @dataclass(frozen=True)
    class Options:
        kind: Literal["h", "y"] = option("h", "h: an offset of the state when it is read; y: of the output")
        rank: int | None = option(None, "rank of the offset of the state; none: full", low=1)
        ratio: int = option(1, "channels that share a row of the factored offset", low=1)

    paper = "arXiv 2503.03499 (ACL 2025)"
    params_formula = "h: k depth e n, with a rank k depth rank (e / ratio + n ratio); y: k depth e"
    default_lr = 3e-3

    @classmethod
    def unfit(cls, site, opt):
        if not all(block.n for block in site.blocks):
            return "it shifts the state of a scan, which this network does not have"
        if opt.rank and opt.kind == "y":
            return 'rank belongs to kind "h"'
        if opt.ratio > 1 and opt.rank is None:
            return f"ratio {opt.ratio} belongs to a factored offset: give rank too"
        if site.blocks[0].e % opt.ratio:
            return f"ratio {opt.ratio} does not divide the inner width {site.blocks[0].e}"
        return None

    @classmethod
    def label(cls, site, opt):
        return "state_offset_vim"

    def __init__(self, site, opt, num_classes):
        super().__init__(site, opt, num_classes)
        blocks, rank, ratio = site.blocks, opt.rank, opt.ratio
        self.sizes = [(block.e, block.n) for block in blocks]
        if opt.kind == "y":
            self.offset = nn.ParameterList(torch.zeros(b.k, b.e) for b in blocks)
        elif rank is None:
            self.offset = nn.ParameterList(torch.zeros(b.k, b.e, b.n) for b in blocks)
        else:
            bounds = [1 / math.sqrt(b.n * ratio) for b in blocks]
            self.down = nn.ParameterList(
                torch.empty(b.k, rank, b.n * ratio).uniform_(-bound, bound)
                for b, bound in zip(blocks, bounds, strict=True)
            )
            self.up = nn.ParameterList(torch.zeros(b.k, b.e // ratio, rank) for b in blocks)

    def memory(self, i, w):
        if self.opt.kind == "y":
            return Scan(bias=self.offset[i])
        return Scan(offset=self.offset[i] if self.opt.rank is None else self.factored(i))

    def factored(self, i: int) -> Tensor:
        """(k, e, n) of block i from its factors."""
        with exactly(self.up[i].device.type):  # as exact as the unfactored one
            product = self.up[i] @ self.down[i]  # (k, e / ratio, n ratio)
        return product.reshape(len(product), *self.sizes[i])
