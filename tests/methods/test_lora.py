"""LoRA: rows of a joint projection, and where DoRA starts."""

import pytest
import torch

from methods.nets import net_of, stirred
from support import assert_close
from svp.model import adapt


def test_lora_on_a_vit_changes_its_rows_alone():
    net = net_of("vit")
    model = stirred(adapt(net, "lora", num_classes=3))
    assert model.method.opt.targets == ("q", "v") and model.method.opt.rank == 8
    w = {name: p.detach() for name, p in net.named_parameters()}
    changed = model.method.weights(w)
    assert sorted(changed) == [f"blocks.{i}.attn.qkv.weight" for i in (0, 1)]
    for name, value in changed.items():
        moved = (value != w[name]).any(1)
        assert moved[:16].all() and not moved[16:32].any() and moved[32:].all()


def test_dora_starts_at_the_frozen_network_in_both_directions(images):
    net = net_of("vim")
    model = adapt(net, "lora", num_classes=3, rank=4, dora=True, targets=("X", "Z", "out_proj", "d", "B", "C", "dt"))
    with torch.no_grad():
        assert_close(model.features(images), net.features(images), "feature", 1e-12)


@pytest.mark.parametrize(
    "kind,targets",
    [("vim", ("in_proj", "X")), ("vim", ("x_proj", "B")), ("vit", ("qkv", "q")), ("vim", ("X", "in_proj"))],
    ids=str,
)
@pytest.mark.parametrize("dora", ["none", "column", "row"])
def test_targets_that_overlap_add_up(kind, targets, dora):
    """Each change is of the frozen weight, whatever another target has done to the same rows."""
    net = net_of(kind)
    model = stirred(adapt(net, "lora", num_classes=3, rank=3, dora=dora, targets=targets))
    w = {name: p.detach() for name, p in net.named_parameters()}
    changed, m = model.method.weights(w), model.method
    for name, value in changed.items():
        total = w[name].clone()
        for j, (of, rows, _) in enumerate(m.slices):
            if of == name:
                total[rows] += m.added(j, w[name][rows])
        assert_close(value.detach(), total.detach(), name, 1e-12)
