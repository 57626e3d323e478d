"""Checkpoints of every origin: loaded with every key reported, or refused with a sentence that says what the file is."""

import argparse
import pickle

import pytest
import torch

from svp.backbones.checkpoints import read_checkpoint, save_backbone
from svp.backbones.create import create_backbone
from svp.convert import convert_adapter, convert_checkpoint, load_published
from svp.errors import SvpError
from svp.model import load

SIZES = dict(depth=2, embed_dim=16, d_state=4, patch_size=8, img_size=32)


@pytest.fixture(scope="module")
def net():
    return create_backbone("vim_tiny", **SIZES, num_classes=6)


def published(net, path, **more):
    """A whole training checkpoint as the authors' program writes it."""
    args = argparse.Namespace(model="vim_tiny", lr=1e-3, output=path.parent)
    optimizer = torch.optim.AdamW(net.parameters()).state_dict()
    torch.save(
        {"model": net.state_dict(), "optimizer": optimizer, "epoch": 3, "scaler": "none", "args": args, **more}, path
    )
    return path


def test_a_training_checkpoint_with_a_namespace_loads(net, tmp_path):
    path = published(net, tmp_path / "vim.pth")
    again = create_backbone("vim_tiny", weights=path, **SIZES)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))
    assert again.num_classes == 6 and len(again.report.loaded) == len(net.state_dict())
    assert "'model'" in again.report.lines()[0] and again.fingerprint() == net.fingerprint()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "backbone.", "module.backbone."])
def test_wrapped_names_are_unwrapped_and_said(net, tmp_path, prefix):
    torch.save({"state_dict": {prefix + k: v for k, v in net.state_dict().items()}}, tmp_path / "x.pth")
    again = create_backbone("vim_tiny", weights=tmp_path / "x.pth", **SIZES)
    assert torch.equal(again.norm_f.weight, net.norm_f.weight)
    assert any("removed" in line for line in again.report.lines())


def test_the_averaged_weights_are_taken_on_request(net, tmp_path):
    ema = {k: v + 1 for k, v in net.state_dict().items()}
    path = published(net, tmp_path / "vim.pth", model_ema=ema)
    assert torch.equal(read_checkpoint(path, ema=True).tensors["norm_f.weight"], net.norm_f.weight + 1)
    assert torch.equal(read_checkpoint(path).tensors["norm_f.weight"], net.norm_f.weight)


def test_a_file_without_averaged_weights_says_so(net, tmp_path):
    save_backbone(net, tmp_path / "a.safetensors")
    published(net, tmp_path / "b.pth")
    for name in ("a.safetensors", "b.pth"):
        with pytest.raises(SvpError, match="averaged"):
            read_checkpoint(tmp_path / name, ema=True)


def test_there_and_back_keeps_every_number(net, tmp_path):
    published(net, tmp_path / "a.pth")
    report = convert_checkpoint(tmp_path / "a.pth", tmp_path / "b.safetensors")
    convert_checkpoint(tmp_path / "b.safetensors", tmp_path / "c.pth")
    back = read_checkpoint(tmp_path / "c.pth").tensors
    assert set(report.loaded) == set(back) == set(net.state_dict())
    assert all(torch.equal(back[k], v) for k, v in net.state_dict().items())


def test_a_converted_file_says_what_network_it_holds(net, tmp_path):
    save_backbone(create_backbone("vit_nano"), tmp_path / "vit.safetensors")
    torch.save({"strange.weight": torch.ones(2)}, tmp_path / "other.pth")
    vit = convert_checkpoint(tmp_path / "vit.safetensors", tmp_path / "vit.pth")
    assert vit.notes == ["vit.safetensors: a ViT of embed_dim 116, depth 12, patch_size 8, num_classes 200"]
    other = convert_checkpoint(tmp_path / "other.pth", tmp_path / "other.safetensors")
    assert other.notes[-1] == "other.pth: no network of this package"


def test_the_position_table_follows_the_picture_size(net, tmp_path):
    save_backbone(net, tmp_path / "a.safetensors")
    other = create_backbone("vim_tiny", weights=tmp_path / "a.safetensors", **{**SIZES, "img_size": (48, 64)})
    assert other.pos_embed.shape == (1, 49, 16) and torch.equal(other.pos_embed[:, 24], net.pos_embed[:, 8])
    assert other.fingerprint() == net.fingerprint() and other.report.resized


def test_rope_tables_of_the_first_release_are_left_out_and_said(net, tmp_path):
    torch.save({"model": {**net.state_dict(), "rope.freqs_cos": torch.zeros(3)}}, tmp_path / "a.pth")
    again = create_backbone("vim_tiny", weights=tmp_path / "a.pth", **SIZES, cls_token="head")
    assert again.report.left_out == ["rope.freqs_cos: unused table of the first release"]
    with pytest.raises(SvpError, match="whose class token stands first; in vim_tiny it stands in the middle"):
        create_backbone("vim_tiny", weights=tmp_path / "a.pth", **SIZES)


def test_overlapping_patches_are_not_taken_for_others(tmp_path):
    fine = create_backbone("vim_tiny_stride8", num_classes=3)
    save_backbone(fine, tmp_path / "fine.safetensors", torch.float16)
    with pytest.raises(SvpError, match="has stride 8, vim_tiny needs 16") as err:
        create_backbone("vim_tiny", weights=tmp_path / "fine.safetensors")
    assert err.value.hint == "the file fits vim_tiny_stride8: --backbone vim_tiny_stride8"
    again = create_backbone("vim_tiny_stride8", weights=tmp_path / "fine.safetensors")
    assert not again.report.resized
    assert create_backbone("vim_tiny", weights=tmp_path / "fine.safetensors", img_size=432).grid == (27, 27)
    coarse = create_backbone("vim_tiny", num_classes=3)
    save_backbone(coarse, tmp_path / "coarse.safetensors", torch.float16)
    assert create_backbone("vim_tiny_stride8", weights=tmp_path / "coarse.safetensors").report.resized


@pytest.mark.parametrize("room", ["pathlib", "pathlib._local"])  # Python 3.13 has its paths in the latter
def test_paths_of_any_python_are_read(net, tmp_path, room):
    path = published(net, tmp_path / "vim.pth")
    content = path.read_bytes()
    here = type(tmp_path).__module__
    if here != room:
        import zipfile

        with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "other.pth", "w") as new:
            for item in old.infolist():
                data = old.read(item)
                if item.filename.endswith("data.pkl"):
                    data = data.replace(f"c{here}\n".encode(), f"c{room}\n".encode())
                    assert f"c{room}\n".encode() in data
                new.writestr(item.filename, data)
        path = tmp_path / "other.pth"
    assert content and read_checkpoint(path).tensors.keys() == net.state_dict().keys()


def test_a_file_of_another_size_names_the_backbone_it_fits(tmp_path):
    small = create_backbone("vim_tiny", num_classes=3)
    save_backbone(small, tmp_path / "tiny.safetensors", torch.float16)
    with pytest.raises(SvpError) as err:
        create_backbone("vim_small", weights=tmp_path / "tiny.safetensors")
    assert "embed_dim 192, vim_small needs 384" in err.value.problem and "--backbone vim_tiny" in err.value.hint


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def write(path, content):
    path.write_bytes(content)
    return path


FILES = {
    "html": (lambda p: write(p, b"<!DOCTYPE html><html>not found</html>"), "web page"),
    "lfs": (lambda p: write(p, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "Git LFS pointer"),
    "empty": (lambda p: write(p, b""), "is empty"),
    "text": (lambda p: write(p, b"hello there, no tensors here"), "no PyTorch checkpoint"),
    "zip_of_code": (lambda p: write(p, b"PK\x03\x04 truncated"), "truncated"),
    "evil": (lambda p: torch.save({"model": Evil()}, p), "holds code"),
    "plain_pickle": (lambda p: write(p, pickle.dumps({"a": Evil()})), ""),
    "list": (lambda p: torch.save([torch.zeros(1)], p), "list"),
    "no_tensors": (lambda p: torch.save({"epoch": 3}, p), "no tensors"),
    "other_net": (lambda p: torch.save({"fc.weight": torch.zeros(3, 3)}, p), "does not look like"),
    "folder": (lambda p: p.mkdir(), "is a folder"),
    "missing": (lambda p: None, "does not exist"),
}


@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_checkpoint_is_refused_by_content(kind, tmp_path, capsys):
    make, words = FILES[kind]
    make(tmp_path / "x.pth")
    with pytest.raises(SvpError) as err:
        create_backbone("vim_tiny", weights=tmp_path / "x.pth", **SIZES)
    assert words in err.value.problem and err.value.kind == "artefact" and err.value.hint
    assert "code ran" not in capsys.readouterr().out


def test_a_truncated_file_is_refused(net, tmp_path):
    save_backbone(net, tmp_path / "a.safetensors")
    published(net, tmp_path / "a.pth")
    for path in (tmp_path / "a.safetensors", tmp_path / "a.pth"):
        path.write_bytes(path.read_bytes()[:5000])
        with pytest.raises(SvpError, match=path.name):
            read_checkpoint(path)


@pytest.mark.parametrize(
    "name,value", [("extra.weight", 1.0), ("norm_f.weight", None), ("norm_f.weight", float("nan"))]
)
def test_strange_missing_and_broken_tensors_are_named(net, tmp_path, name, value):
    state = dict(net.state_dict())
    state.pop(name, None)
    if value is not None:
        state[name] = torch.full((16,), value)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(SvpError, match=name.replace(".", r"\.")):
        create_backbone("vim_tiny", weights=tmp_path / "a.pth", **SIZES)


def authors_adapter(net, path, **args):
    """A checkpoint as the released SVP code writes it: the whole network, prompts, head, settings."""
    generator = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    state = {k: v for k, v in net.state_dict().items() if not k.startswith("head")}
    state |= {
        "prompt_scale": new(24, 16),
        "prompt_shared_scale": new(1, 16),
        "head.weight": new(5, 16),
        "head.bias": new(5),
    }
    state |= {"prompt_generator_shared.0.0.weight": new(16, 16), "prompt_generator_shared.0.0.bias": new(16)}
    for i in range(2):
        state |= {f"prompt_generator.{i}.0.weight": new(8, 16), f"prompt_generator.{i}.0.bias": new(8)}
        state |= {f"prompt_generator.{i}.1.weight": new(16, 8), f"prompt_generator.{i}.1.bias": new(16)}
    torch.save({"model": state, "epoch": 9, "args": argparse.Namespace(shared_layers=2, **args)}, path)
    return state


@pytest.mark.parametrize("relu", [True, False])
def test_an_adapter_of_the_authors_code_loads(net, tmp_path, relu):
    state = authors_adapter(net, tmp_path / "best_checkpoint.pth", input_relu=relu)
    model, report = load_published(tmp_path / "best_checkpoint.pth", net)
    assert model.specs[0][1]["cross_source"] == "first_half" and model.specs[0][1]["hidden"] == 8
    assert model.specs[0][1]["input_filter"] == ("simam" if relu else "none")
    assert torch.equal(model.method.beta["1"], state["prompt_scale"][1])
    assert "equal those of vim_tiny" in report.lines()[-3] or any("equal those" in line for line in report.lines())


def test_an_adapter_of_the_authors_code_is_converted_whole(net, tmp_path):
    authors_adapter(net, tmp_path / "best.pth", input_relu=False)
    convert_adapter(tmp_path / "best.pth", tmp_path / "ours")
    again, direct = load(tmp_path / "ours"), load_published(tmp_path / "best.pth", net)[0]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(images), direct.eval()(images))


def test_averaged_prompts_beside_a_frozen_network_that_averaging_has_rounded(net, tmp_path):
    state = authors_adapter(net, tmp_path / "best.pth")
    content = torch.load(tmp_path / "best.pth", weights_only=False)
    content["model_ema"] = {name: t * (1 + 1e-7) + 1e-9 for name, t in state.items()}
    torch.save(content, tmp_path / "ema.pth")
    model, _ = load_published(tmp_path / "ema.pth", net, ema=True)
    assert torch.equal(model.method.beta["1"], content["model_ema"]["prompt_scale"][1])


def test_an_adapter_on_another_backbone_is_refused(net, tmp_path):
    authors_adapter(net, tmp_path / "best.pth")
    with pytest.raises(SvpError, match="frozen tensors differ"):
        load_published(tmp_path / "best.pth", create_backbone("vim_tiny", **SIZES, seed=5))


def test_an_adapter_is_not_a_backbone(net, tmp_path):
    authors_adapter(net, tmp_path / "best.pth")
    with pytest.raises(SvpError, match="authors' code"):
        create_backbone("vim_tiny", weights=tmp_path / "best.pth", **SIZES)
