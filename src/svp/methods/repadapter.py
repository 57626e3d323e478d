"""RepAdapter: a linear bottleneck in front of a projection, which it melts into (arXiv 2302.08106)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from svp.methods._layers import UNKNOWN, is_vit, layers
from svp.methods.base import Method
from svp.options import option


class RepAdapter(Method):
    """h' = h + scale (B (A h + a) + b) in front of a layer W h' + c; without dropout W and c hold it.

    A (rank, d) starts Xavier, B (d, rank) of `groups` diagonal blocks and both biases at zero: the frozen network.
    W' = W + scale (W B) A,  c' = c + scale W (B a + b). ViT (direct): after the norms, before qkv and before fc1. Vim
    (adapted): after the norm, before in_proj. Beside another method of weights: name that one first, so that its
    weights read h' too.
    Ours: the default scale, which the source chooses for each task (0.1 to 10); the place on Vim.
    Source: arXiv 2302.08106; repository luogen1996/RepAdapter.
    """

    @dataclass(frozen=True)
    class Options:
        rank: int = option(8, "width between A and B", low=1)
        groups: int = option(2, "diagonal blocks of B", low=1)
        scale: float = option(1.0, "factor of what is added")
        where: Literal["both", "attn"] = option("both", "ViT: before attention and MLP, or before attention only")
        dropout: float = option(0.0, "between A and B, in training; published: 0.1", low=0.0, high=0.9)

    PRESETS = {"published": dict(dropout=0.1)}
    paper = "arXiv 2302.08106"
    params_formula = (
        "one place: d rank + rank + d rank / groups + d; places: ViT 2 depth (where=attn: depth), Vim depth"
    )
    default_lr = 3e-3

    @classmethod
    def unfit(cls, site, opt):
        d = site.blocks[0].width
        if not layers(site, 0):
            return UNKNOWN
        if d % opt.groups or opt.rank % opt.groups:
            return f"{opt.groups} groups do not divide both the width {d} and the rank {opt.rank}"
        if opt.where != "both" and not is_vit(site):
            return "where belongs to a ViT: a Mamba block has one place"
        return None

    @classmethod
    def label(cls, site, opt):
        return None if is_vit(site) else "repadapter_vim"

    def __init__(self, site, opt, num_classes):
        super().__init__(site, opt, num_classes)
        behind = {"mixer": "in_proj", "attn": "qkv", "mlp": "fc1"}  # the layer that a branch begins with
        self.parts, self.names = nn.ModuleDict(), {}
        for i, block in enumerate(site.blocks):
            for kind in block.kinds if opt.where == "both" else ("attn",):
                self.parts[f"{kind}_{i}"] = Bottleneck(block.width, opt)
                self.names[f"{kind}_{i}"] = layers(site, i)[behind[kind]]

    def acts(self, seam):
        return seam == ("branch" if self.opt.dropout else "weights")

    def branch(self, x, h, i, kind, run):
        part = f"{kind}_{i}"
        return run(h + self.parts[part](h).to(h.dtype) if part in self.parts else h)

    def weights(self, w):
        changed: dict[str, Tensor] = {}
        for part, name in self.names.items():
            weight, bias = w[f"{name}.weight"], w.get(f"{name}.bias")
            into, shift = self.parts[part].folded(weight)
            changed[f"{name}.weight"] = weight + into
            changed[f"{name}.bias"] = shift if bias is None else bias + shift
        return changed

    def folded(self, weights):
        return {**weights, **self.weights(weights)} if self.opt.dropout else weights


class Bottleneck(nn.Module):
    """scale (B drop(A h + a) + b): h (b, l, d) -> (b, l, d)."""

    def __init__(self, d: int, opt):
        super().__init__()
        self.scale, self.groups = opt.scale, opt.groups
        self.down = nn.Linear(d, opt.rank)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        self.up = nn.Parameter(torch.zeros(d, opt.rank // opt.groups))  # the diagonal blocks under one another
        self.bias = nn.Parameter(torch.zeros(d))
        self.drop = nn.Dropout(opt.dropout)

    @property
    def dense_up(self) -> Tensor:
        return torch.block_diag(*self.up.chunk(self.groups))  # (d, rank)

    def forward(self, h: Tensor) -> Tensor:
        return self.scale * nn.functional.linear(self.drop(self.down(h)), self.dense_up, self.bias)

    def folded(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What a layer's weight (out, d) and bias (out) gain when the layer takes the bottleneck in."""
        up = self.dense_up
        into = self.scale * (weight @ up) @ self.down.weight
        return into, self.scale * weight @ (up @ self.down.bias + self.bias)
