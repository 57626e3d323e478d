"""Targets and their loss: smoothed labels, and pictures mixed in pairs."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from svp.ops.precision import wide
from svp.training.recipe import Recipe


class Criterion(nn.Module):
    """Mean cross-entropy of logits (b, C) against labels (b,), smoothed, or against target shares (b, C) as they are.

    Labels: (1 - s) nll + s mean over classes of -log p, as timm's LabelSmoothingCrossEntropy; shares: as its
    SoftTargetCrossEntropy (mixing has smoothed them already).
    """

    def __init__(self, smoothing: float):
        super().__init__()
        self.smoothing = smoothing

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        logits = wide(logits)
        if target.is_floating_point():
            return F.cross_entropy(logits, target.to(logits.dtype))
        return F.cross_entropy(logits, target, label_smoothing=self.smoothing)


class Mixer:
    """timm's mixup and cutmix for any batch: an odd last picture stays whole. Draws from numpy's global generator."""

    def __init__(self, recipe: Recipe, num_classes: int):
        from timm.data import Mixup

        self.mixup: Any = Mixup(
            mixup_alpha=recipe.mixup, cutmix_alpha=recipe.cutmix, prob=recipe.mixup_prob, switch_prob=recipe.mixup_switch,
            mode="batch", label_smoothing=recipe.label_smoothing, num_classes=num_classes,
        )  # fmt: skip
        self.smoothing, self.num_classes = recipe.label_smoothing, num_classes

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """images (b, 3, H, W), labels (b,) -> mixed images and target shares (b, C)."""
        even = len(images) - len(images) % 2
        targets = F.one_hot(labels, self.num_classes).to(images.dtype)
        targets = targets * (1 - self.smoothing) + self.smoothing / self.num_classes
        images = images.clone()
        if even:
            images[:even], targets[:even] = self.mixup(images[:even], labels[:even])
        return images, targets
