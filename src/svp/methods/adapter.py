"""Adapters: small two-layer networks inside or beside a branch (arXiv 1902.00751, 2005.00247, 2205.13535, 2411.03855)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svp.methods._layers import is_vit
from svp.methods.base import Method
from svp.options import option

KINDS = Literal["adaptformer", "parallel", "houlsby", "pfeiffer"]
WIDTHS = {"adaptformer": 64, "parallel": 32, "houlsby": 8, "pfeiffer": 8}


class Adapter(Method):
    """a(x) = up(drop(relu(down(x)))), up at zero: training starts at the frozen network.

    adaptformer  branch(x) + scale a(x) beside the MLP (ViT, direct) or the mixer (Vim, adapted), x the stream before its norm
    parallel     Vim (direct): scale a(o) beside out_proj, o the gated mean of both directions; no biases (MambaPEFT)
    pfeiffer     y + a(y) after the MLP (ViT, direct) or the mixer (Vim, adapted);  houlsby: after attention too
    Ours: relu in Houlsby and Pfeiffer, whose papers leave it open; the places on Vim, which has no MLP; stochastic depth drops
    an adapter with the branch that it stands beside.
    Left out: AdaptFormer's LayerNorm behind the adapter, which is not the frozen network at the start.
    Source: arXiv 2205.13535 (AdaptFormer, repository ShoufaChen/AdaptFormer), 2411.03855 (parallel), 1902.00751 (Houlsby),
    2005.00247 (Pfeiffer).
    """

    @dataclass(frozen=True)
    class Options:
        kind: KINDS = option("adaptformer", "where it acts")
        hidden: int | None = option(
            None, "width between down and up; none: adaptformer 64, parallel 32, houlsby and pfeiffer 8", low=1
        )
        scale: float | Literal["learned"] | None = option(
            None,
            "factor beside a branch (adaptformer, parallel; none: 0.1); learned: one trained number a place, from 1",
        )
        bias: bool = option(True, "biases in both layers; parallel has none")
        dropout: float = option(0.0, "after the activation, in training; published AdaptFormer: 0.1", low=0.0, high=0.9)
        layernorm: Literal["none", "in"] = option("none", "adaptformer: a LayerNorm before down")

    PRESETS = {
        "published": dict(dropout=0.1),
        "petl_vit": dict(hidden=8, bias=False, dropout=0.1),
        "parallel": dict(kind="parallel", dropout=0.1),
        "houlsby": dict(kind="houlsby"),
        "pfeiffer": dict(kind="pfeiffer"),
    }
    paper = "arXiv 2205.13535, 1902.00751, 2005.00247; parallel: 2411.03855"
    params_formula = (
        "one place: 2 d h + h + d, without biases 2 d h, parallel h (e + d), a LayerNorm + 2 d, a learned scale + 1; "
        "places: depth, Houlsby on a ViT 2 depth"
    )
    default_lr = 3e-3

    @classmethod
    def unfit(cls, site, opt):
        if opt.kind == "parallel" and not all(block.kinds == ("mixer",) for block in site.blocks):
            return "the parallel adapter stands beside out_proj of a Mamba block; on a ViT take kind=adaptformer"
        if opt.layernorm == "in" and opt.kind != "adaptformer":
            return 'layernorm belongs to kind "adaptformer"'
        if opt.scale is not None and opt.kind in ("houlsby", "pfeiffer"):
            return 'a scale belongs to kinds "adaptformer" and "parallel"'
        return None

    @classmethod
    def label(cls, site, opt):
        return None if is_vit(site) or opt.kind == "parallel" else "adapter_vim"

    def __init__(self, site, opt, num_classes):
        scale = 0.1 if opt.scale is None and opt.kind in ("adaptformer", "parallel") else opt.scale
        opt = dataclasses.replace(opt, hidden=opt.hidden or WIDTHS[opt.kind], scale=scale)
        super().__init__(site, opt, num_classes)
        self.parts = nn.ModuleDict()
        for i, block in enumerate(site.blocks):
            where = block.kinds if opt.kind == "houlsby" else block.kinds[-1:]
            d_in, bias = (block.e, False) if opt.kind == "parallel" else (block.width, opt.bias)
            for kind in where:
                self.parts[f"{kind}_{i}"] = Bottleneck(d_in, block.width, opt, bias)
        # of the last block only class tokens are read: few enough for relu to be zero on all of two pictures
        self.known_inert = tuple(f"parts.*_{len(site.blocks) - 1}.{name}" for name in ("down.*", "up.weight", "norm.*"))

    def acts(self, seam):
        return seam == ("beside" if self.opt.kind == "parallel" else "branch")

    def branch(self, x, h, i, kind, run):
        name = f"{kind}_{i}"
        y = run(h)
        if name not in self.parts:
            return y
        return y + (self.parts[name](x.to(h.dtype)) if self.opt.kind == "adaptformer" else self.parts[name](y))

    def beside(self, i):
        return {"out_proj": self.parts[f"mixer_{i}"]}


class Bottleneck(nn.Module):
    """scale up(drop(relu(down(norm(x)))))"""

    def __init__(self, d_in: int, d_out: int, opt, bias: bool):
        super().__init__()
        self.scale = 1.0 if opt.scale is None else opt.scale
        if self.scale == "learned":
            self.scale = nn.Parameter(torch.ones(1))
        self.norm = nn.LayerNorm(d_in) if opt.layernorm == "in" else nn.Identity()
        self.down, self.up = nn.Linear(d_in, opt.hidden, bias=bias), nn.Linear(opt.hidden, d_out, bias=bias)
        self.drop = nn.Dropout(opt.dropout)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        if bias:
            nn.init.zeros_(self.down.bias)
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.up(self.drop(F.relu(self.down(self.norm(x)))))
