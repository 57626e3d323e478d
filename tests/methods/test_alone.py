"""What methods of weights, states and adapters do alone: they start at the frozen network, merge or say why not, are saved in every form."""

import pytest
import torch

from methods.nets import net_of, stirred
from support import assert_close
from svp.errors import SvpError
from svp.model import adapt, load

ON_VIM = [
    ("bitfit", {}), ("lora", {"rank": 4}), ("lora", dict(rank=3, dropout=0.5, targets=("in_proj", "X", "Z", "out_proj", "B", "embed"))),
    ("lora", dict(rank=3, dora=True, targets=("X", "d", "B", "C", "dt", "embed"))), ("lora", dict(rank=2, dora="row", rslora=True)),
    ("ssf", {}), ("ssf", dict(scan=False)), ("repadapter", {}), ("repadapter", dict(dropout=0.5)), ("fact", dict(rank=4)),
    ("fact", dict(kind="tt", rank=4)), ("partial", dict(parts=("A", "D", "conv1d", "bias", "conv1d_bias", "cls", "pos"))),
    ("additional_scan", dict(n=2)), ("additional_scan", dict(n=2, pos="suffix", init="mambapeft")), ("sdt", {}),
]  # fmt: skip

ON_VIT = [
    ("bitfit", {}), ("lora", {}), ("lora", dict(dropout=0.5, targets=("q", "v", "proj", "fc1", "fc2", "embed"))),
    ("lora", dict(dora=True, targets=("q", "k", "v", "qkv"))), ("ssf", {}), ("repadapter", {}), ("repadapter", dict(dropout=0.5)),
    ("fact", dict(rank=4)), ("fact", dict(kind="tt", rank=4)), ("partial", dict(parts=("cls", "pos"))),
]  # fmt: skip

NOT_MERGED = {
    "vim": [
        ("affix", {}), ("affix", dict(type="outer_dual_prefix", projection=True, hidden=3)), ("affix", dict(type="inner_single_prefix")),
        ("affix", dict(type="outer_single_prefix")), ("prompt_tuning", dict(type="prefix_suffix", projection=True)),
        ("state_offset", {}), ("state_offset", dict(kind="y")), ("state_offset", dict(rank=2, ratio=2)),
        ("initial_state", dict(conv=True)), ("adapter", dict(hidden=4)), ("adapter", dict(kind="parallel", hidden=4)),
        ("adapter", dict(preset="houlsby")),
    ],
    "vit": [
        ("prefix_tuning", {}), ("prefix_tuning", dict(n=2, projection=True, hidden=3)), ("prompt_tuning", {}),
        ("adapter", dict(layernorm="in", scale="learned")), ("adapter", dict(preset="houlsby")), ("adapter", dict(preset="pfeiffer")),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind,method,options", [("vim", *r) for r in ON_VIM] + [("vit", *r) for r in ON_VIT], ids=str)
def test_merged_is_unmerged(kind, method, options, images):
    net = net_of(kind)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    model = stirred(adapt(net, method, num_classes=3, **options)).eval()  # the probe runs here too
    merged = model.merge().eval()
    with torch.no_grad():
        want, got, plain = model(images), merged(images), net(images)
    assert_close(got, want, "logits", 1e-10)
    assert (want - plain).abs().max() > 1e-3 and type(merged) is type(net)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


@pytest.mark.parametrize("kind,method,options", [(k, *r) for k, rows in NOT_MERGED.items() for r in rows], ids=str)
def test_what_is_no_weight_is_not_merged(kind, method, options):
    model = adapt(net_of(kind), method, num_classes=3, **options)
    with pytest.raises(SvpError, match="cannot be merged"):
        model.merge()


STARTS = [("bitfit", {}), ("repadapter", {}), ("fact", {"rank": 4}), ("ssf", dict(init_std=0.0)), ("adapter", {})]

STARTS_VIM = [
    ("lora", {"rank": 4, "targets": ("X", "B", "embed")}), ("partial", {}), ("sdt", {}), ("additional_scan", {}),
    ("state_offset", {}), ("state_offset", dict(rank=2)), ("initial_state", {}), ("adapter", dict(preset="parallel")),
]  # fmt: skip


@pytest.mark.parametrize(
    "kind,method,options",
    [(k, *row) for k in ("vim", "vit") for row in STARTS] + [("vim", *row) for row in STARTS_VIM],
    ids=str,
)
def test_training_starts_at_the_frozen_network(kind, method, options, images):
    net = net_of(kind)
    model = adapt(net, method, num_classes=3, probe=False, **options).eval()
    with torch.no_grad():
        assert_close(model.features(images), net.features(images), "feature", 1e-12)


SAVED = [("vim", *r) for r in [*ON_VIM, *NOT_MERGED["vim"]]] + [("vit", *r) for r in [*ON_VIT, *NOT_MERGED["vit"]]]


@pytest.mark.parametrize("kind,method,options", SAVED, ids=str)
def test_every_form_is_saved_and_loaded(kind, method, options, images, tmp_path):
    net = net_of(kind)
    model = stirred(adapt(net, method, num_classes=3, probe=False, **options)).eval()
    model.save_pretrained(tmp_path / "a")
    again = load(tmp_path / "a", net)
    for name, value in model.state_dict().items():  # stored as they are
        assert torch.equal(again.state_dict()[name], value), name
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


def test_what_is_adapted_is_labelled():
    for kind, method, label in [
        ("vim", "ssf", "ssf_vim"), ("vit", "ssf", "ssf"), ("vim", "repadapter", "repadapter_vim"), ("vim", "fact", "fact_vim"),
        ("vim", "adapter", "adapter_vim"), ("vit", "adapter", "adapter"), ("vit", "lora", "lora"), ("vim", "affix", "affix"),
        ("vit", "prompt_tuning", "prompt_tuning_vit"),
    ]:  # fmt: skip
        options = {"rank": 4} if method == "fact" else {}
        assert adapt(net_of(kind), method, num_classes=3, probe=False, **options).labels == (label,)


def test_what_merged_networks_are_adapted_to_asks_for_them(tmp_path):
    merged = stirred(adapt(net_of("vim"), "bitfit", num_classes=3)).merge()
    adapt(merged, "linear", num_classes=3).save_pretrained(tmp_path / "adapter")
    with pytest.raises(SvpError, match="a backbone with merged weights, which no file holds") as err:
        load(tmp_path / "adapter")
    assert err.value.hint == "give backbone="
    assert load(tmp_path / "adapter", merged).num_classes == 3
