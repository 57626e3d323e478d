"""Low-rank adaptation of weights, on Mamba also of the partial projections X, Z, delta, B, C (arXiv 2106.09685, 2411.03855)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svp.errors import nearest
from svp.methods.base import Method
from svp.options import option

MAMBA_TARGETS = ("in_proj", "X", "Z", "out_proj", "x_proj", "d", "B", "C", "dt")
BOTH_WAYS = ("x_proj", "d", "B", "C", "dt")  # weights of their own in each direction


class Lora(Method):
    """W' = W + scale · up @ down on every target of every block; the sum is made before any kernel sees it.

    down (rank, in) starts uniform ±1/sqrt(in), up (out, rank) at zero. Mamba targets, with e the inner width, r the rank
    of delta and n the states: `in_proj` (2e, d), its halves `X` and `Z` (e, d), `out_proj` (d, e), and for each direction
    `x_proj` (r + 2n, e), its rows `d` (r), `B` (n), `C` (n), and `dt` (e, r).
    The scale is a plain factor (peft's lora_alpha / r).
    Source: arXiv 2106.09685; the partial forms: arXiv 2411.03855, repository sony/MambaPEFT (scale 0.1).
    """

    @dataclass(frozen=True)
    class Options:
        rank: int = option(64, "rank of the added matrices", low=1)
        scale: float = option(1.0, "factor of the added product; published MambaPEFT: 0.1")
        targets: tuple[str, ...] = option(("X",), "where: " + ", ".join(MAMBA_TARGETS))
        dropout: float = option(0.0, "on the input of the low-rank branch, in training", low=0.0, high=0.9)

    PRESETS = {"published": dict(scale=0.1, dropout=0.1)}
    paper = "arXiv 2106.09685; partial targets: arXiv 2411.03855"
    params_formula = "depth * sum over targets of rank * (in + out)"
    default_lr = 3e-3

    @classmethod
    def unfit(cls, site, opt):
        if any(block.kinds != ("mixer",) for block in site.blocks):
            return "its targets are those of Mamba blocks"
        if not opt.targets:
            return f"targets is empty, expected some of {', '.join(MAMBA_TARGETS)}"
        strange = [target for target in opt.targets if target not in MAMBA_TARGETS]
        if strange:
            close = nearest(strange[0], MAMBA_TARGETS)
            return f"targets {', '.join(strange)} are none of {', '.join(MAMBA_TARGETS)}" + (
                f"; did you mean {close[0]}?" if close else ""
            )
        if opt.dropout and set(opt.targets) & set(BOTH_WAYS):
            return "dropout acts on in_proj, X, Z and out_proj only: the other products are made inside the scan"
        widest = max(site.blocks[0].width, site.blocks[0].e)
        if opt.rank > widest:
            return f"rank {opt.rank} is larger than the widest layer ({widest})"
        return None

    def __init__(self, site, opt, num_classes):
        super().__init__(site, opt, num_classes)
        self.slices = [place for i, block in enumerate(site.blocks) for place in places(i, block, opt.targets)]
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for name, rows, _ in self.slices:
            out, d_in = site.weights[name].shape
            bound = 1 / math.sqrt(d_in)
            self.down.append(torch.empty(opt.rank, d_in).uniform_(-bound, bound))
            self.up.append(torch.zeros(out if rows is None else rows.stop - rows.start, opt.rank))
        self.drop = nn.Dropout(opt.dropout)

    def acts(self, seam):
        return seam == ("beside" if self.opt.dropout else "weights")

    def weights(self, w):
        changed: dict[str, Tensor] = {}
        for (name, rows, _), down, up in zip(self.slices, self.down, self.up, strict=True):
            base = changed.get(name, w[name])
            added = self.opt.scale * up @ down
            changed[name] = base + added if rows is None else base + _at_rows(added, rows, base.shape[0])
        return changed

    def beside(self, i):
        terms: dict[str, list] = {}
        for (name, rows, layer), down, up in zip(self.slices, self.down, self.up, strict=True):
            if name.startswith(f"layers.{i}."):
                terms.setdefault(layer, []).append((rows, down, up))
        return {layer: _Branch(self, parts) for layer, parts in terms.items()}

    def merged(self, weights, plain):
        return {**weights, **self.weights(weights)}


class _Branch:
    """The low-rank terms beside one layer: x (b, l, in) -> (b, l, out)."""

    def __init__(self, method: Lora, parts: list):
        self.method, self.parts = method, parts

    def __call__(self, x: Tensor) -> Tensor:
        total: Tensor | None = None
        for rows, down, up in self.parts:
            y = self.method.opt.scale * (self.method.drop(x @ down.T.to(x.dtype)) @ up.T.to(x.dtype))
            if rows is not None:  # a half of in_proj
                y = torch.cat([y, torch.zeros_like(y)] if rows.start == 0 else [torch.zeros_like(y), y], dim=-1)
            total = y if total is None else total + y
        assert total is not None
        return total


def places(i: int, block, targets) -> list[tuple[str, slice | None, str]]:
    """(published name, rows or None for all, layer) of each target in block i."""
    e, n, r = block.e, block.n, block.r
    rows = {
        "in_proj": ("in_proj", None), "X": ("in_proj", slice(0, e)), "Z": ("in_proj", slice(e, 2 * e)),
        "out_proj": ("out_proj", None), "x_proj": ("x_proj", None), "d": ("x_proj", slice(0, r)),
        "B": ("x_proj", slice(r, r + n)), "C": ("x_proj", slice(r + n, r + 2 * n)), "dt": ("dt_proj", None),
    }  # fmt: skip
    found = []
    for target in targets:
        layer, part = rows[target]
        for twin in ("", "_b") if target in BOTH_WAYS and block.k == 2 else ("",):
            found.append((f"layers.{i}.mixer.{layer}{twin}.weight", part, f"{layer}{twin}"))
    return found


def _at_rows(added: Tensor, rows: slice, count: int) -> Tensor:
    """(rows, in) -> (count, in) with zeros elsewhere."""
    return torch.nn.functional.pad(added, (0, 0, rows.start, count - rows.stop))
