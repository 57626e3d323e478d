"""The weights in the box: every file is of a registered backbone, is what its card says, and gives logits."""

import json
from pathlib import Path

import pytest
import torch

import svp
from svp.backbones.checkpoints import read_checkpoint
from svp.backbones.create import create_backbone, shipped_weights
from svp.cli.list import backbones

ROOT = Path(__file__).parents[2]
SHIPPED = {  # name: the start of its fingerprint, which adapters trained on it carry
    "vim_nano": "2761ca2465ba",
    "vit_nano": "45a4c98b3b07",
}


def test_what_ships_is_what_is_listed():
    found = {path.stem for path in (ROOT / "src" / "svp" / "weights").iterdir()}
    assert found == set(SHIPPED) == {name for name in svp.list_backbones() if shipped_weights(name)}
    assert found == {row["backbone"] for row in backbones() if row["weights"] == "in the package"}


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("img_size", [None, 32])
def test_default_weights_give_logits_of_the_source_classes(name, img_size):
    net = create_backbone(name, weights="default", img_size=img_size)
    images = torch.randn(2, 3, *net.img_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = net(images)
    assert net.weights_from == "default" and logits.shape == (2, 200)
    assert logits.isfinite().all() and logits.std() > 0.1
    assert net.report.resized == ([] if img_size is None else ["pos_embed 65 -> 17 rows"])


@pytest.mark.parametrize("name,start", SHIPPED.items())
def test_adapters_saved_on_shipped_weights_still_fit_them(name, start):
    assert create_backbone(name, weights="default").fingerprint().startswith(start)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_card_is_of_this_file(name):
    facts = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    file = read_checkpoint(shipped_weights(name))
    assert sum(t.numel() for t in file.tensors.values()) == facts["parameters"]
    assert all(t.dtype == torch.float16 for t in file.tensors.values())
    assert facts["backbone"] == name and (ROOT / "docs" / "images" / f"{name}.png").is_file()
    assert f"<!-- table: {name} -->" in (ROOT / "docs" / "models" / f"{name}.md").read_text(encoding="utf-8")
