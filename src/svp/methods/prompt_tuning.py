"""Prompt tuning in the token sequence: tokens at the first block that stay through all (arXiv 2411.03855)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from svp.methods._generator import Generator
from svp.methods._layers import is_vit
from svp.methods.base import Method
from svp.options import option


class PromptTuning(Method):
    """n tokens enter once, in front of the sequence, behind it, or half (the larger first) at either end; no positions.

    They start N(0, 1) or are made by a network from an embedding. Vim: direct. ViT: adapted; attention knows no order, so
    `prefix` is the only place. `vpt` with deep=false is the same idea with other start values.
    Left out: the type infix, whose released class position is wrong.
    Source: arXiv 2411.03855; repository sony/MambaPEFT, prompt_type.
    """

    @dataclass(frozen=True)
    class Options:
        n: int = option(8, "tokens", low=1, high=4096)
        type: Literal["prefix", "suffix", "prefix_suffix"] = option("prefix", "where they stand")
        projection: bool = option(False, "a network makes the tokens from an embedding")
        hidden: int | None = option(None, "width inside that network; none: the backbone's", low=1)

    PRESETS = {"projection": dict(projection=True)}
    paper = "arXiv 2411.03855 (ICLR 2025)"
    params_formula = "n d; with projection n d + d h + h + h d + d, with h = hidden"
    default_lr = 1e-2
    inserts = True
    acts_before_blocks = True

    @classmethod
    def unfit(cls, site, opt):
        if len({block.width for block in site.blocks}) > 1:
            return "tokens cannot be inserted into a two-dimensional map whose width changes"
        if is_vit(site) and opt.type != "prefix":
            return f'attention knows no order of tokens: type "{opt.type}" means the same as "prefix"'
        return None if opt.projection or opt.hidden is None else "hidden belongs to projection=true"

    @classmethod
    def label(cls, site, opt):
        return "prompt_tuning_vit" if is_vit(site) else None

    def __init__(self, site, opt, num_classes):
        super().__init__(site, opt, num_classes)
        d = site.blocks[0].width
        self.generator = Generator(opt.n, [d], projection=opt.projection, width=d, hidden=opt.hidden)

    def block(self, tokens, i, run):
        if i > 0:
            return run(tokens)
        n, length = self.opt.n, tokens.x.shape[1]
        in_front = {"prefix": n, "suffix": 0, "prefix_suffix": n - n // 2}[self.opt.type]
        prompt = self.generator(0).expand(len(tokens.x), -1, -1)
        return run(tokens.insert(prompt, [0] * in_front + [length] * (n - in_front)))
