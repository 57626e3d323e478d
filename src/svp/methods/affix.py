"""Affix-tuning: trained tokens walk through every scan before the picture's (arXiv 2411.03855)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from svp.errors import nearest
from svp.methods._generator import Generator
from svp.methods.base import Method
from svp.options import option
from svp.seams import Scan

TYPES = ("inner_dual_prefix", "inner_single_prefix", "outer_dual_prefix", "outer_single_prefix")


class Affix(Method):
    """n tokens before the sequence of each direction of each block; their outputs are dropped.

    All the picture sees of them is the state and the last inputs of the convolution that they leave behind, so the block's
    own weights run over them once and a scan starts from there (`memory`, `Scan.before`); equal to inserting them.
    inner   tokens are columns behind in_proj, for each direction its own (dual) or the same (single)
    outer   tokens stand before in_proj, without the block's norm: in front of the sequence (single: the backward scan meets
            them last, when nothing is left to see them) and behind it too (dual)
    The z half of an inner token gates its own dropped output only: `x_only` leaves these dead numbers out.
    Embeddings start N(0, 1), not at the frozen network. Vim: direct. On a ViT the same idea is `prefix_tuning`.
    Ours: a LoRA with dropout on in_proj stands beside the layer and is not seen by outer tokens.
    Left out: suffixes, whose gradient is exactly zero, as scans look back only; infixes, which stand between the picture's
    tokens and so are nothing a scan could start from; the released centfixes, which cut columns at wrong positions.
    Source: arXiv 2411.03855; repository sony/MambaPEFT, PrefixEncoder and prefix_type.
    """

    @dataclass(frozen=True)
    class Options:
        n: int = option(3, "tokens of each direction; published: 3 on Vim-S, 2 on Vim-B", low=1, high=4096)
        type: str = option("inner_dual_prefix", "which tokens: " + ", ".join(TYPES))
        projection: bool = option(False, "a network makes the tokens from an embedding")
        hidden: int | None = option(None, "width inside that network; none: of its embedding", low=1)
        x_only: bool = option(True, "inner tokens without their dead z half")

    PRESETS = {"published": dict(x_only=False), "projection": dict(projection=True, x_only=False)}
    paper = "arXiv 2411.03855 (ICLR 2025)"
    params_formula = (
        "out = depth · (dual 2, single 1) · (inner e, without x_only 2 e; outer d); n out, with projection "
        "n c + c h + h + h out + out with c = 2 e (outer d), h = hidden"
    )
    default_lr = 1e-2

    @classmethod
    def unfit(cls, site, opt):
        if not all(block.n for block in site.blocks):
            return "it starts a scan, which this network does not have; on a ViT take prefix_tuning"
        if opt.type not in TYPES:
            if "suffix" in opt.type:
                return "a suffix never learns: scans look back only, so its gradient is exactly zero"
            if "infix" in opt.type or "centfix" in opt.type:
                return f"type '{opt.type}' is not offered, only {', '.join(TYPES)}"
            close = nearest(opt.type, TYPES)
            return f"type '{opt.type}' is none of {', '.join(TYPES)}" + (f"; did you mean {close[0]}?" if close else "")
        if any(f"layers.{i}.mixer.x_proj_b.weight" not in site.weights for i in range(len(site.blocks))):
            return "it needs two directions with weights of their own"
        return None if opt.projection or opt.hidden is None else "hidden belongs to projection=true"

    def __init__(self, site, opt, num_classes):
        super().__init__(site, opt, num_classes)
        self.is_inner, count = opt.type.startswith("inner"), 2 if "dual" in opt.type else 1
        self.count, halves = count, 1 if opt.x_only else 2  # kinds of tokens; x, or x and z
        widths = [count * (halves * block.e if self.is_inner else block.width) for block in site.blocks]
        width = 2 * site.blocks[0].e if self.is_inner else site.blocks[0].width
        self.generator = Generator(opt.n, widths, projection=opt.projection, width=width, hidden=opt.hidden)

    def tokens(self, i: int) -> Tensor:
        """(1, n, kinds · width) of block i."""
        return self.generator(i)[None]

    def memory(self, i, w):
        return Scan(before=tuple(self.columns(self.tokens(i), w)))

    def columns(self, tokens: Tensor, w) -> list[Tensor]:
        """What each direction's convolution gets of the tokens, in its own order: two of (1, n, e)."""
        e = w["D"].shape[0]
        parts = list(tokens.chunk(self.count, dim=-1))
        if self.is_inner:
            return [part[..., :e] for part in parts] * (2 // self.count)
        bias = w.get("in_proj.bias")
        forward, *backward = (F.linear(p, w["in_proj.weight"][:e], None if bias is None else bias[:e]) for p in parts)
        return [forward, backward[0].flip(1) if backward else forward[:, :0]]
