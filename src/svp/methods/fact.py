"""FacT: the changes of all weights share one factorised tensor (arXiv 2212.03145)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from svp.methods._layers import UNKNOWN, is_vit, layers
from svp.methods.base import Method
from svp.options import option


class FacT(Method):
    """W' = W + scale V T_jᵀ U on every d x d block j of every projection; U (r, d), V (d, r) belong to all of them.

    A block of a ViT holds 12: q, k, v, proj, four of fc1, four of fc2 (direct). A Vim block holds 6: four of in_proj, two of
    out_proj (adapted). tt: T_j (r, r) each its own; tk: T_j = sum_s P_sj C_s with C (r, r, r), P (r, blocks).
    V starts at zero: the frozen network; U and tt's T as linear layers, those of a weight with several blocks in a row as
    one layer over all of them; C and P Xavier.
    interleaved: the released tk lays the four T of fc1 (and of fc2, turned over) side by side, entry by entry, before it cuts
    them into blocks again, so that each block holds entries of all four: another family than the paper's.
    Ours: the default scale, which the source chooses for each task; the blocks of Vim.
    Left out: dropout of the code (0.1), so that the change stays a weight.
    Source: arXiv 2212.03145; repository JieShibo/PETL-ViT, FacT.
    """

    @dataclass(frozen=True)
    class Options:
        kind: Literal["tk", "tt"] = option("tk", "Tucker or tensor-train")
        rank: int = option(16, "rank of the factors", low=1)
        scale: float = option(1.0, "factor of what is added")
        interleaved: bool = option(False, "tk on a ViT: T of fc1 and fc2 cut as the released code cuts them")

    PRESETS = {"tk": {}, "tt": dict(kind="tt"), "published": dict(interleaved=True)}
    paper = "arXiv 2212.03145 (AAAI 2023)"
    params_formula = "2 d r + blocks r + r³ (tk), 2 d r + blocks r² (tt); blocks: ViT 12 depth, Vim 6 depth"
    default_lr = 3e-3

    @classmethod
    def unfit(cls, site, opt):
        if not layers(site, 0):
            return UNKNOWN
        d = site.blocks[0].width
        if opt.rank > d:
            return f"rank {opt.rank} is larger than the width {d}"
        if opt.interleaved and (opt.kind == "tt" or not is_vit(site)):
            return "interleaved belongs to fc1 and fc2 of a ViT, kind tk"
        for name in projections(site):
            shape = tuple(site.weights[name].shape)
            if shape[0] % d or shape[1] % d:
                return f"{name} {shape} cannot be cut into blocks of {d} x {d}"
        return None

    @classmethod
    def label(cls, site, opt):
        return None if is_vit(site) else "fact_vim"

    def __init__(self, site, opt, num_classes):
        super().__init__(site, opt, num_classes)
        d, r = site.blocks[0].width, opt.rank
        self.grids = {name: tuple(size // d for size in site.weights[name].shape) for name in projections(site)}
        count = sum(rows * columns for rows, columns in self.grids.values())
        self.U = nn.Parameter(nn.Linear(d, r, bias=False).weight.detach())
        self.V = nn.Parameter(torch.zeros(d, r))
        if opt.kind == "tk":
            self.C, self.P = nn.Parameter(torch.empty(r, r, r)), nn.Parameter(torch.empty(r, count))
            nn.init.xavier_uniform_(self.C)
            nn.init.xavier_uniform_(self.P)
        else:
            widths = [columns for rows, columns in self.grids.values() for _ in range(rows * columns)]
            starts = [nn.Linear(r, r, bias=False).weight.detach() / width**0.5 for width in widths]
            self.T = nn.Parameter(torch.stack(starts))

    def cores(self) -> Tensor:
        """(blocks, r, r)"""
        return torch.einsum("abs,sj->jab", self.C, self.P) if self.opt.kind == "tk" else self.T

    def weights(self, w):
        changed: dict[str, Tensor] = {}
        cores = self.cores().split([rows * columns for rows, columns in self.grids.values()])
        for (name, grid), T in zip(self.grids.items(), cores, strict=True):
            if self.opt.interleaved and ".mlp." in name:
                T = interleaved(T, turned=grid[1] > 1)
            left = torch.einsum("ob,jab->joa", self.V, T).unflatten(0, grid)  # (rows, columns, d, r)
            added = (left @ self.U).transpose(1, 2)  # (rows, d, columns, d)
            changed[name] = w[name] + self.opt.scale * added.reshape(w[name].shape)
        return changed


def interleaved(T: Tensor, turned: bool) -> Tensor:
    """T (m, r, r) of one weight, cut as released: entry by entry side by side (r, r m), then into m blocks (m, r, r)."""
    m, r, _ = T.shape
    blocks = T.permute(1, 2, 0).reshape(r, m, r).transpose(0, 1)
    return blocks.transpose(1, 2) if turned else blocks


def projections(site) -> list[str]:
    """Published names of the weights that are changed."""
    wanted = ("in_proj", "out_proj", "qkv", "proj", "fc1", "fc2")
    found = [(layer, name) for i in range(len(site.blocks)) for layer, name in layers(site, i).items()]
    return [f"{name}.weight" for layer, name in found if layer in wanted]
