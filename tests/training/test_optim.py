"""Learning rates, decay groups and optimiser steps, against the released numbers."""

import csv
import math

import pytest
import torch
from torch import nn

from support import GOLDEN
from svp.errors import SvpError
from svp.training.optim import Average, clip_gradients, lr_at, optimizer_for, parameter_groups, warmup_steps
from svp.training.recipe import Recipe, recipe_named
from svp.training.recipes.svp_released import RECIPES as RELEASED

COLUMNS = {
    "CUB200": "svp-cub200", "CIFAR": "svp-cifar100", "CIFAR10": "svp-cifar10", "DTD": "svp-dtd", "DOGS": "svp-dogs",
    "GTSRB": "svp-gtsrb", "NABIRDS": "svp-nabirds", "SVHN": "svp-svhn", "FLOWERS": "svp-flowers102", "FOOD": "svp-food101",
}  # fmt: skip


def test_released_schedules_to_the_last_digit():
    with open(GOLDEN / "svp" / "lr_schedule.csv", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 100
    assert set(rows[0]) == {"epoch", *COLUMNS} and set(COLUMNS.values()) == set(RELEASED)
    for column, name in COLUMNS.items():
        recipe = recipe_named(name)
        for row in rows:
            epoch = int(row["epoch"])
            for step in (epoch * 7, epoch * 7 + 6):  # the same in all steps of an epoch
                assert lr_at(recipe, recipe.base_lr, step, 7) == float(row[column]), (name, epoch)


def test_cosine_warms_up_and_ends_low():
    recipe = Recipe(epochs=10, lr=1.0, warmup=0.1, min_lr=0.01)
    rates = [lr_at(recipe, 1.0, step, 10) for step in range(100)]
    assert warmup_steps(recipe, 10) == 10
    assert rates[0] == 0.1 and rates[9] == 1.0 == max(rates)
    assert rates[9:] == sorted(rates[9:], reverse=True) and 0.01 < rates[-1] < 0.02
    assert rates[55] == pytest.approx(0.01 + 0.99 / 2 * (1 + math.cos(math.pi / 2)))


@pytest.mark.parametrize(
    "unit, value, steps", [("fraction", 0.05, 5), ("epochs", 2, 20), ("steps", 7, 7), ("steps", 999, 100)]
)
def test_warmup_units(unit, value, steps):
    assert warmup_steps(Recipe(epochs=10, warmup=value, warmup_unit=unit), 10) == steps


def test_constant_stays():
    recipe = Recipe(epochs=2, schedule="constant", warmup=0.0)
    assert {lr_at(recipe, 0.3, step, 5) for step in range(10)} == {0.3}


@pytest.mark.parametrize("first", ["above", "start"])
@pytest.mark.parametrize("schedule", ["cosine", "cosine_epoch", "milestones", "constant"])
def test_every_schedule_warms_up_and_never_rises_above_its_rate(schedule, first):
    recipe = Recipe(epochs=10, lr=1.0, schedule=schedule, warmup=0.25, warmup_first=first, warmup_lr=0.1)
    rates = [lr_at(recipe, 1.0, step, 7) for step in range(70)]
    assert rates[0] == 0.1 if first == "start" else rates[0] > 0.1
    top = rates.index(max(rates))
    assert rates[top] == 1.0 and rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


# -- groups ------------------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.method = nn.ModuleDict({"inner": nn.Linear(3, 3)})
        self.method.alpha = nn.ParameterDict({"0": nn.Parameter(torch.zeros(3))})
        self.method.table = nn.Parameter(torch.zeros(2, 3))
        self.head = nn.Linear(3, 2)


def grouped(recipe, rules=None):
    groups = parameter_groups(Toy().named_parameters(), recipe, rules or {})
    return {name: group for group in groups for name in group["names"]}


def test_biases_and_vectors_are_not_decayed():
    found = grouped(Recipe(lr=1.0, weight_decay=0.1))
    decayed = {name for name, group in found.items() if group["weight_decay"]}
    assert decayed == {"method.inner.weight", "method.table", "head.weight"}
    assert all(group["weight_decay"] in (0.0, 0.1) and group["base_lr"] == 1.0 for group in found.values())


def test_without_decay_there_is_one_group():
    assert len(parameter_groups(Toy().named_parameters(), Recipe(lr=1.0, weight_decay=0.0), {})) == 1
    assert len(parameter_groups(Toy().named_parameters(), Recipe(lr=1.0, decay="all"), {})) == 1


def test_rules_of_a_method_win():
    rules = {
        "alpha.*": {"decay_scale": 1.0, "lr_scale": 10.0}, "head.*": {"lr": 40.0}, "table": {"decay": 0.0, "clip": 2.0},
        "inner.*": {"decay_scale": 3.0},
    }  # fmt: skip
    found = grouped(Recipe(lr=0.1, weight_decay=0.01), rules)
    got = {name: (group["base_lr"], group["weight_decay"], group["clip"]) for name, group in found.items()}
    assert got["method.alpha.0"] == (1.0, 0.01, 0.0)
    assert got["head.weight"] == (40.0, 0.01, 0.0) and got["head.bias"] == (40.0, 0.0, 0.0)
    assert got["method.table"] == (0.1, 0.0, 2.0)
    assert got["method.inner.bias"] == (0.1, 0.03, 0.0)


def test_nothing_to_train_is_said():
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(SvpError, match="nothing trains"):
        parameter_groups(frozen.named_parameters(), Recipe(lr=1.0), {})


def test_clipping_by_group_then_over_all():
    a, b = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    a.grad, b.grad = torch.full((4,), 3.0), torch.full((4,), 4.0)
    clip_gradients([dict(params=[a], clip=1.0), dict(params=[b], clip=0.0)], 0.0)
    assert a.grad.norm() == pytest.approx(1.0, rel=1e-5) and b.grad.norm() == 8.0
    clip_gradients([dict(params=[a], clip=0.0), dict(params=[b], clip=0.0)], 0.5)
    assert torch.cat([a.grad, b.grad]).norm() == pytest.approx(0.5, rel=1e-5)
    clip_gradients([dict(params=[a], clip=0.0, clip_value=0.01), dict(params=[b], clip=0.0, clip_value=0.0)], 0.0)
    assert a.grad.eq(0.01).all() and b.grad.gt(0.2).all()


BY_HAND = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, betas=(0.7, 0.8), eps=0.01, fused=False),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.1, betas=(0.7, 0.8), eps=0.01, fused=False),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.6, fused=False),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_optimisers_step_as_those_of_torch(name):
    recipe = Recipe(optimizer=name, lr=0.1, weight_decay=0.2, betas=(0.7, 0.8), eps=0.01, momentum=0.6)
    torch.manual_seed(0)
    ours, theirs = Toy().double(), Toy().double()
    theirs.load_state_dict(ours.state_dict())
    matrices = [p for p in theirs.parameters() if p.ndim > 1]
    vectors = [p for p in theirs.parameters() if p.ndim == 1]
    by_hand = BY_HAND[name]([dict(params=matrices, weight_decay=0.2), dict(params=vectors, weight_decay=0.0)])
    optimizer = optimizer_for(parameter_groups(ours.named_parameters(), recipe, {}), recipe)
    for step in range(3):
        for toy, chosen in ((ours, optimizer), (theirs, by_hand)):
            generator = torch.Generator().manual_seed(step)
            for p in toy.parameters():
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            chosen.step()
    for (key, got), want in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14, msg=key)


# -- averaged weights --------------------------------------------------------------------------------------------------


def test_average_is_timms():
    from timm.utils import ModelEmaV3

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    mine, theirs = Average(net, 0.9), ModelEmaV3(net, decay=0.9)
    for _ in range(4):
        with torch.no_grad():
            for p in net.parameters():
                p += torch.randn_like(p)
        net(torch.randn(5, 3))
        mine.update()
        theirs.update(net)
    for name, value in theirs.module.state_dict().items():
        torch.testing.assert_close(mine.values[name], value)
