"""Trainable parameters on the published sizes, as the sources count them."""

import pytest
import torch

from svp.backbones.vim import VARIANTS, Vim
from svp.backbones.vit import Vit
from svp.methods.base import options_of
from svp.registry import method_class

VIM_S = [  # the specification's table on Vim-S, without heads
    ("bitfit", {}, 74_112), ("lora", {}, 1_769_472), ("lora", dict(targets=("in_proj",), rank=32), 1_474_560),
    ("lora", dict(targets=("Z",)), 1_769_472), ("lora", dict(targets=("out_proj",), rank=96), 2_654_208),
    ("lora", dict(targets=("x_proj",)), 2_531_328), ("lora", dict(targets=("d",)), 2_433_024),
    ("lora", dict(targets=("B",)), 2_408_448), ("lora", dict(targets=("C",)), 2_408_448),
    ("lora", dict(targets=("dt",)), 2_433_024), ("lora", dict(targets=("embed",), rank=32), 36_864),
    ("lora", dict(preset="dora"), 1_778_688), ("adapter", dict(preset="parallel"), 884_736),
    ("adapter", dict(kind="parallel", hidden=24), 663_552), ("adapter", {}, 1_190_400),
    ("adapter", dict(preset="pfeiffer"), 156_864), ("adapter", dict(preset="houlsby"), 156_864),
    ("affix", dict(preset="published"), 221_184), ("affix", {}, 110_592), ("affix", dict(preset="projection"), 115_685_376),
    ("prompt_tuning", {}, 3_072), ("prompt_tuning", dict(projection=True), 298_752), ("additional_scan", {}, 663_552),
    ("partial", dict(parts=("A",)), 589_824), ("partial", dict(parts=("D",)), 36_864), ("partial", {}, 147_456),
    ("partial", dict(parts=("bias",)), 36_864), ("partial", dict(parts=("cls",)), 384), ("partial", dict(parts=("pos",)), 75_648),
    ("state_offset", {}, 589_824), ("state_offset", dict(kind="y"), 36_864), ("state_offset", dict(rank=2), 24 * 2 * 2 * 784),
    ("initial_state", {}, 589_824), ("initial_state", dict(state=False, conv=True), 110_592), ("sdt", {}, 13_056),
    ("ssf", {}, 191_232), ("ssf", dict(scan=False), 112_128), ("repadapter", {}, 120_000), ("fact", {}, 18_688),
]  # fmt: skip

VIT_B = [  # on ViT-B/16
    ("bitfit", {}, 102_912), ("lora", {}, 294_912), ("lora", dict(preset="dora"), 313_344),
    ("lora", dict(targets=("qkv",), dora=True), 322_560), ("lora", dict(rslora=True), 294_912), ("adapter", {}, 1_189_632),
    ("adapter", dict(hidden=8), 156_768), ("adapter", dict(preset="petl_vit"), 147_456),
    ("adapter", dict(preset="houlsby"), 313_536), ("adapter", dict(preset="pfeiffer"), 156_768), ("ssf", {}, 205_824),
    ("repadapter", {}, 239_808), ("repadapter", dict(where="attn"), 119_904), ("fact", {}, 30_976), ("fact", dict(rank=32), 86_528),
    ("fact", dict(preset="tt"), 61_440), ("prefix_tuning", {}, 184_320), ("prompt_tuning", {}, 6_144),
]  # fmt: skip


@pytest.fixture(scope="module")
def sites():
    """Sites of the big networks, without memory behind their tensors."""
    with torch.device("meta"):
        vim, vit = Vim("vim_small", **VARIANTS["vim_small"]), Vit("vit_base_patch16_224.augreg_in1k")
    return {"vim": vim.site(), "vit": vit.site()}


@pytest.mark.parametrize(
    "kind,method,options,count", [("vim", *row) for row in VIM_S] + [("vit", *row) for row in VIT_B], ids=str
)
def test_counts_of_the_sources(sites, kind, method, options, count):
    cls = method_class(method)
    opt = options_of(cls, options, method)
    assert cls.unfit(sites[kind], opt) is None
    with torch.device("meta"):
        made = cls(sites[kind], opt, 2)
    assert sum(p.numel() for p in made.parameters() if p.requires_grad) == count
