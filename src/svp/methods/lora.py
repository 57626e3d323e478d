"""Low-rank adaptation of weights, on Mamba also of the partial projections X, Z, delta, B, C (arXiv 2106.09685, 2411.03855)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svp.errors import nearest
from svp.methods._layers import UNKNOWN, is_vit, layers
from svp.methods.base import Method
from svp.options import option

MAMBA_TARGETS = ("in_proj", "X", "Z", "out_proj", "x_proj", "d", "B", "C", "dt", "embed")
VIT_TARGETS = ("q", "k", "v", "qkv", "proj", "fc1", "fc2", "embed")
BOTH_WAYS = ("x_proj", "d", "B", "C", "dt")  # weights of their own in each direction
BRANCHES = ("in_proj", "out_proj", "qkv", "proj", "fc1", "fc2")  # layers that a term can stand beside
EMBED = "patch_embed.proj.weight"


class Lora(Method):
    """W' = W + scale · up @ down on every target of every block; the sum is made before any kernel sees it.

    down (rank, in) starts uniform ±1/sqrt(in), up (out, rank) at zero. Mamba targets, with e the inner width, r the rank
    of delta and n the states: `in_proj` (2e, d), its halves `X` and `Z` (e, d), `out_proj` (d, e), and for each direction
    `x_proj` (r + 2n, e), its rows `d` (r), `B` (n), `C` (n), and `dt` (e, r). ViT targets: `qkv` (3d, d), its thirds `q`,
    `k`, `v` (d, d), `proj`, `fc1`, `fc2`. On both `embed`, the patch embedding (d, 3 patch²).
    The scale is a plain factor (peft's lora_alpha / r). rslora divides it by sqrt(rank): scale is then peft's lora_alpha.
    dora: W' = m (W + scale · up @ down) / its norm, m starting at the norm of W, no gradient through the norm; a norm for
    each input ("column", MambaPEFT) or each output ("row", the DoRA paper and peft). On targets that overlap the changes add
    up, each of the frozen weight.
    Dropout acts on the rank-sized code of projections and, as published, not on x_proj, d, B, C, dt; there is
    none with dora (as in MambaPEFT). On a ViT direct, at q and v as in the paper.
    Ours: default ranks; no dropout on embed, nor beside dora on a ViT; dora on embed too; beside others dora comes first.
    Left out: the released start of dora's m for the backward d, B and C, which is the norm of the forward rows.
    Source: arXiv 2106.09685, 2402.09353 (DoRA), 2312.03732 (rsLoRA); the partial forms: arXiv 2411.03855, repository
    sony/MambaPEFT (scale 0.1).
    """

    @dataclass(frozen=True)
    class Options:
        rank: int | None = option(None, "rank of the added matrices; none: 64 on Mamba, 8 on a ViT", low=1)
        scale: float = option(1.0, "factor of the added product; published MambaPEFT: 0.1")
        targets: tuple[str, ...] | None = option(
            None, f"where; Mamba: {', '.join(MAMBA_TARGETS)} (none: X); ViT: {', '.join(VIT_TARGETS)} (none: q, v)"
        )
        dropout: float = option(0.0, "on the code between down and up, in training", low=0.0, high=0.9)
        dora: Literal["none", "column", "row"] | bool = option(
            "none", "a trained norm of each input (column) or output (row); true: column on Mamba, row on a ViT"
        )
        rslora: bool = option(False, "divide the scale by sqrt(rank)")

    PRESETS = {
        "published": dict(scale=0.1, dropout=0.1),
        "dora": dict(dora=True),
        "published_dora": dict(dora=True, scale=0.1),
    }
    paper = "arXiv 2106.09685; partial targets: arXiv 2411.03855; DoRA: 2402.09353; rsLoRA: 2312.03732"
    params_formula = (
        "depth * sum over targets (x_proj, d, B, C, dt: of each direction) of rank (in + out), dora column + in, row + out; "
        "embed once: rank (3 patch² + d)"
    )
    default_lr = 3e-3

    @classmethod
    def unfit(cls, site, opt):
        if not layers(site, 0):
            return UNKNOWN
        known = VIT_TARGETS if is_vit(site) else MAMBA_TARGETS
        opt = resolved(site, opt)
        if not opt.targets:
            return f"targets is empty, expected some of {', '.join(known)}"
        strange = [target for target in opt.targets if target not in known]
        if strange:
            close = nearest(strange[0], known)
            return f"targets {', '.join(strange)} are none of {', '.join(known)}" + (
                f"; did you mean {close[0]}?" if close else ""
            )
        twice = next((target for target in opt.targets if opt.targets.count(target) > 1), None)
        if twice:
            return f"target '{twice}' stands twice"
        if opt.dropout and opt.dora != "none":
            return "dora changes a whole weight and has no branch to drop out of: dropout must be 0"
        widest = max(max(site.weights[name].flatten(1).shape) for name, *_ in places(site, 0, opt.targets))
        if opt.rank > widest:
            return f"rank {opt.rank} is larger than the widest layer ({widest})"
        return None

    def __init__(self, site, opt, num_classes):
        opt = resolved(site, opt)
        super().__init__(site, opt, num_classes)
        found = [(i, place) for i in range(len(site.blocks)) for place in places(site, i, opt.targets)]
        self.blocks, self.slices = [i for i, _ in found], [place for _, place in found]
        self.rows = {layer: site.weights[name].shape[0] for name, _, layer in self.slices}
        self.factor = opt.scale / math.sqrt(opt.rank) if opt.rslora else opt.scale
        self.down, self.up, self.norm = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for name, rows, _ in self.slices:
            base = site.weights[name].flatten(1)[rows]
            out, d_in = base.shape
            bound = 1 / math.sqrt(d_in)
            self.down.append(torch.empty(opt.rank, d_in).uniform_(-bound, bound))
            self.up.append(torch.zeros(out, opt.rank))
            if opt.dora != "none":
                self.norm.append(base.norm(dim=self.axis, keepdim=True))
        self.drop = nn.Dropout(opt.dropout)
        self.order = 0 if opt.dora == "none" else -1  # its norms are the network's: nobody may have scaled them before

    @property
    def axis(self) -> int:
        """The axis that dora takes a norm over."""
        return 0 if self.opt.dora == "column" else 1

    def is_branch(self, layer: str) -> bool:
        """Whether this layer's product stands beside it instead of in its weight."""
        return self.opt.dropout > 0 and layer in BRANCHES

    def acts(self, seam):
        return seam in {"beside" if self.is_branch(layer) else "weights" for _, _, layer in self.slices}

    def weights(self, w):
        return self.changed(w, [j for j, (_, _, layer) in enumerate(self.slices) if not self.is_branch(layer)])

    def folded(self, weights):
        beside = [j for j, (_, _, layer) in enumerate(self.slices) if self.is_branch(layer)]
        return {**weights, **self.changed(weights, beside)}

    def changed(self, w, chosen) -> dict[str, Tensor]:
        """The weights with the products of the slices `chosen` in them; slices that overlap add up."""
        changed: dict[str, Tensor] = {}
        for j in chosen:
            name, rows, _ = self.slices[j]
            base = w[name]
            added = self.added(j, base.flatten(1)[rows])
            padded = F.pad(added, (0, 0, rows.start or 0, len(base) - (rows.stop or len(base))))
            changed[name] = changed.get(name, base) + padded.view_as(base)
        return changed

    def added(self, j: int, base: Tensor) -> Tensor:
        """What slice j adds to its rows (out, in) of the frozen weight."""
        product = self.factor * self.up[j] @ self.down[j]
        if self.opt.dora == "none":
            return product
        total = base + product
        return self.norm[j] * total / total.norm(dim=self.axis, keepdim=True).detach() - base

    def beside(self, i):
        found: dict[str, list[int]] = {}
        for j, (_, _, layer) in enumerate(self.slices):
            if self.blocks[j] == i and self.is_branch(layer):
                found.setdefault(layer, []).append(j)
        return {layer: _Branch(self, slices) for layer, slices in found.items()}


class _Branch:
    """The low-rank terms beside one layer: x (b, l, in) -> (b, l, out)."""

    def __init__(self, method: Lora, slices: list[int]):
        self.method, self.slices = method, slices

    def __call__(self, x: Tensor) -> Tensor:
        return sum((self.term(x, j) for j in self.slices[1:]), self.term(x, self.slices[0]))

    def term(self, x: Tensor, j: int) -> Tensor:
        m, (_, rows, layer) = self.method, self.method.slices[j]
        y = m.factor * (m.drop(x @ m.down[j].T.to(x.dtype)) @ m.up[j].T.to(x.dtype))
        return F.pad(y, (rows.start or 0, m.rows[layer] - (rows.stop or m.rows[layer])))


def resolved(site, opt):
    """The options with what was left to the backbone in place."""
    rank, targets, dora = (8, ("q", "v"), "row") if is_vit(site) else (64, ("X",), "column")
    return dataclasses.replace(
        opt,
        rank=rank if opt.rank is None else opt.rank,
        targets=targets if opt.targets is None else opt.targets,
        dora={True: dora, False: "none"}.get(opt.dora, opt.dora),
    )


def places(site, i: int, targets) -> list[tuple[str, slice, str]]:
    """(published name, rows, layer) of each target in block i; the patch embedding counts to block 0."""
    block, found = site.blocks[i], []
    d, e, n, r, all_rows = block.width, block.e, block.n, block.r, slice(None)
    parts = {
        "X": ("in_proj", slice(0, e)), "Z": ("in_proj", slice(e, 2 * e)), "dt": ("dt_proj", all_rows),
        "d": ("x_proj", slice(0, r)), "B": ("x_proj", slice(r, r + n)), "C": ("x_proj", slice(r + n, r + 2 * n)),
        "q": ("qkv", slice(0, d)), "k": ("qkv", slice(d, 2 * d)), "v": ("qkv", slice(2 * d, 3 * d)),
    }  # fmt: skip
    names = layers(site, i)
    for target in targets:
        if target == "embed":
            found += [(EMBED, all_rows, "embed")] if i == 0 else []
            continue
        layer, rows = parts.get(target, (target, all_rows))
        for twin in ("", "_b") if target in BOTH_WAYS and f"{layer}_b" in names else ("",):
            found.append((f"{names[layer + twin]}.weight", rows, layer + twin))
    return found
