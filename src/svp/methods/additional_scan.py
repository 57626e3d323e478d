"""Additional-scan: every state space gets n more dimensions, whose A, B and C are trained (arXiv 2411.03855)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from svp.methods.base import Method
from svp.options import option


class AdditionalScan(Method):
    """A gets n more columns and x_proj 2 n more rows (their B and C), in each direction of each block.

    The states are summed, so the place of the new ones changes no value; it says which old column the new A copies: the
    first ("prefix", published) or the last ("suffix").
    init "zero_c": B as a linear layer starts, C zero: the frozen network, and it learns (arXiv 2503.03499, dim_extend);
    "mambapeft": B and C both as a linear layer starts, which changes the output at the start.
    Vim: direct. A ViT has no scan. Memories that act together with it hold the new states too.
    Ours: zero_c beside the place "prefix", which copies the first column where dim_extend copies the last.
    Left out: the published zero start of both B and C ("zero_init_x_proj"), which never learns, as all its gradients are zero;
    starts of the new A at log(N + 1) … or a constant, as the released settings copy.
    Source: arXiv 2411.03855, repository sony/MambaPEFT, additional_scan.
    """

    @dataclass(frozen=True)
    class Options:
        n: int = option(6, "new state dimensions", low=1, high=240)
        pos: Literal["prefix", "suffix"] = option("prefix", "before or after the old ones")
        init: Literal["zero_c", "mambapeft"] = option("zero_c", "start values of the new B and C")

    PRESETS = {"published": dict(init="mambapeft")}
    paper = "arXiv 2411.03855 (ICLR 2025)"
    params_formula = "k depth 3 n e"
    order = 1  # shapes change after numbers
    default_lr = 3e-3

    @classmethod
    def unfit(cls, site, opt):
        if any(f"layers.{i}.mixer.x_proj{twin}.weight" not in site.weights for i, twin in twins(site)):
            return "it extends the scans of Vim, each direction with weights of its own"
        return None

    def __init__(self, site, opt, num_classes):
        super().__init__(site, opt, num_classes)
        self.places: list[tuple[str, str, int]] = []  # A, x_proj, old states
        self.A_log, self.B, self.C = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for i, twin in twins(site):
            mixer, block = f"layers.{i}.mixer.", site.blocks[i]
            a, bound = f"{mixer}A{twin}_log", 1 / math.sqrt(block.e)
            self.places.append((a, f"{mixer}x_proj{twin}.weight", block.n))
            old = site.weights[a]
            self.A_log.append((old[:, :1] if opt.pos == "prefix" else old[:, -1:]).repeat(1, opt.n))
            self.B.append(torch.empty(opt.n, block.e).uniform_(-bound, bound))
            rows = torch.empty(opt.n, block.e).uniform_(-bound, bound)
            self.C.append(torch.zeros_like(rows) if opt.init == "zero_c" else rows)

    def weights(self, w):
        changed: dict[str, Tensor] = {}
        first = self.opt.pos == "prefix"
        for (a, proj, n), A_log, B, C in zip(self.places, self.A_log, self.B, self.C, strict=True):
            r = w[proj].shape[0] - 2 * n
            code, old_B, old_C = w[proj].split([r, n, n])
            changed[proj] = self.spliced(code, B, old_B, C, old_C)
            bias = proj.replace("weight", "bias")
            if bias in w:  # filled by another method
                code, old_B, old_C = w[bias].split([r, n, n])
                none = code.new_zeros(len(B))
                changed[bias] = self.spliced(code, none, old_B, none, old_C)
            changed[a] = torch.cat([A_log, w[a]] if first else [w[a], A_log], dim=1)
        return changed

    @classmethod
    def new_states(cls, opt):
        return opt.n

    def groups(self):
        """The new A is not decayed, as published."""
        return {"A_log.*": {"decay_scale": 0.0}}

    def spliced(self, code: Tensor, B: Tensor, old_B: Tensor, C: Tensor, old_C: Tensor) -> Tensor:
        """Rows of x_proj with the new ones in their places."""
        parts = (code, B, old_B, C, old_C) if self.opt.pos == "prefix" else (code, old_B, B, old_C, C)
        return torch.cat([p.to(code.dtype) for p in parts])


def twins(site) -> list[tuple[int, str]]:
    """(block, "" or "_b") of every direction."""
    return [(i, twin) for i, block in enumerate(site.blocks) for twin in ("", "_b")[: max(block.k, 1)]]
