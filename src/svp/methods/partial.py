"""Partial tuning: chosen tensors of a Mamba block get a trained offset (arXiv 2411.03855)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from svp.errors import nearest
from svp.methods._layers import is_vit
from svp.methods.base import Method
from svp.options import option

PARTS = {  # name: the tensors of a block, or of the network, that it means
    "A": ("A_log", "A_b_log"), "D": ("D", "D_b"), "conv1d": ("conv1d.weight", "conv1d_b.weight"),
    "bias": ("dt_proj.bias", "dt_proj_b.bias"), "conv1d_bias": ("conv1d.bias", "conv1d_b.bias"),
    "cls": ("cls_token", "cls_token_head", "cls_token_tail"), "pos": ("pos_embed",),
}  # fmt: skip
DECAY = {"A": 10.0, "D": 10.0, "conv1d": 10.0, "bias": 100.0}  # published multipliers of the weight decay


class Partial(Method):
    """w' = w + o, o zero at the start, so that weight decay pulls towards the pre-trained value.

    A: A = -exp(A_log + o) · D · conv1d: the taps · bias: that of delta · conv1d_bias · cls · pos
    The weight decay of A, D and conv1d is 10 times the recipe's, of bias 100 times, as published. Vim: direct. A ViT has
    cls and pos only (adapted, preset "tokens").
    Ours: conv1d_bias.
    Left out: training the tensors themselves (the flags without `_v2`), which weight decay pulls to zero.
    Source: arXiv 2411.03855, repository sony/MambaPEFT (the `_v2` flags).
    """

    @dataclass(frozen=True)
    class Options:
        parts: tuple[str, ...] = option(("conv1d",), "which tensors: " + ", ".join(PARTS))

    PRESETS = {"tokens": dict(parts=("cls", "pos"))}
    paper = "arXiv 2411.03855 (ICLR 2025)"
    params_formula = (
        "A: 2 depth e n · D, bias, conv1d_bias: 2 depth e · conv1d: 2 depth e taps · cls: d · pos: (patches + 1) d"
    )
    default_lr = 3e-3

    @classmethod
    def unfit(cls, site, opt):
        for part in opt.parts:
            if part not in PARTS:
                close = nearest(part, PARTS)
                return f"part '{part}' is none of {', '.join(PARTS)}" + (f"; did you mean {close[0]}?" if close else "")
            if not names_of(part, site):
                return f"{site.name} has no tensors for '{part}'"
        twice = next((part for part in opt.parts if opt.parts.count(part) > 1), None)
        if twice:
            return f"part '{twice}' stands twice"
        return "no part is named" if not opt.parts else None

    @classmethod
    def label(cls, site, opt):
        return "partial_vit" if is_vit(site) else None

    def __init__(self, site, opt, num_classes):
        super().__init__(site, opt, num_classes)
        found = [(name, part) for part in opt.parts for name in names_of(part, site)]
        self.names = [name for name, _ in found]
        self.parts = [part for _, part in found]
        self.offsets = nn.ParameterList(torch.zeros_like(site.weights[name]) for name in self.names)

    def weights(self, w):
        return {name: w[name] + offset for name, offset in zip(self.names, self.offsets, strict=True)}

    def groups(self):
        return {f"offsets.{i}": {"decay_scale": DECAY[part]} for i, part in enumerate(self.parts) if part in DECAY}


def names_of(part: str, site) -> list[str]:
    """Published names of the tensors that a part means."""
    ends = PARTS[part]
    return [name for name in site.weights if name in ends or (".mixer." in name and name.split(".mixer.")[1] in ends)]
