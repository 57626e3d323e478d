"""How many numbers each prompting method trains at the papers' sizes, on Vim-S, ViT-S and ViT-B."""

import pytest

from svp.backbones.create import create_backbone
from svp.methods.base import options_of
from svp.registry import method_class

NAMES = ("vim_small", "vit_small_patch16_224.augreg_in21k_ft_in1k", "vit_base_patch16_224.augreg2_in21k_ft_in1k")
E2 = dict(masks_train=True, pieces=16)
ROWS = [  # method, options, Vim-S, ViT-S, ViT-B; None: refused
    ("vp", {}, 69_840, 69_840, 69_840),
    ("vp", dict(kind="fixed_patch"), 2_700, 2_700, 2_700),
    ("vp", dict(kind="random_patch"), 2_700, 2_700, 2_700),
    ("vpt", dict(preset="shallow", num_tokens=10), 3_840, 3_840, 7_680),
    ("vpt", dict(preset="shallow", num_tokens=50), 19_200, 19_200, 38_400),
    ("vpt", dict(num_tokens=10), 92_160, 46_080, 92_160),
    ("vpt", dict(num_tokens=50), 460_800, 230_400, 460_800),
    ("vpt", dict(num_tokens=10, project=64), 40_320, 32_640, 57_600),
    ("e2vpt", dict(num_tokens=10, kv_tokens=5, **E2), 92_330, 69_290, 138_410),
    ("e2vpt", dict(num_tokens=5, kv_tokens=5, **E2), 46_165, 46_165, 92_245),
    ("e2vpt", dict(num_tokens=10, kv_tokens=5, share_kv=False), 92_160, 92_160, 184_320),
    ("spt", dict(preset="shallow"), 38_400, 38_400, 76_800),
    ("spt", {}, 184_320, 92_160, 184_320),
    ("damvp", {}, 69_840, 69_840, 69_840),
    ("damvp", dict(clusters=7), 488_880, 488_880, 488_880),
    ("autovp", dict(learnable=False), 150_528, 150_528, 150_528),
    ("autovp", dict(learnable=True), 150_529, 150_529, 150_529),
    ("ilm_vp", {}, 150_528, 150_528, 150_528),
    ("sa2vp", dict(hidden=8), None, 103_512, 202_200),
    ("sa2vp", dict(hidden=16), None, 191_280, 372_912),
    ("sa2vp", dict(hidden=64), None, 717_888, 1_397_184),
    ("insvp", dict(preset="published"), 186_253, 112_525, 186_253),
    ("insvp", {}, 186_253 + 75_016, 112_525 + 75_016, 271_661),
]


@pytest.fixture(scope="module", params=range(3), ids=("vim_small", "vit_small", "vit_base"))
def place(request):
    return request.param, create_backbone(NAMES[request.param]).site()


@pytest.mark.parametrize("row", range(len(ROWS)), ids=lambda i: f"{ROWS[i][0]}-{i}")
def test_counts(place, row):
    column, site = place
    name, options, *counts = ROWS[row]
    cls = method_class(name)
    opt = options_of(cls, options, name)
    if counts[column] is None:
        assert cls.unfit(site, opt)
        return
    assert cls.unfit(site, opt) is None
    method = cls(site, opt, 100)
    assert sum(p.numel() for p in method.parameters() if p.requires_grad) == counts[column]


def test_numbers_of_a_frame_that_act(place):
    _, site = place
    for size, active in ((32, 147_456), (128, 101_376)):
        method = method_class("ilm_vp")(site, options_of(method_class("ilm_vp"), dict(size=size), "ilm_vp"), 100)
        assert 3 * method.mask.sum() == active
    for scale, active in ((1.0, 101_376), (1.5, 39_936), (0.5, 138_240)):
        method = method_class("autovp")(site, options_of(method_class("autovp"), dict(scale=scale), "autovp"), 100)
        assert 3 * method.mask().sum() == active
    head = method.make_head(site, 100)
    assert sum(p.numel() for p in head.parameters()) == 100_100


def test_labels_of_adapted_forms(place):
    column, site = min(place[0], 1), place[1]
    for name, options, label in (
        ("vpt", {}, ("vpt_vim", None)), ("e2vpt", {}, ("e2vpt_in", None)), ("insvp", {}, ("insvp_vim", "insvp_width" if site.num_features != 768 else None)),
        ("insvp", dict(token_once=True), ("insvp_vim", "insvp_once")), ("spt", {}, ("spt_vim", None)), ("damvp", {}, (None, None)),
    ):  # fmt: skip
        cls = method_class(name)
        assert cls.label(site, cls.Options(**options)) == label[column], name


def test_the_shallow_forms_have_sizes_of_their_own(place):
    _, site = place
    made = {(m, deep): method_class(m)(site, method_class(m).Options(deep=deep), 5) for m in ("vpt", "spt") for deep in (True, False)}  # fmt: skip
    assert [made["spt", deep].opt.num_tokens for deep in (True, False)] == [20, 100]
    assert [made["vpt", deep].drop.p for deep in (True, False)] == [0.1, 0.0]
