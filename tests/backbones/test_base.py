"""What every backbone does with its blocks: drop them by chance, run them again instead of keeping what they computed."""

import pytest
import torch

from support import assert_close
from svp.backbones import vim, vit
from svp.backbones.base import drop_path

FAMILIES = {
    "vim": (vim, dict(depth=4, embed_dim=16, d_state=4, patch_size=8, img_size=16, num_classes=3)),
    "vit": (vit, dict(depth=4, embed_dim=16, num_heads=2, patch_size=8, img_size=16, num_classes=3)),
}
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def tiny(family, **changes):
    module, sizes = FAMILIES[family]
    torch.manual_seed(0)
    return getattr(module, family.capitalize())(**{**sizes, **changes}).double().eval()


def pictures(count=2):
    return torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# -- stochastic depth --------------------------------------------------------------------------------------------------


def test_a_row_is_dropped_whole_or_divided_by_what_is_kept():
    torch.manual_seed(0)
    x = torch.randn(400, 3, 5).abs() + 0.1
    y = drop_path(x, 0.25)
    is_kept = (y != 0).flatten(1).any(1)
    assert torch.equal(y[~is_kept], torch.zeros_like(y[~is_kept]))
    torch.testing.assert_close(y[is_kept], x[is_kept] / 0.75)
    assert 0.65 < is_kept.double().mean() < 0.85
    assert drop_path(x, 0.0) is x


@EVERY_FAMILY
def test_blocks_are_dropped_in_training_alone(family):
    plain, dropped, images = tiny(family), tiny(family, drop_path_rate=0.9), pictures()
    with torch.no_grad():
        want, feature = plain(images), plain.features(images)
        assert torch.equal(dropped(images), want) and torch.equal(plain.train()(images), want)
        assert not torch.allclose(dropped.train()(images), want)
        assert not torch.allclose(plain.features(images, drop_path=0.9), feature)


@EVERY_FAMILY
def test_the_rate_rises_with_the_block(family, monkeypatch):
    rates = []
    monkeypatch.setattr(FAMILIES[family][0], "drop_path", lambda x, rate: rates.append(rate) or x)
    tiny(family).features(pictures(), drop_path=0.3)
    each = {"vim": [0.1, 0.2, 0.3], "vit": [0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3]}  # Vim: once a block, none in two
    assert rates == pytest.approx(each[family])


@EVERY_FAMILY
def test_a_dropped_block_leaves_the_stream_as_it_was(family, monkeypatch):
    whole, short = tiny(family), tiny(family, depth=1)
    short.load_state_dict({name: whole.state_dict()[name] for name in short.state_dict()})
    monkeypatch.setattr(FAMILIES[family][0], "drop_path", lambda x, rate: x if rate == 0 else torch.zeros_like(x))
    with torch.no_grad():
        assert_close(whole.features(pictures(), drop_path=0.3), short.features(pictures()), "feature")


# -- gradient checkpointing --------------------------------------------------------------------------------------------


@EVERY_FAMILY
def test_checkpointed_blocks_run_twice_to_the_same_gradients(family, monkeypatch):
    net, block, ran = tiny(family, drop_path_rate=0.5).train(), FAMILIES[family][0].Block, []
    run = block.__call__
    monkeypatch.setattr(block, "__call__", lambda self, *args, **more: ran.append(self.i) or run(self, *args, **more))

    def gradients():
        ran.clear()
        net.zero_grad()
        torch.manual_seed(0)
        net(pictures()).square().sum().backward()
        return {name: p.grad.clone() for name, p in net.named_parameters()}

    want = gradients()
    assert ran == [0, 1, 2, 3]
    net.set_grad_checkpointing()
    for name, got in gradients().items():
        assert_close(got, want[name], name)
    assert ran == [0, 1, 2, 3, 3, 2, 1, 0]
    ran.clear()
    with torch.no_grad():
        net(pictures())
    assert ran == [0, 1, 2, 3]


# -- half precision ----------------------------------------------------------------------------------------------------


@EVERY_FAMILY
def test_positions_are_added_in_full_precision_under_autocast(family):
    net = tiny(family).float()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        w = net.in_force(None)
        tokens = net.embed(pictures().float(), w)
        patches = torch.nn.functional.conv2d(
            pictures().float(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], 8
        )
    want = patches.flatten(2).mT.float() + w["pos_embed"][:, tokens.patches]
    assert patches.dtype == torch.bfloat16 and torch.equal(tokens.x[:, tokens.patches], want)
