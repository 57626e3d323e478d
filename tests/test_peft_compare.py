"""The measurement behind the README's table: a wrapped layer of a published block does nothing, our LoRA acts."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("peft_compare", ROOT / "benchmarks" / "peft_compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Wrapped(nn.Module):
    """A layer as generic adapters wrap it: its own forward, the base layer's weight in sight."""

    def __init__(self, base):
        super().__init__()
        self.base, self.up = base, nn.Parameter(torch.ones(base.out_features, 1))

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + x.sum(-1, keepdim=True) @ self.up.T


@pytest.mark.parametrize("target", ["in_proj", "x_proj", "dt_proj", "out_proj"])
def test_a_wrapped_layer_of_the_published_block_is_never_called(compare, target):
    compare.check()
    torch.manual_seed(0)
    block, x = compare.published().requires_grad_(False), torch.randn(2, compare.TOKENS, compare.D)
    off = block(x)
    setattr(block, target, Wrapped(getattr(block, target)))
    cell = compare.verdict(lambda: block(x), off, [getattr(block, target).up])
    assert cell["said"] == "no effect" and cell["trained"]


def test_ours_acts_on_every_layer(compare):
    assert {compare.ours(target)["said"] for target in compare.TARGETS} == {"acts"}


def test_the_table_in_the_documents_says_so():
    found = json.loads((ROOT / "docs" / "results" / "peft.json").read_text(encoding="utf-8"))
    said = {(row["tool"], row["network"]): {c["said"] for c in row["cells"].values()} for row in found["lora"]}
    assert said["svp", "Vim of this package"] == {"acts"}
    assert said["peft", "Vim's block as published (fused path)"] == {"no effect", "refused"}


@pytest.mark.filterwarnings("ignore")
def test_peft_measures_the_same(compare):
    for target in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        assert compare.wrapped(compare.published, target)["said"] == "no effect", target
