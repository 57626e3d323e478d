"""What the optimiser is told: groups of parameters, and the learning rate of every step."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from svp.errors import SvpError
from svp.training.recipe import ONCE_AN_EPOCH, Recipe


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], recipe: Recipe, rules: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """Groups for a torch optimiser, each with its `base_lr`, `weight_decay`, `clip`, `clip_value` and the `names` in it.

    Not decayed: biases and tensors of one axis (timm 0.4.12), unless recipe.decay is "all"; without decay nothing is
    told apart. A rule {pattern: dict(lr=, lr_scale=, decay=, decay_scale=, clip=, clip_value=)} of a method speaks of its
    own names ("alpha.*") or of whole ones ("head.*") and wins; of several that match, the later one. lr and decay are
    absolute, the scales multiply the recipe's values, clip is the largest gradient norm of the group and clip_value its
    largest element.
    """
    groups: dict[tuple, dict[str, Any]] = {}
    for name, p in named:
        if not p.requires_grad:
            continue
        rule: dict[str, float] = {}
        for pattern, row in rules.items():
            if any(fnmatch.fnmatchcase(n, pattern) for n in (name, name.removeprefix("method."))):
                rule |= row
        lr = rule.get("lr", recipe.base_lr * rule.get("lr_scale", 1.0))
        decay = rule.get("decay", recipe.weight_decay * rule.get("decay_scale", float(_decays(name, p, recipe))))
        key = (lr, decay, rule.get("clip", 0.0), rule.get("clip_value", 0.0))
        group = groups.setdefault(
            key,
            dict(params=[], names=[], base_lr=lr, lr=lr, weight_decay=decay, clip=key[2], clip_value=key[3]),
        )
        group["params"].append(p)
        group["names"].append(name)
    if not groups:
        raise SvpError("nothing trains: the method and the head have no parameters", "svp list methods", "usage")
    return list(groups.values())


def _decays(name: str, p: nn.Parameter, recipe: Recipe) -> bool:
    return recipe.decay == "all" or not (p.ndim <= 1 or name.endswith(".bias"))


def optimizer_for(groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser; on the CPU and on CUDA torch's fused form, which walks all tensors in one call."""
    params = [p for group in groups for p in group["params"]]
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in params)
    first, second = recipe.betas
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.base_lr, momentum=recipe.momentum, fused=fused)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[recipe.optimizer]
    return kind(groups, lr=recipe.base_lr, betas=(first, second), eps=recipe.eps, fused=fused)


def clip_gradients(groups: list[dict[str, Any]], largest: float) -> None:
    """Keep gradients within the largest element and norm of their group, then within a norm of all together; 0: no limit."""
    for group in groups:
        if group.get("clip_value", 0.0) > 0:  # a checkpoint of an earlier version has none
            nn.utils.clip_grad_value_(group["params"], group["clip_value"])
        if group["clip"] > 0:
            nn.utils.clip_grad_norm_(group["params"], group["clip"])
    if largest > 0:
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], largest)


# -- the learning rate -------------------------------------------------------------------------------------------------


def lr_at(recipe: Recipe, base_lr: float, step: int, steps_per_epoch: int) -> float:
    """The learning rate of optimiser step `step` (from 0) for a group whose own rate is base_lr: a pure function.

    cosine        linear from warmup_lr to base_lr, then half a cosine from base_lr down to min_lr, which the end would reach
    cosine_epoch  the same counted in epochs: a rate holds for a whole one (arXiv 2203.12119, released code)
    timm_epoch    timm 0.4.12 as DeiT's loop steps it, after each epoch with that epoch's number: epochs 0 and 1 share a
                  rate, and the cosine counts the warm-up epochs (arXiv 2412.08947, released code)
    milestones    times gamma from each of the epochs int(milestone * epochs) on (arXiv 2211.11635, released code)
    """
    epoch = step // steps_per_epoch
    if recipe.schedule == "timm_epoch":
        return _timm_epoch(recipe, base_lr, max(epoch - 1, 0))
    if recipe.schedule in ONCE_AN_EPOCH:
        step, steps_per_epoch = epoch, 1
    total = recipe.epochs * steps_per_epoch
    warm = warmup_steps(recipe, steps_per_epoch)
    if step < warm:
        done = (step + (recipe.warmup_first == "above")) / warm
        return recipe.warmup_lr + (base_lr - recipe.warmup_lr) * done
    if recipe.schedule == "constant":
        return base_lr
    if recipe.schedule == "milestones":
        return base_lr * recipe.gamma ** sum(epoch >= int(share * recipe.epochs) for share in recipe.milestones)
    done = (step - warm) / max(total - warm, 1)
    return recipe.min_lr + 0.5 * (base_lr - recipe.min_lr) * (1 + math.cos(math.pi * done))


def warmup_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    total = recipe.epochs * steps_per_epoch
    steps = {"fraction": recipe.warmup * total, "epochs": recipe.warmup * steps_per_epoch, "steps": recipe.warmup}
    return min(round(steps[recipe.warmup_unit]), total)


def _timm_epoch(recipe: Recipe, base_lr: float, t: int) -> float:
    warm = round(recipe.warmup * (recipe.epochs if recipe.warmup_unit == "fraction" else 1))
    if t < warm:
        return recipe.warmup_lr + t * ((base_lr - recipe.warmup_lr) / warm)
    return recipe.min_lr + 0.5 * (base_lr - recipe.min_lr) * (1 + math.cos(math.pi * t / recipe.epochs))


# -- averaged weights --------------------------------------------------------------------------------------------------


class Average:
    """Exponential moving average of a state dict (timm's ModelEmaV3 without warm-up), over what trains and its buffers."""

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.values = {name: t.detach().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        for name, now in self.model.state_dict().items():
            if now.is_floating_point():
                self.values[name].lerp_(now, 1.0 - self.decay)
            else:
                self.values[name].copy_(now)

    def load(self, values: dict[str, Tensor]) -> None:
        self.values = {name: values[name].to(t.device).clone() for name, t in self.values.items()}
