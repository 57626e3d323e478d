"""Learning rates of released prompting codes, step by step, where a recipe can say them."""

import json

import pytest

from support import GOLDEN
from svp.training.optim import lr_at
from svp.training.recipe import Recipe

ROWS = json.loads((GOLDEN / "prompts/schedules.json").read_text())
SAID = {  # key in the file: (recipe, base learning rate)
    "vp_cosine_lr(base=40,warmup=4,steps=20)": (Recipe(epochs=1, lr=40.0, warmup=4, warmup_unit="steps"), 40.0),
    "damvp_cosine_lr(base=1,warmup=steps//5=4,steps=20)": (Recipe(epochs=1, lr=1.0, warmup=0.2), 1.0),
}


@pytest.mark.parametrize("key", SAID)
def test_published_cosine(key):
    recipe, base = SAID[key]
    assert [lr_at(recipe, base, step, 20) for step in range(20)] == pytest.approx(ROWS[key], rel=1e-12, abs=1e-12)
