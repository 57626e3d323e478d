"""Visual Prompt Tuning: trained tokens beside the picture's, at the first block or anew at every block (arXiv 2203.12119)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from svp.methods._layers import is_vit
from svp.methods.base import Method
from svp.options import option

Position = Literal["pre", "post", "both", "uniform", "middle", "middle_before"]


class VPT(Method):
    """T prompt tokens P_i are inserted into the sequence; `deep` puts fresh ones into their places before every block.

    Prompts get no position. On a ViT they stand between class token and patches. On Vim, whose scans have an order, the
    places are an option, and so is what happens to the running sum there: "replace" clears it, so that the block reads P_i
    alone as VPT means it; "hidden_only" overwrites the last mixer's output; "add" adds to it.
    Ours: the definitions of the places pre, post, both, uniform and middle, which arXiv 2412.08947 Table 3 only names.
    Left out: the released code's mixtures (prompt+bias, cls+prompt), which are compositions here: vpt+bitfit, vpt+partial.
    Source: arXiv 2203.12119; repository KMnP/vpt, src/models/vit_prompt/vit.py.
    """

    @dataclass(frozen=True)
    class Options:
        num_tokens: int = option(10, "prompt tokens", low=1, high=4096)
        deep: bool = option(True, "prompts of their own before every block; else at the first block only")
        dropout: float | None = option(
            None, "on the prompts, in training; none: 0.1 deep, 0 shallow", low=0.0, high=0.9
        )
        project: int | None = option(
            None, "prompts of this width, one projection for all blocks; none: the network's", low=1
        )
        position: Position = option("pre", "where the tokens stand in Vim's sequence")
        vim_deep: Literal["replace", "hidden_only", "add"] = option(
            "replace", "what deep prompts do to their places on Vim"
        )

    PRESETS = {"shallow": dict(deep=False), "deep": {}}
    paper = "arXiv 2203.12119 (ECCV 2022); on Vim: the VPT rows of arXiv 2412.08947, positions as defined here"
    params_formula = "deep: depth T e, shallow: T e, with e = d; with a projection e = project and + e d + d"
    default_lr = 3e-2
    acts_before_blocks = True

    @classmethod
    def unfit(cls, site, opt):
        if is_vit(site) and opt.position != "pre":
            return f'attention knows no order of tokens: position "{opt.position}" means the same as "pre"'
        if is_vit(site) and opt.vim_deep != "replace":
            return f'vim_deep "{opt.vim_deep}" is of the running sum between the blocks of a Vim'
        if opt.position.startswith("middle") and len(site.cls) != 1:
            return f'position "{opt.position}" needs one class token, {site.name} has {len(site.cls)}'
        if len({block.width for block in site.blocks}) > 1:
            return "tokens cannot be inserted into a two-dimensional map whose width changes"
        return None

    @classmethod
    def label(cls, site, opt):
        return None if is_vit(site) else "vpt_vim"

    def __init__(self, site, opt, num_classes):
        if opt.dropout is None:
            opt = dataclasses.replace(opt, dropout=0.1 if opt.deep else 0.0)
        super().__init__(site, opt, num_classes)
        d, depth = site.blocks[0].width, len(site.blocks)
        e = opt.project or d
        bound = math.sqrt(6 / (3 * site.patch_size**2 + e))
        self.prompts = nn.Parameter(torch.empty(depth if opt.deep else 1, opt.num_tokens, e).uniform_(-bound, bound))
        self.proj: nn.Module = nn.Identity()
        if opt.project:
            self.proj = nn.Linear(e, d)
            nn.init.kaiming_normal_(self.proj.weight, a=0, mode="fan_out")
        self.drop = nn.Dropout(opt.dropout)
        self.inserts, self.counts_tokens = True, opt.deep
        self.attends = is_vit(site)

    def block(self, tokens, i, run):
        if i > 0 and not self.opt.deep:
            return run(tokens)
        prompt = self.prompt(tokens, i)  # (b, T, d)
        if i == 0:
            return run(tokens.insert(prompt, self.before(tokens)))
        return run(replaced(tokens, prompt, self.opt.vim_deep))

    def prompt(self, tokens, i: int) -> Tensor:
        """(b, T, d) what stands in the prompts' places when block i begins."""
        return self.drop(self.proj(self.prompts[i]).expand(len(tokens.x), -1, -1))

    def before(self, tokens) -> list[int]:
        """The positions of today's sequence that prompts are inserted in front of."""
        length = tokens.x.shape[1]
        if self.attends:
            return [length - len(tokens.patches)] * self.opt.num_tokens
        return places(self.opt.position, length, self.opt.num_tokens, tokens.cls)


def places(position: str, n: int, count: int, cls: tuple[int, ...]) -> list[int]:
    """In front of which of n tokens `count` prompts are inserted (n: behind the last), in ascending order.

    pre        all before the first;  post: all behind the last;  both: half (the larger first) at either end
    uniform    prompt j before token floor((j + 1) n / (count + 1))
    middle     half (the larger first) before the class token, the rest right behind it;  middle_before: all before it
    Source: ours; arXiv 2412.08947 Table 3 gives the names.
    """
    half = math.ceil(count / 2)
    if position == "uniform":
        return [(j + 1) * n // (count + 1) for j in range(count)]
    first, last, many = {
        "pre": (0, 0, count), "post": (n, n, count), "both": (0, n, half),
        "middle": (cls[0], cls[0] + 1, half) if cls else (0, 0, count),
        "middle_before": (cls[0] if cls else 0, 0, count),
    }[position]  # fmt: skip
    return [first] * many + [last] * (count - many)


def replaced(tokens, prompt: Tensor, how: str):
    """The tokens with (b, T, d) in the places of the prompts; see `vim_deep`."""
    at = tokens.prompts
    if how == "replace":
        return tokens.put(prompt, at)
    if how == "add":
        return tokens.add(prompt, at)
    return tokens._replace(x=tokens.x.index_copy(1, at, prompt.to(tokens.x.dtype)))
