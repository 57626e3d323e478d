"""LoRA in peft's layout: files that peft wrote, ours there and back, what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from methods.nets import net_of, stirred
from support import GOLDEN, assert_close
from svp.backbones.vit import Vit
from svp.convert import load_peft, save_peft
from svp.errors import SvpError
from svp.model import adapt, load

WRITTEN = GOLDEN / "peft" / "written_by_peft"
CASES = sorted(path.parent.name for path in WRITTEN.glob("*/adapter_config.json"))


def written_base():
    """The network that peft adapted, and the pictures and logits of its file."""
    t = load_file(WRITTEN / "base.safetensors")
    rest = {name: t.pop(name) for name in list(t) if name == "images" or name.startswith("logits.")}
    net = Vit("vit", embed_dim=16, depth=2, num_heads=2, patch_size=4, img_size=16, num_classes=5).double().eval()
    net.load_state_dict(t)
    return net, rest


@pytest.mark.parametrize("case", CASES)
def test_what_peft_wrote_computes_what_peft_computes(case, tmp_path):
    net, want = written_base()
    model, report = load_peft(WRITTEN / case, net)
    with torch.no_grad():
        assert_close(model(want["images"]), want[f"logits.{case}"], "logits", 1e-12)
        assert (model(want["images"]) - net(want["images"])).abs().max() > 1e-2
    assert set(report.loaded) == set(load_file(WRITTEN / case / "adapter_model.safetensors"))
    model.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "ours", net)(want["images"]), model(want["images"]))
    save_peft(model, tmp_path / "theirs")
    again, _ = load_peft(tmp_path / "theirs", net)
    with torch.no_grad():
        assert_close(again(want["images"]), want[f"logits.{case}"], "logits", 1e-12)


def test_what_peft_wrote_keeps_its_words():
    net, _ = written_base()
    model, _ = load_peft(WRITTEN / "lora", net)
    opt = model.method.opt
    assert (opt.rank, opt.scale, opt.targets, opt.dropout, opt.dora) == (3, 2.0, ("qkv", "proj"), 0.1, "none")
    opt = load_peft(WRITTEN / "dora_rslora", net)[0].method.opt
    assert (opt.rank, opt.scale, opt.rslora, opt.dora, opt.targets) == (2, 4.0, True, "row", ("qkv", "fc1", "fc2"))
    assert any("no head" in note for note in load_peft(WRITTEN / "dora_rslora", net)[1].notes)
    assert load_peft(WRITTEN / "patterns", net)[0].method.opt.rank == 4


OURS = [
    ("vit", {}), ("vit", dict(targets=("q", "v", "k", "qkv", "proj", "fc1", "fc2", "embed"), rank=3, scale=0.3)),
    ("vit", dict(rslora=True, rank=3, dropout=0.2)), ("vit", dict(dora=True, rank=2, targets=("q", "v", "proj", "embed"))),
    ("vit", dict(dora="row", rslora=True, rank=2, targets=("fc1",))), ("vim", dict(rank=4)),
    ("vim", dict(rank=3, targets=("X", "Z", "out_proj", "x_proj", "dt", "embed"), scale=0.1)),
    ("vim", dict(rank=3, targets=("d", "B", "C"), rslora=True)), ("vim", dict(rank=3, targets=("X", "B"), dora="row")),
]  # fmt: skip


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind,options", OURS, ids=str)
def test_ours_there_and_back(kind, options, images, tmp_path):
    net = net_of(kind)
    model = stirred(adapt(net, "lora", num_classes=4, **options)).eval()
    report = save_peft(model, tmp_path / "a")
    assert any("does nothing" in note for note in report.notes) == (kind == "vim")
    assert "—" not in (tmp_path / "a" / "README.md").read_text()
    again, _ = load_peft(tmp_path / "a", net)
    with torch.no_grad():
        assert_close(again(images), model(images), "logits", 1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [options for kind, options in OURS if kind == "vit"], ids=str)
def test_peft_computes_ours(options, images, tmp_path):
    from peft import PeftModel
    from timm.models.vision_transformer import VisionTransformer

    net = net_of("vit")
    model = stirred(adapt(net, "lora", num_classes=4, **options)).eval()
    save_peft(model, tmp_path / "a")
    theirs = VisionTransformer(embed_dim=16, depth=2, num_heads=2, patch_size=4, img_size=16, num_classes=4).double()
    theirs.load_state_dict({k: t for k, t in net.state_dict().items() if not k.startswith("head.")}, strict=False)
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "a").double().eval()
    with torch.no_grad():
        assert_close(theirs(images), model(images), "logits", 1e-12)


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(WRITTEN / "lora", tmp_path / "lora")
    return tmp_path / "lora"


BAD_CONFIGS = [
    (dict(peft_type="IA3"), "peft_type is 'IA3', expected 'LORA'"), (dict(bias="all"), "bias is 'all', expected 'none'"),
    (dict(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"), (dict(fan_in_fan_out=True), "fan_in_fan_out is True"),
    (dict(layer_replication=[[0, 1]]), "layer_replication is"), (dict(r="8"), "r is '8', expected a number from 1"),
    (dict(r=0), "expected a number from 1"), (dict(lora_alpha=None), "lora_alpha is None, expected a number"),
    (dict(lora_alpha=float("nan")), "lora_alpha is nan"), (dict(lora_dropout=-1), "lora_dropout is -1"), (dict(lora_dropout=0.95), "dropout"),
    (dict(use_dora=True), "has down, up, expected down, norm, up"), (dict(alpha_pattern=[1]), "alpha_pattern is"),
    (dict(alpha_pattern={"(": 1}), "alpha_pattern '('"), (dict(alpha_pattern={"qkv": "x"}), "alpha_pattern 'qkv': 'x'"),
    (dict(init_lora_weights=["a"]), "init_lora_weights is"), (dict(use_qalora=True), "use_qalora is True"),
]  # fmt: skip


@pytest.mark.parametrize("changes,words", BAD_CONFIGS, ids=str)
def test_a_bad_config_gets_a_sentence(changes, words, folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(SvpError) as err:
        load_peft(folder, written_base()[0])
    assert words in err.value.problem and err.value.hint and "\n" not in err.value.problem


def renamed(old, new):
    return lambda t: {key.replace(old, new): value for key, value in t.items()}


def without(part):
    return lambda t: {key: value for key, value in t.items() if part not in key}


BAD_TENSORS = [
    (renamed("attn.qkv", "attn.q_proj"), "adapts blocks.0.attn.q_proj, which is no linear layer"), (without("lora"), "holds no LoRA"),
    (renamed("head", "norm"), "norm.bias, which is no part of a LoRA"), (without("blocks.0.attn.qkv.lora_A"), "blocks.0.attn.qkv has up, expected down, up"),
    (renamed("blocks.1", "blocks.7"), "adapts blocks.7.attn"), (lambda t: {k: v.new_full(v.shape, torch.nan) for k, v in t.items()}, "not finite"),
    (lambda t: {k: v[:, :3].contiguous() if "lora_A" in k else v for k, v in t.items()}, "is made for (3,), this backbone needs (16,)"),
    (lambda t: {k: v[:5].contiguous() if "lora_B" in k else v for k, v in t.items()}, "lora_B of blocks.0.attn.qkv.weight is made for (5, 3)"),
    (lambda t: {k: v[:, :3].contiguous() if "head.weight" in k else v for k, v in t.items()}, "no head of 16 inputs"), (without("head.weight"), "no head of 16"),
]  # fmt: skip


BAD_TENSORS += [
    (lambda t: {k: v[:4].contiguous() if k.endswith("head.bias") else v for k, v in t.items()}, "no head of 16 inputs there or in vit, but"),
    (lambda t: {k: v[0].contiguous() if "lora_A" in k else v for k, v in t.items()}, "a matrix of blocks.0.attn.proj is (16,)"),
    (lambda t: {k: v[:0].contiguous() if "lora_A" in k else v for k, v in t.items()}, "is (0, 16), expected two axes"),
]  # fmt: skip


@pytest.mark.parametrize("change,words", BAD_TENSORS, ids=[words for _, words in BAD_TENSORS])
def test_bad_tensors_get_a_sentence(change, words, folder):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(SvpError) as err:
        load_peft(folder, written_base()[0])
    assert words in err.value.problem and err.value.kind == "artefact"


def test_pickles_are_not_read(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(SvpError, match=r"has no adapter_model\.safetensors"):
        load_peft(folder, written_base()[0])


@pytest.mark.parametrize(
    "method,options,head,words",
    [
        ("bitfit", {}, "linear", "bitfit has no place"), (["lora", "bitfit"], {}, "linear", r"lora\+bitfit has no place"),
        ("lora", dict(dora="column"), "linear", "dora=column"), ("lora", {}, "two_linear", "the head two_linear has no place"),
        ("lora", dict(dora=True, targets=("q", "qkv")), "linear", "norm the same rows twice"),
    ],
)  # fmt: skip
def test_what_has_no_place_in_the_layout(method, options, head, words, tmp_path):
    model = adapt(net_of("vit"), method, num_classes=4, head=head, probe=False, **options)
    with pytest.raises(SvpError, match=words):
        save_peft(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_load_says_what_to_type(folder):
    with pytest.raises(SvpError) as err:
        load(folder, written_base()[0])
    assert "was not written by svp" in err.value.problem and f"svp convert {folder}" in err.value.hint
