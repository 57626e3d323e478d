"""Learning rates of released prompting codes, step by step or epoch by epoch."""

import json

import pytest

from support import GOLDEN
from svp.training.optim import lr_at
from svp.training.recipe import Recipe, resolve

ROWS = json.loads((GOLDEN / "prompts/schedules.json").read_text())
SAID = {  # key in the file: (recipe, optimiser steps of an epoch, every how many the file has a rate)
    "vp_cosine_lr(base=40,warmup=4,steps=20)": (Recipe(epochs=1, lr=40.0, warmup=4, warmup_unit="steps"), 20, 1),
    "damvp_cosine_lr(base=1,warmup=steps//5=4,steps=20)": (Recipe(epochs=1, lr=1.0, warmup=0.2), 20, 1),
    "spt_adjust_lr(lr=1e-3,min=1e-8,warm=2,epochs=10), epoch=0,0.5,1,...": (
        Recipe(epochs=10, lr=1e-3, min_lr=1e-8, warmup=2, warmup_unit="epochs", warmup_first="start"), 2, 1,
    ),
    "vpt_WarmupCosine(base=1,warmup=3,total=10) per epoch": (
        Recipe(epochs=10, lr=1.0, schedule="cosine_epoch", warmup=3, warmup_unit="epochs", warmup_first="start"), 7, 7,
    ),
    "ilm_multistep(base=1,epochs=10,milestones=int(.5E),int(.72E),gamma=.1)": (
        Recipe(epochs=10, lr=1.0, schedule="milestones", milestones=(0.5, 0.72), gamma=0.1, warmup=0.0), 7, 7,
    ),
}  # fmt: skip


def test_every_published_row_can_be_said():
    assert SAID.keys() == ROWS.keys()


@pytest.mark.parametrize("key", SAID)
def test_published_rates(key):
    recipe, steps, every = SAID[key]
    recipe = resolve(recipe, 1.0)
    rates = [lr_at(recipe, recipe.base_lr, step, steps) for step in range(recipe.epochs * steps)]
    assert rates[::every] == pytest.approx(ROWS[key], rel=1e-12, abs=1e-15)
    held = [rates[step - step % every] for step in range(len(rates))]  # a rate of an epoch holds in all its steps
    assert rates == held
