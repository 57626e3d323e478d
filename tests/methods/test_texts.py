"""CLIP's text side against open_clip, and the methods whose classes are texts, in whole runs."""

import json
from functools import partial

import open_clip
import pytest
import torch
from timm.models.vision_transformer import _convert_openai_clip
from torch import nn

from svp.backbones.vit import Vit
from svp.errors import SvpError
from svp.methods import _texts
from svp.methods._reprogram import by_meaning
from svp.methods._texts import many, read, refined, source_names, text_side
from svp.model import adapt, load
from svp.training.loop import fit
from svp.training.recipe import Recipe
from training.small import splits

B32 = "vit_base_patch32_clip_quickgelu_224.openai"
CLASSES = ("red_Fox", "sea-otter", "owl")
BOUND = 1e-3 / 2**16  # the released code bounds gradients of a loss that is scaled by 2^16
RECIPE = Recipe(epochs=2, batch_size=16, lr=1e-2, eval_batch_size=16)
SIZES = {
    "embed_dim": 12,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "layers": 3, "width": 16, "patch_size": 8, "head_width": 8, "mlp_ratio": 2},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


@pytest.fixture
def clip(tmp_path, monkeypatch):
    """A small CLIP of random weights, which open_clip hands out where OpenAI's would be downloaded."""
    (tmp_path / "small-clip.json").write_text(json.dumps(SIZES))
    open_clip.add_model_config(tmp_path / "small-clip.json")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = open_clip.create_model("small-clip").eval()
        nn.init.normal_(made.token_embedding.weight)  # the default start is so small that all texts are alike

    def create_model(name, pretrained):
        assert text_side(f"vit_base_patch32_clip_quickgelu_224.{pretrained}") == name
        return made

    monkeypatch.setattr(open_clip, "create_model", create_model)
    read.cache_clear()
    yield made
    read.cache_clear()


def picture_side(clip):
    """Our backbone with the weights of this CLIP's picture side, under timm's names."""
    net = Vit(
        "vit", img_size=16, patch_size=8, embed_dim=16, depth=3, num_heads=2, mlp_ratio=2, num_classes=12, pre_norm=True,
        act_layer="quick_gelu", norm_layer=partial(nn.LayerNorm, eps=1e-5),
    ).eval()  # fmt: skip
    tensors = {f"visual.{name}": t for name, t in clip.visual.state_dict().items()}
    net.load_state_dict(_convert_openai_clip(tensors, net))
    net.name, net.overrides = B32, {}
    return net


def without_clip(monkeypatch):
    def create_model(*args, **kwargs):
        raise OSError("no network")

    read.cache_clear()
    monkeypatch.setattr(open_clip, "create_model", create_model)


@torch.no_grad()
def test_logits_are_those_of_open_clip(clip):
    model = adapt(picture_side(clip), ("vp", dict(head="text")), num_classes=3, classes=CLASSES)
    for p in model.method.parameters():
        p.zero_()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    words = open_clip.tokenize([f"This is a photo of a {name}" for name in ("red fox", "sea otter", "owl")])
    want = 100 * clip.encode_image(images, normalize=True) @ clip.encode_text(words, normalize=True).T
    torch.testing.assert_close(model(images), want, rtol=1e-4, atol=1e-4)
    assert want.std() > 1  # so that this compares something
    assert model.num_trainable(True) == model.num_trainable() and model.head_name == "method"


def test_every_template_meets_every_name(clip):
    templates = many()
    assert len(templates) == 81 and templates[0] == "This is a photo of a {}."
    assert templates[1] == "a bad photo of a {}." and all(t.count("{}") == 1 for t in templates)
    rows = read(("owl", "fox"), templates[:3], "ViT-B-32-quickgelu")
    with torch.no_grad():
        for k, template in enumerate(templates[:3]):
            for j, name in enumerate(("owl", "fox")):
                one = clip.encode_text(open_clip.tokenize([template.format(name)]), normalize=True)[0]
                torch.testing.assert_close(rows[2 * k + j], one, rtol=1e-4, atol=1e-5)


def test_random_numbers_are_left_alone(clip):
    before = torch.random.get_rng_state()
    read(("owl",), ("{}",), "ViT-B-32-quickgelu")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_names_of_text_sides():
    assert text_side("vit_base_patch16_clip_quickgelu_224.openai") == "ViT-B-16-quickgelu"
    assert text_side("vit_large_patch14_clip_quickgelu_336.openai") == "ViT-L-14-336-quickgelu"
    assert text_side("vit_base_patch16_clip_224.openai") is None and text_side("vit_base_patch16_224.dino") is None
    known = open_clip.list_models()
    for name in ("vit_base_patch16", "vit_base_patch32", "vit_large_patch14"):
        assert text_side(f"{name}_clip_quickgelu_224.openai") in known
    assert refined(("A_b-C",)) == ("a b c",)


RUNS = [
    ("vp", dict(head="text")),
    ("autovp", {}),
    ("autovp", dict(mapping="freq", num_map=2, learnable=False, scale=0.7)),
    ("autovp", dict(mapping="iter")),
    ("ilm_vp", dict(preset="clip")),
    ("ilm_vp", dict(mapping="flm")),
    ("ilm_vp", dict(mapping="rlm")),
]


@pytest.mark.parametrize("name,options", RUNS, ids=lambda value: str(value))
def test_a_run_with_texts(clip, name, options, tmp_path, monkeypatch):
    net = picture_side(clip)
    model = adapt(net, (name, options), num_classes=3, classes=splits().classes)
    fit(model, splits(train=16, val=6, test=6), recipe=RECIPE, out=tmp_path / "run")
    images = torch.randn(2, 3, 16, 16)
    without_clip(monkeypatch)  # an adapter brings its texts along
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "run", backbone=net)(images), model.eval()(images))


@torch.no_grad()
def test_a_fully_mapping_of_texts_starts_at_the_first_of_each(clip):
    model = adapt(picture_side(clip), "autovp", num_classes=3, classes=CLASSES).eval()
    source, layer = model.head
    feature = torch.randn(4, 16)
    torch.testing.assert_close(model.head(feature) - layer.bias, source(feature)[:, :3])
    assert source.text.shape == (81 * 3, 12)
    images = torch.randn(2, 3, 16, 16)
    plain = model.method.resized(images)  # normalised pictures in zeros: the frame starts at nothing
    assert torch.equal(model.method.prompted(images), plain)


def test_gradients_of_a_mapping_of_texts_are_kept_small(clip):
    from svp.training.optim import clip_gradients, parameter_groups

    model = adapt(picture_side(clip), "autovp", num_classes=3, classes=CLASSES)
    groups = parameter_groups(model.named_parameters(), RECIPE, model.method.groups())
    for p in model.parameters():
        p.grad = torch.full_like(p, -2.0)
    clip_gradients(groups, 0.0)
    found = {name: p.grad.unique().item() for name, p in model.named_parameters()}
    assert found == pytest.approx(
        {"method.delta": -2.0, "method.scale": -BOUND, "head.1.weight": -BOUND, "head.1.bias": -BOUND}, abs=1e-15
    )


def test_names_are_near_names(clip, tmp_path):
    """A semantic mapping reads the names of ImageNet's classes and ours: two of them are the same word."""
    names = source_names(1000)
    assert names[0] == "tench, Tinca tinca" and len(names) == 1000 and source_names(7) is None
    net = Vit("vit", embed_dim=16, depth=2, num_heads=2, patch_size=8, img_size=16, num_classes=1000).eval()
    net.name, net.overrides = "vit_nano", {}
    model = adapt(net, "autovp", num_classes=3, classes=(names[24], "Owl_X", names[1]), mapping="semantic")
    source, ours = model.method.meanings(1000)
    assert source.shape == (1000, 12) and by_meaning(source, ours, 1)[2].item() == 1

    data = splits(train=16, val=6, test=6)
    model = adapt(net, "autovp", num_classes=3, classes=data.classes, mapping="semantic")
    fit(model, data, recipe=RECIPE, out=tmp_path / "run")
    assert len(set(model.head.map.flatten().tolist())) == 3
    assert torch.equal(load(tmp_path / "run", backbone=net).head.map, model.head.map)
    with pytest.raises(SvpError, match="needs the names of the classes"):
        adapt(net, "autovp", num_classes=3, mapping="semantic").method.meanings(1000)


def test_what_is_missing_is_said(clip, monkeypatch):
    net = picture_side(clip)
    with pytest.raises(SvpError, match="made of class names, and none were given"):
        adapt(net, ("vp", dict(head="text")), num_classes=3)
    unnamed = adapt(net, ("vp", dict(head="text")), num_classes=3, probe=False)
    with pytest.raises(SvpError, match="made of class names"):  # no half-filled adapter is written
        unnamed.state_dict()
    for name, reason in (
        (B32.replace("_quickgelu", ""), f"computes GELU where OpenAI's CLIP has QuickGELU; take {B32}"),
        ("vit_base_patch32_clip_224.laion2b", "which text side belongs to"),
    ):
        net.name = name
        for spec in (("vp", dict(head="text")), "autovp", "ilm_vp"):
            with pytest.raises(SvpError, match=reason):
                adapt(net, spec, num_classes=3, classes=CLASSES)
    net.name = B32
    with pytest.raises(SvpError, match="no other classes could be near them"):
        adapt(net, "autovp", num_classes=3, classes=CLASSES, mapping="semantic")
    without_clip(monkeypatch)
    with pytest.raises(
        SvpError, match="of ViT-B-32-quickgelu, whose text side reads class names, could not be fetched: no network"
    ) as said:
        adapt(net, ("vp", dict(head="text")), num_classes=3, classes=CLASSES)
    assert said.value.kind == "env" and "embeddings=FILE" in said.value.hint
    monkeypatch.setattr(_texts, "_open_clip", partial(_texts.need, "open_clip_of_nowhere", extra="clip", why="reading"))
    with pytest.raises(SvpError, match="open_clip_of_nowhere") as said:
        adapt(net, "ilm_vp", num_classes=3, classes=CLASSES)
    assert "svp-vision[clip]" in said.value.hint
