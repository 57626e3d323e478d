"""Prefix tuning: every attention layer gets trained keys and values before its first token (arXiv 2101.00190)."""

from __future__ import annotations

from dataclasses import dataclass

from svp.methods._generator import Generator
from svp.methods.base import Method
from svp.options import option
from svp.seams import KV


class PrefixTuning(Method):
    """n keys and values of each block, as a table that starts N(0, 1), or made by a network from an embedding.

    ViT: direct. Vim has no attention: `affix` is the same idea there.
    Ours: what the published reparametrisation leaves open on pictures, start values and widths.
    Source: arXiv 2101.00190.
    """

    @dataclass(frozen=True)
    class Options:
        n: int = option(10, "keys and values of each block", low=1, high=4096)
        projection: bool = option(False, "a network makes them from an embedding")
        hidden: int | None = option(None, "width inside that network; none: the network's own", low=1)

    PRESETS = {"projection": dict(projection=True)}
    paper = "arXiv 2101.00190 (ACL 2021)"
    params_formula = "2 depth n d; with projection n d + d h + h + (h + 1) 2 depth d, with h = hidden"
    default_lr = 1e-2

    @classmethod
    def unfit(cls, site, opt):
        if not all(block.heads for block in site.blocks):
            return "it needs attention, which this network does not have; on Vim take affix"
        return None if opt.projection or opt.hidden is None else "hidden belongs to projection=true"

    def __init__(self, site, opt, num_classes):
        super().__init__(site, opt, num_classes)
        d = site.blocks[0].width
        self.heads = [block.heads for block in site.blocks]
        widths = [2 * block.width for block in site.blocks]
        self.generator = Generator(opt.n, widths, projection=opt.projection, width=d, hidden=opt.hidden)

    def memory(self, i, w):
        k, v = self.generator(i).unflatten(1, (2, self.heads[i], -1)).permute(1, 2, 0, 3)  # (heads, n, d / heads) each
        return KV(k[None], v[None])
