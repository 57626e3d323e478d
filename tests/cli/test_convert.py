"""Checkpoints from one form into the other, and the authors' adapters into ours."""

import argparse
import json

import pytest
import torch

import svp as package
from svp.backbones.checkpoints import read_checkpoint, save_backbone
from svp.convert import save_peft

SIZES = dict(depth=2, embed_dim=16, d_state=4, patch_size=8, img_size=32)


@pytest.fixture(scope="module")
def net():
    return package.create_backbone("vim_tiny", **SIZES, num_classes=5)


@pytest.fixture
def checkpoint(net, tmp_path):
    """A training checkpoint with averaged weights."""
    ema = {name: t + 1 for name, t in net.state_dict().items()}
    torch.save({"model": net.state_dict(), "model_ema": ema, "epoch": 3}, tmp_path / "in.pth")
    return tmp_path / "in.pth"


@pytest.fixture
def authors(net, tmp_path):
    """What the released code writes: the frozen network, prompts for two blocks, a head of five classes."""
    state = {name: t for name, t in net.state_dict().items()}
    state |= {"prompt_scale": torch.ones(2, 16), "prompt_shared_scale": torch.ones(1, 16)}
    for i in range(2):
        state |= {f"prompt_generator.{i}.0.weight": torch.randn(8, 16), f"prompt_generator.{i}.0.bias": torch.randn(8)}
        state |= {f"prompt_generator.{i}.1.weight": torch.randn(16, 8), f"prompt_generator.{i}.1.bias": torch.randn(16)}
    state |= {
        "prompt_generator_shared.0.0.weight": torch.randn(16, 16),
        "prompt_generator_shared.0.0.bias": torch.randn(16),
    }
    torch.save({"model": state, "epoch": 9, "args": argparse.Namespace(shared_layers=2)}, tmp_path / "best.pth")
    return tmp_path / "best.pth"


def test_there_and_back(svp, net, checkpoint, tmp_path):
    told = svp("convert", checkpoint, tmp_path / "out.safetensors")
    assert told.code == 0 and "taken: 'model' of the file" in told.out and "embed_dim 16, depth 2" in told.out
    assert f"loaded: {len(net.state_dict())} (" in told.out and "backbone written: " in told.out
    assert svp("convert", tmp_path / "out.safetensors", tmp_path / "back.pth").code == 0
    back = read_checkpoint(tmp_path / "back.pth").tensors
    assert back.keys() == net.state_dict().keys() and all(torch.equal(back[k], t) for k, t in net.state_dict().items())


def test_every_key_is_reported(svp, net, checkpoint, tmp_path):
    told = json.loads(svp("convert", checkpoint, tmp_path / "a.safetensors", "--json").out)
    assert set(told["loaded"]) == set(net.state_dict()) and told["kind"] == "backbone" and told["left_out"] == []
    told = svp("convert", checkpoint, tmp_path / "b.safetensors", "--keys")
    assert all(f"loaded: {name}\n" in told.out for name in net.state_dict())


def test_averaged_weights(svp, net, checkpoint, tmp_path):
    assert svp("convert", checkpoint, tmp_path / "ema.safetensors", "--ema").code == 0
    assert torch.equal(read_checkpoint(tmp_path / "ema.safetensors").tensors["norm_f.weight"], net.norm_f.weight + 1)


def test_nothing_is_overwritten_unasked(svp, checkpoint, tmp_path):
    out = tmp_path / "out.safetensors"
    out.write_text("mine")
    told = svp("convert", checkpoint, out)
    assert told.code == 2 and "out.safetensors exists" in told.err and "--overwrite" in told.err
    assert out.read_text() == "mine"
    assert svp("convert", checkpoint, out, "--overwrite").code == 0 and len(out.read_bytes()) > 1000
    told = svp("convert", checkpoint, checkpoint, "--overwrite")
    assert told.code == 2 and "is the file that is read" in told.err


def test_an_adapter_of_the_authors_code_becomes_a_folder(svp, net, authors, tmp_path):
    told = svp("convert", authors, tmp_path / "ours")
    frozen = [name for name in net.state_dict() if not name.startswith("head.")]
    assert told.code == 0
    assert f"all {len(frozen)} frozen tensors equal those of vim_tiny" in told.out
    assert "adapter written: " in told.out
    model = package.load(tmp_path / "ours")
    assert model.num_classes == 5 and model.specs[0][1]["shared_layers"] == 2
    told = svp("convert", authors, tmp_path / "ours")
    assert told.code == 2 and "exists" in told.err
    assert svp("convert", authors, tmp_path / "ours", "--overwrite", "--json").code == 0
    told = svp("convert", authors, tmp_path / "a.safetensors")
    assert told.code == 2 and "which becomes a folder" in told.err


def test_an_adapter_is_compared_with_the_backbone_that_is_named(svp, authors, tmp_path):
    torch.save(package.create_backbone("vim_tiny", num_classes=0).state_dict(), tmp_path / "tiny.pth")
    told = svp("convert", authors, tmp_path / "ours", "--backbone", "vim_tiny", "--weights", tmp_path / "tiny.pth")
    assert told.code == 1 and "do not both have" in told.err and not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "words,code,problem",
    [
        (["nowhere.pth", "{tmp}/a.safetensors"], 1, "nowhere.pth does not exist"),
        (["{in}", "{tmp}/a.zip"], 2, "expected .safetensors or .pth"),
        (["{text}", "{tmp}/a.pth"], 1, "is no PyTorch checkpoint"),
        (["{code}", "{tmp}/a.pth"], 1, "--trust-pickle"),
        (["{in}", "{tmp}/a.pth", "--backbone", "vim_tiny"], 2, "--backbone and --weights belong together"),
        (["{in}", "{tmp}/a.pth", "--backbone", "vim_tiny", "--weights", "{in}"], 2, "is a backbone, no adapter"),
    ],
)
def test_what_cannot_be_converted(svp, checkpoint, tmp_path, words, code, problem):
    (tmp_path / "text.pth").write_text("hello there")
    torch.save({"model": {"a": torch.zeros(1)}, "who": Foreign()}, tmp_path / "code.pth")
    places = {"tmp": tmp_path, "in": checkpoint, "text": tmp_path / "text.pth", "code": tmp_path / "code.pth"}
    told = svp("convert", *(word.format(**places) for word in words))
    assert told.code == code and problem in told.err and told.out == "" and not (tmp_path / "a.pth").exists()


def test_a_lora_goes_to_the_layout_of_peft_and_back(svp, tmp_path):
    save_backbone(package.create_backbone("vit_nano", img_size=16), tmp_path / "net.safetensors")
    net = package.create_backbone("vit_nano", img_size=16, weights=tmp_path / "net.safetensors")
    model = package.adapt(net, "lora", num_classes=3, rank=2, probe=False).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1
    model.save_pretrained(tmp_path / "run" / "model")
    told = svp("convert", tmp_path / "run", tmp_path / "theirs", "--to", "peft")
    assert told.code == 0 and "have no place in this layout" in told.out and "svp predict" not in told.err
    told = svp("convert", tmp_path / "theirs", tmp_path / "back")
    assert told.code == 2 and "does not hold the network" in told.err and "--backbone NAME" in told.err
    model.save_pretrained(tmp_path / "ours")
    for words, said in (
        ((tmp_path / "ours", tmp_path / "x"), "is an adapter of this package already"),
        ((tmp_path / "theirs", tmp_path / "x", "--to", "peft"), "is in peft's layout already"),
        ((tmp_path / "net.safetensors", tmp_path / "x", "--to", "peft"), "is no adapter folder"),
        ((tmp_path / "theirs", tmp_path / "x.pth"), "which becomes a folder"),
    ):
        told = svp("convert", *words)
        assert told.code == 2 and said in told.err and not (tmp_path / words[1].name).exists()


def test_what_peft_wrote_becomes_a_folder(svp, tmp_path):
    save_backbone(package.create_backbone("vit_nano"), tmp_path / "net.safetensors")
    net = package.create_backbone("vit_nano", weights=tmp_path / "net.safetensors")
    model = package.adapt(net, "lora", num_classes=3, rank=2, probe=False).eval()
    save_peft(model, tmp_path / "theirs")
    net_words = ("--backbone", "vit_nano", "--weights", tmp_path / "net.safetensors")
    told = svp("convert", tmp_path / "theirs", tmp_path / "ours", *net_words, "--json")
    assert told.code == 0 and json.loads(told.out)["kind"] == "adapter"
    images = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(package.load(tmp_path / "ours")(images), model(images))


class Foreign:
    """Something that only a trusted pickle may hold."""


def test_a_trusted_pickle_is_read(svp, tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}, "who": argparse.Namespace(x=len)}, tmp_path / "code.pth")
    assert svp("convert", tmp_path / "code.pth", tmp_path / "a.pth").code == 1
    assert svp("convert", tmp_path / "code.pth", tmp_path / "a.pth", "--trust-pickle").code == 0
