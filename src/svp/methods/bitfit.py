"""BitFit: every bias that the network has is trained (arXiv 2106.10199)."""

from __future__ import annotations

import torch
from torch import nn

from svp.methods.base import Method


class BitFit(Method):
    """b' = b + o for every bias b of the backbone, its source head left alone; o starts at zero,
    so that decay, where a recipe decays biases (`decay=all`), pulls to b.

    On Vim these are the biases of the patch embedding, the convolutions and delta (conv1d, dt_proj, both directions); on a
    ViT those of norms, qkv, proj, fc1, fc2 and the patch embedding. Direct on both.
    Ours: that o and not b trains.
    Source: arXiv 2106.10199.
    """

    paper = "arXiv 2106.10199"
    params_formula = "all biases: Vim 4 depth e + d; ViT-B/16 102,912"
    default_lr = 3e-3

    @classmethod
    def unfit(cls, site, opt):
        return None if biases(site.weights) else f"{site.name} has no bias"

    def __init__(self, site, opt, num_classes):
        super().__init__(site, opt, num_classes)
        self.names = biases(site.weights)
        self.offsets = nn.ParameterList(torch.zeros_like(site.weights[name]) for name in self.names)

    def weights(self, w):
        return {name: w[name] + offset for name, offset in zip(self.names, self.offsets, strict=True)}


def biases(weights) -> list[str]:
    return [name for name in weights if name.endswith(".bias") and not name.startswith("head.")]
