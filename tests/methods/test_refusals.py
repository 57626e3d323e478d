"""Options that cannot act on a network: one sentence each."""

import pytest

from methods.nets import net_of
from svp.errors import SvpError
from svp.model import adapt

BAD = [
    ("vim", "lora", dict(targets=("x_porj",)), "did you mean x_proj"), ("vim", "lora", dict(targets=("q",)), "targets q are none of"),
    ("vit", "lora", dict(targets=("X",)), "targets X are none of"), ("vit", "lora", dict(targets=("fc3",)), "did you mean fc"),
    ("vim", "lora", dict(targets=()), "targets is empty"), ("vim", "lora", dict(targets=("X", "X")), "stands twice"),
    ("vim", "lora", dict(rank=4, dora=True, dropout=0.1), "dropout must be 0"), ("vim", "lora", dict(rank=999), "larger than"),
    ("vim", "affix", dict(type="inner_single_suffix"), "a suffix never learns"), ("vim", "affix", dict(type="inner_dual_infix"), "not offered"),
    ("vim", "affix", dict(type="inner_dual_prefx"), "did you mean inner_dual_prefix"), ("vit", "affix", {}, "take prefix_tuning"),
    ("vim", "prefix_tuning", {}, "take affix"), ("vit", "state_offset", {}, "does not have"), ("vit", "initial_state", {}, "does not have"),
    ("vit", "additional_scan", {}, "extends the scans of Vim"), ("vit", "sdt", {}, "tunes the scans of Vim"), ("vit", "partial", {}, "no tensors for 'conv1d'"),
    ("vit", "adapter", dict(kind="parallel"), "take kind=adaptformer"), ("vim", "adapter", dict(kind="pfeiffer", layernorm="in"), "belongs to"),
    ("vim", "repadapter", dict(groups=3), "3 groups do not divide"), ("vim", "repadapter", dict(where="attn"), "belongs to a ViT"),
    ("vim", "fact", dict(rank=17), "larger than the width"), ("vit", "prompt_tuning", dict(type="suffix"), "knows no order"),
    ("vim", "prompt_tuning", dict(hidden=3), "projection=true"), ("vim", "state_offset", dict(ratio=2), "give rank too"),
    ("vim", "partial", dict(parts=("A", "A")), "stands twice"), ("vit", "adapter", dict(kind="houlsby", scale="learned"), "a scale belongs"),
    ("vit", "adapter", dict(kind="pfeiffer", scale=0.1), "a scale belongs"), ("vit", "fact", dict(interleaved=True, kind="tt", rank=4), "kind tk"),
    ("vim", "fact", dict(interleaved=True, rank=4), "of a ViT"), ("vim", "svp", dict(generator_init="zero_up"), "alpha and beta start at zero"),
    ("vit", "svp", dict(generator_init="zero_up", scale_init=1.0, cross_act="relu"), "behind a relu"),
    ("vim", "svp", dict(add_to="branch"), "no hidden output alone"), ("vit", "svp", dict(add_to="branch", cross_source="first_half"), "cross_source"),
]  # fmt: skip


@pytest.mark.parametrize("kind,method,options,words", BAD, ids=str)
def test_what_cannot_act_says_why(kind, method, options, words):
    with pytest.raises(SvpError, match=words) as err:
        adapt(net_of(kind), method, num_classes=3, **options)
    assert err.value.kind == "usage"


def test_one_convolution_has_no_two_pasts():
    with pytest.raises(SvpError, match="both directions of this network share one"):
        adapt(net_of("vim", scan_type="v1"), "initial_state", num_classes=3, conv=True)


def test_fact_refuses_an_mlp_that_is_no_multiple():
    with pytest.raises(SvpError, match="cannot be cut into blocks of 16 x 16"):
        adapt(net_of("vit", mlp_ratio=2.5), "fact", num_classes=3, rank=4)
