"""Full fine-tuning: a copy of every tensor of the backbone is trained."""

from __future__ import annotations

import torch
from torch import nn

from svp.methods.base import Method


class Full(Method):
    """weights: the method's own copy in place of each published tensor; also how a backbone is pre-trained.

    The source head is not part of it (the model has a head of its own). `merge()` gives the trained backbone.
    Left out: the released VPT's AdamW, whose weight decay is 0.01 whatever is asked for: `-r weight_decay=0.01`.
    """

    paper = "the common baseline; arXiv 2412.08947 Table 1, row Full"
    params_formula = "all tensors of the backbone without its head"
    default_lr = 5e-4
    order = -2

    def __init__(self, site, opt, num_classes):
        super().__init__(site, opt, num_classes)
        self.names = [name for name in site.weights if not name.startswith("head.")]
        self.copies = nn.ParameterList(torch.clone(site.weights[name]) for name in self.names)

    def weights(self, w):
        return dict(zip(self.names, self.copies, strict=True))

    def groups(self):
        """Positions and class tokens are not decayed, as timm's rule has it."""
        plain = {f"copies.{i}": {"decay": 0.0} for i, name in enumerate(self.names) if _undecayed(name)}
        return plain


def _undecayed(name: str) -> bool:
    return name.rsplit(".")[-1] in ("pos_embed", "cls_token", "reg_token", "cls_token_head", "cls_token_tail")
