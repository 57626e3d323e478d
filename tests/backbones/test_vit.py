"""ViTs beside timm's own, which of them are taken, where their weights lie, and whole CLIPs as files."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from timm.layers import drop
from timm.models.vision_transformer import VisionTransformer, _convert_openai_clip

from support import assert_close
from svp.backbones import create, vit
from svp.backbones.create import create_backbone, weights_file
from svp.backbones.vit import Vit, published, renamed, tagged
from svp.errors import SvpError
from svp.seams import Seams

CLIP = "vit_base_patch32_clip_quickgelu_224.openai"
SIZES = dict(depth=2, embed_dim=64, num_heads=1, num_classes=12)
TINY = dict(depth=3, embed_dim=8, num_heads=2, mlp_ratio=2, patch_size=4, num_classes=5, img_size=(8, 12))

SWITCHES = {
    "nothing": {}, "layer scale": dict(init_values=0.1), "norms of q and k": dict(qk_norm=True),
    "no norm at the end": dict(final_norm=False), "norm before the blocks": dict(pre_norm=True),
    "no bias of q, k, v": dict(qkv_bias=False), "positions of patches alone": dict(no_embed_class=True),
    "registers": dict(reg_tokens=3), "registers without positions": dict(reg_tokens=3, no_embed_class=True),
    "mean of patches": dict(global_pool="avg"), "mean without its norm": dict(global_pool="avg", fc_norm=False),
    "mean beside registers": dict(global_pool="avg", reg_tokens=3), "norm of the class token": dict(fc_norm=True),
    "no class token": dict(global_pool="avg", class_token=False), "no head": dict(num_classes=0),
}  # fmt: skip


def twins(**switches):
    """A tiny ViT of ours and timm's of the same weights, none of which is a start value."""
    generator = torch.Generator().manual_seed(0)
    theirs = VisionTransformer(**{**TINY, **switches}).double().eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    ours = Vit(**{**TINY, **switches}).double().eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def with_gradients(net, feature, images):
    """Feature, logits, and the gradients of the pictures and of all weights, by name."""
    images = images.clone().requires_grad_()
    feature, logits = feature(images), net(images)
    ((feature**2).sum() + (logits**2).sum()).backward()
    grads = {name: p.grad for name, p in net.named_parameters()}
    return {"feature": feature, "logits": logits, "images": images.grad, **grads}


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_every_part_is_timms(switches):
    ours, theirs = twins(**switches)
    images = torch.randn(2, 3, *TINY["img_size"], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want = with_gradients(theirs, lambda x: theirs.forward_head(theirs.forward_features(x), pre_logits=True), images)
    got = with_gradients(ours, ours.features, images)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert value.any(), name
        assert_close(got[name], value, name)


def test_branches_are_dropped_where_timm_drops_them(monkeypatch):
    monkeypatch.setattr(vit, "drop_path", lambda x, rate: drop.drop_path(x, rate, training=True))  # its random numbers
    images = torch.randn(6, 3, *TINY["img_size"], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for net in twins(drop_path_rate=0.5, init_values=0.1):
        torch.manual_seed(2)
        found.append(net.train()(images))
        assert not torch.allclose(found[-1], net.eval()(images))
    assert_close(*found, "logits")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small CLIP of random weights under open_clip's names."""
    path = tmp_path_factory.mktemp("clip") / "small-picture-side.json"
    vision = {"image_size": 224, "layers": 2, "width": 64, "patch_size": 32, "head_width": 64}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    path.write_text(json.dumps({"embed_dim": 12, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(path)
    return open_clip.create_model("small-picture-side").eval()


def test_a_whole_clip_is_read_as_its_picture_side(clip, tmp_path):
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, tmp_path / "clip.safetensors")
    torch.save(clip.state_dict(), tmp_path / "clip.bin")
    images = torch.randn(2, 3, 224, 224)
    for name in ("clip.safetensors", "clip.bin"):
        net = create_backbone(CLIP, weights=tmp_path / name, **SIZES)
        with torch.no_grad():
            torch.testing.assert_close(net(images), clip.encode_image(images), rtol=1e-4, atol=1e-5)
    visual = {f"visual.{k}": v for k, v in clip.visual.state_dict().items()}
    theirs, ours = _convert_openai_clip(visual, net), renamed(visual)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[k], ours[k]) for k in ours)


def test_other_files_keep_their_names():
    tensors = {"cls_token": torch.zeros(1)}
    assert renamed(tensors) is tensors


def test_weights_lie_where_timm_has_them():
    assert published(CLIP)[0] == "timm/vit_base_patch32_clip_224.openai"
    assert published("deit_tiny_patch16_224.fb_in1k")[:2] == ("timm/deit_tiny_patch16_224.fb_in1k", "model.safetensors")
    assert published("vit_nano") is None and published("vit_of_nobody") is None
    assert tagged("deit_tiny_patch16_224") == "deit_tiny_patch16_224.fb_in1k" and tagged("vit_nano") == "vit_nano"
    assert tagged("vit_base_patch32_clip_224") == "vit_base_patch32_clip_224.laion2b_ft_in12k_in1k"  # a classifier


def test_the_first_file_that_is_there_is_taken(tmp_path, monkeypatch):
    import huggingface_hub as hub

    asked = []

    class Absent(hub.errors.EntryNotFoundError):
        def __init__(self):
            Exception.__init__(self, "404")

    def download(repository, file):
        asked.append(file)
        if file != "pytorch_model.bin":
            raise Absent
        return str(tmp_path / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert weights_file(CLIP, "default").name == "pytorch_model.bin"
    assert asked == ["model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin"]
    with pytest.raises(SvpError, match=r"a\.bin of one/two could not be fetched"):
        create.from_hub("one/two", "a.bin")


@pytest.mark.parametrize(
    "switches,part",
    [
        (dict(global_pool="avg", pool_include_prefix=True), "a mean over class tokens too"),
        (dict(embed_norm_layer=torch.nn.LayerNorm), "a norm in its patch embedding"),
        (dict(proj_drop_rate=0.1), "dropout of its own"), (dict(attn_drop_rate=0.1), "dropout of its own"),
        (dict(drop_rate=0.1), "dropout of its own"), (dict(patch_drop_rate=0.1), "dropout of its own"),
    ],
)  # fmt: skip
def test_parts_that_would_not_be_computed_are_refused(switches, part):
    with pytest.raises(SvpError, match=part):
        Vit("vit", embed_dim=16, depth=1, num_heads=2, patch_size=8, img_size=16, **switches)


def test_a_new_head_reads_what_the_network_pools():
    net = Vit("vit", embed_dim=16, depth=1, num_heads=2, patch_size=8, img_size=16, global_pool="avg")
    net.reset_classifier(7, "avg")
    assert net(torch.randn(2, 3, 16, 16)).shape == (2, 7)
    with pytest.raises(SvpError, match="global_pool 'token' is not offered"):
        net.reset_classifier(7, "token")


class Streams(Seams):
    """The type of what enters each block."""

    def __init__(self):
        self.found = []

    def block(self, tokens, i, run):
        self.found.append(tokens.x.dtype)
        return run(tokens)


def test_the_stream_is_as_wide_as_timms_under_autocast():
    """bfloat16 in the products, float32 between the blocks."""
    net, plain = twins()
    theirs, ours = [], Streams()
    for block in plain.float().blocks:
        block.norm1.register_forward_hook(lambda _m, x, _y: theirs.append(x[0].dtype))
    images = torch.randn(2, 3, *net.img_size)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        plain(images)
        net.float().features(images, ours)
    assert theirs == ours.found == [torch.float32] * len(net.blocks)


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_distilled_patch16_224",
        "vit_tiny_r_s16_p8_224",
        "vit_base_patch16_xp_224",
        "vit_small_patch16_18x2_224",
    ],
)
def test_transformers_with_other_parts_are_refused(name):
    with pytest.raises(SvpError, match="which is not offered"):
        create_backbone(name)
