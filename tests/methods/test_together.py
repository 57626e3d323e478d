"""Methods that act together: gradients, order, merging, and who cannot."""

import pytest
import torch
import torch.nn.functional as F

from methods.nets import net_of, stirred
from support import assert_close
from svp.errors import SvpError
from svp.model import adapt, load

TOGETHER = [
    ("vim", ["svp", "lora"]), ("vim", ["affix", "lora", "partial"]), ("vim", [("state_offset", {"kind": "y"}), "additional_scan", "ssf"]),
    ("vim", ["sdt", ("lora", dict(targets=("out_proj", "in_proj"), rank=4))]), ("vim", ["svp", ("adapter", dict(preset="parallel"))]),
    ("vim", [("lora", dict(rank=4, dropout=0.1)), "adapter"]), ("vit", [("lora", dict(rank=4, dropout=0.1)), "adapter"]),
    ("vim", [("lora", dict(rank=4, dropout=0.1)), ("adapter", dict(preset="parallel"))]),
    ("vim", ["lora", "full"]), ("vit", [("lora", dict(rank=4, dora=True)), "full"]),
    ("vit", ["svp", "lora"]), ("vit", ["prefix_tuning", "adapter", "bitfit"]), ("vit", ["prompt_tuning", "fact"]),
]  # fmt: skip


@pytest.mark.parametrize("kind,methods", TOGETHER, ids=str)
def test_methods_compose(kind, methods, images):
    small = {"lora": {"rank": 4}, "svp": {"hidden": 4}, "fact": {"rank": 4}}
    methods = [(m, small.get(m, {})) if isinstance(m, str) else m for m in methods]
    model = stirred(adapt(net_of(kind), methods, num_classes=3))
    F.cross_entropy(model(images), torch.tensor([0, 1, 2])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.trainable_parameters())


def test_a_norm_of_dora_is_the_networks_whatever_the_order(images):
    """After ssf the norm would take ssf's scale out again."""
    dora = ("lora", dict(rank=2, dora="row", targets=("qkv", "fc1")))
    one, two = (stirred(adapt(net_of("vit"), pair, num_classes=3)) for pair in (["ssf", dora], [dora, "ssf"]))
    two.load_state_dict(one.state_dict())
    with torch.no_grad():
        assert torch.equal(one(images), two(images))
    name = "blocks.0.attn.qkv.weight"
    w = dict(one.backbone.named_parameters())
    before = one.method.weights(w)[name]
    with torch.no_grad():
        for p in one.method.parts["ssf"].parameters():
            p.mul_(2)
    assert_close(one.method.weights(w)[name], 2 * before, "qkv")


MERGED_TOGETHER = [
    [("lora", dict(rank=4, dropout=0.5, targets=("X", "B"))), "ssf"], ["ssf", ("lora", dict(rank=4, dropout=0.5, targets=("X", "B")))],
    [("lora", dict(rank=4, dropout=0.5, targets=("X", "embed"))), ("repadapter", dict(dropout=0.5)), "ssf", "full"],
    ["lora", "ssf", "additional_scan"], ["additional_scan", "ssf", ("lora", dict(rank=4, targets=("B", "C", "d")))], [("lora", dict(rank=4, dropout=0.5)), "repadapter"],
    ["repadapter", ("lora", dict(rank=4, dropout=0.5))], [("repadapter", dict(dropout=0.5)), "lora"],
    [("repadapter", dict(dropout=0.5)), ("lora", dict(rank=4, dropout=0.5)), "bitfit"], ["ssf", ("repadapter", dict(dropout=0.5)), "fact"],
]  # fmt: skip


@pytest.mark.parametrize("methods", MERGED_TOGETHER, ids=str)
def test_merged_is_unmerged_whatever_the_order(methods, images):
    small = {"lora": {"rank": 4}, "fact": {"rank": 4}, "additional_scan": {"n": 2}}
    model = stirred(
        adapt(net_of("vim"), [(m, small.get(m, {})) if isinstance(m, str) else m for m in methods], num_classes=3)
    )
    with torch.no_grad():
        assert_close(model.merge().eval()(images), model.eval()(images), "logits", 1e-10)


MEMORIES = [("state_offset", {}), ("state_offset", dict(rank=2)), ("initial_state", {}), ("affix", {})]


@pytest.mark.parametrize("memory", MEMORIES, ids=str)
@pytest.mark.parametrize("pos", ["prefix", "suffix"])
def test_a_memory_holds_the_states_that_another_method_adds(memory, pos, images, tmp_path):
    more = ("additional_scan", dict(n=3, pos=pos, init="mambapeft"))
    net = net_of("vim")
    model = stirred(adapt(net, [memory, more], num_classes=3)).eval()
    held = model.method.parts[memory[0]].memory(0, {f"{k}": torch.zeros(32) for k in ("D",)})
    sizes = {t.shape[-1] for t in (held.h0, held.offset) if t is not None}
    assert sizes == (set() if memory[0] == "affix" else {4 + 3})
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tmp_path, net)(images), model(images))
        merged = stirred(adapt(net, [more], num_classes=3)).merge()  # a network that has the states already
        alone = adapt(merged, [memory], num_classes=3, probe=False).eval()
        both = adapt(net, [memory, more], num_classes=3, probe=False).eval()
        both.method.parts["additional_scan"].load_state_dict(
            stirred(adapt(net, [more], num_classes=3)).method.state_dict()
        )
        both.method.parts[memory[0]].load_state_dict(alone.method.state_dict())
        both.head = alone.head
        assert_close(both(images), alone(images), "logits", 1e-12)


def test_two_memories_are_refused(images):
    model = adapt(net_of("vim"), ["affix", "initial_state"], num_classes=3, probe=False)
    with pytest.raises(SvpError, match="both bring a memory"):
        model(images)


NOT_TOGETHER = [
    ("vim", ["vpt", "prompt_tuning"]), ("vim", ["e2vpt", "vpt"]), ("vim", ["spt", "insvp"]), ("vit", ["prompt_tuning", "sa2vp"]),
    ("vit", ["sa2vp", "insvp"]), ("vit", ["sa2vp", "vpt"]),
]  # fmt: skip


@pytest.mark.parametrize("kind,methods", NOT_TOGETHER, ids=str)
def test_two_that_count_tokens_are_refused(kind, methods):
    with pytest.raises(SvpError, match=r"counts the tokens of the sequence, beside it .* would insert others") as err:
        adapt(net_of(kind, img_size=32, depth=2), methods, num_classes=3)
    assert err.value.kind == "usage"


@pytest.mark.parametrize(
    "methods", [["damvp", "ilm_vp"], ["ilm_vp", "damvp"], ["vp", "autovp"], ["autovp", "vp"]], ids=str
)
def test_who_takes_raw_pixels_comes_first_whatever_the_order(methods, images):
    model = adapt(net_of("vim", num_classes=9), methods, num_classes=3)
    assert model(images).shape == (3, 3)
    assert adapt(net_of("vim"), [("vpt", dict(preset="shallow")), "prompt_tuning"], num_classes=3)(images).shape == (
        3,
        3,
    )


def test_a_change_of_a_weight_is_as_exact_as_the_weight_under_autocast():
    net = net_of("vim").float()
    model = stirred(adapt(net, ["lora", "repadapter", "ssf", ("fact", dict(rank=4))], num_classes=3, probe=False))
    want = net.in_force(model.method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = net.in_force(model.method)
    assert all(torch.equal(got[name], t) for name, t in want.items())
    offset = stirred(adapt(net, "state_offset", num_classes=3, rank=2)).method
    want = offset.memory(0, want).offset
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(offset.memory(0, net.in_force(None)).offset, want)
