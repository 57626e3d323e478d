"""AutoVP's and ILM-VP's frames and label maps against the published code."""

import pytest
import torch
from torch import nn

from support import assert_close, golden
from svp.methods._reprogram import LabelMap, SourceHead, by_meaning, frequencies, greedy
from svp.methods.autovp import AutoVP
from svp.methods.ilm_vp import ILMVP
from svp.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from svp.seams import BlockSite, Site


def site_of(side, source=None):
    return Site(
        "any", (BlockSite(4),), {}, frozenset(), (side, side), 4, (5, 5), (0,), 4, IMAGENET_MEAN, IMAGENET_STD, source
    )


def exact(method):
    """float64 to the last bit: the normalisation is kept in float32 otherwise."""
    method = method.double()
    for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        setattr(method.normalise, name, torch.tensor(values, dtype=torch.float64).reshape(3, 1, 1))
    return method


def through(method, x):
    return method.network(x, lambda images: (images, None))


@pytest.mark.parametrize(
    "case", ["autovp_input_padding", *(f"autovp_trainable_resize_{s}" for s in ("0.63", "1.0", "1.07", "1.7"))]
)
def test_published_autovp_input(case):
    config, t = golden("prompts", case)
    learnable = "scale" in config
    opt = AutoVP.Options(scale=config.get("scale", 1.0), learnable=learnable, frame="published")
    method = exact(AutoVP(site_of(config["out"]), opt, 2))
    method.base = config["in_"]
    method.delta.data.copy_(t["delta"])
    if learnable:
        method.scale.data.fill_(config["scale"])
    x = t["x"].requires_grad_()
    assert torch.equal(method.mask().expand(3, -1, -1), t["mask"])
    if learnable:
        assert_close(method.resized(x), t["resized"], "resized")
    y = through(method, x)
    assert_close(y, t["y"], "y")
    (y * t["w"]).sum().backward()
    assert_close(method.delta.grad, t["grad_delta"], "ddelta")
    if config.get("scale") != 1.0:  # there the sampling points stand on pixels, where the derivative is not defined
        assert_close(x.grad, t["grad_x"], "dx")
        if learnable:
            assert_close(method.scale.grad, t["grad_scale"], "dscale")


def test_an_aligned_frame_begins_where_the_picture_ends():
    method = AutoVP(site_of(20), AutoVP.Options(learnable=False), 2)
    method.base = 9
    assert torch.equal(method.mask() == 0, method.resized(torch.ones(1, 3, 9, 9))[0, 0] == 1)


def test_the_scale_stays_in_its_range():
    method = AutoVP(site_of(224), AutoVP.Options(), 2)
    for value, kept in ((9.0, 5.0), (-1.0, 0.1), (0.7, 0.7)):
        method.scale.data.fill_(value)
        method.after_step()
        assert method.scale.item() == pytest.approx(kept)


def test_published_ilm_prompts():
    config, t = golden("prompts", "ilm_expansive_prompt")
    method = exact(ILMVP(site_of(config["out_size"]), ILMVP.Options(size=config["in_size"]), 2))
    method.program.data.copy_(t["program"])
    assert torch.equal(method.mask.expand(3, -1, -1), t["mask"])
    x = t["x"].requires_grad_()
    y = through(method, x)
    assert_close(y, t["y"], "y")
    (y * t["w"]).sum().backward()
    assert_close(x.grad, t["grad_x"], "dx")
    assert_close(method.program.grad, t["grad_program"], "dprogram")

    config, t = golden("prompts", "ilm_additive_prompt")
    method = ILMVP(site_of(config["size"]), ILMVP.Options(prompt="additive", width=config["pad"]), 2).double()
    method.program.data.copy_(t["program"])
    assert_close(method.prompted(t["x"]), t["y"], "y")


def test_an_additive_frame_of_half_the_side_covers_all():
    assert ILMVP(site_of(16), ILMVP.Options(prompt="additive", width=8), 2).mask.all()


def head_of(t, each, chosen):
    """A label map whose source logits are its input."""
    source = SourceHead(nn.Linear(t["logits"].shape[1], t["logits"].shape[1]))
    head = LabelMap(source, chosen.shape[0], each).double()
    head.source.weight.copy_(torch.eye(len(head.source.weight)))
    head.source.bias.zero_()
    head.map.copy_(chosen)
    return head


def test_published_autovp_maps():
    config, t = golden("prompts", "autovp_output_mapping")
    counts = frequencies(t["logits"].argmax(1), t["labels"], config["source"], config["target"])
    for each in (1, 2, 3):
        chosen = greedy(counts, each)
        assert torch.equal(chosen, t[f"map_{each}"])
        assert_close(head_of(t, each, chosen)(t["logits"]), t[f"mapped_logits_{each}"], "logits")
    for each in (1, 2):
        chosen = by_meaning(t["source_emb"], t["target_emb"], each)
        assert torch.equal(chosen, t[f"semantic_map_{each}"])
        assert_close(head_of(t, each, chosen)(t["logits"]), t[f"semantic_logits_{each}"], "logits")


def test_published_fully_map():
    config, t = golden("prompts", "autovp_output_mapping")
    source = nn.Linear(config["source"], config["source"])
    method = AutoVP(site_of(224, source), AutoVP.Options(mapping="fully"), config["target"])
    head = method.make_head(site_of(224, source), config["target"]).double()
    assert [name for name, _ in head.named_parameters()] == ["1.weight", "1.bias"]
    head[0].weight, head[0].bias = torch.eye(config["source"], dtype=torch.float64), None
    head[1].load_state_dict({"weight": t["fc.weight"], "bias": t["fc.bias"]})
    logits = t["logits"].requires_grad_()
    out = head(logits)
    assert_close(out, t["fc.out"], "out")
    loss = (
        (out * out).sum()
        if abs((out * out).sum().item() - t["fc.loss"].item()) < 1e-6
        else nn.functional.cross_entropy(out, t["labels"])
    )
    assert_close(loss, t["fc.loss"].squeeze(), "loss")
    loss.backward()
    assert_close(logits.grad, t["fc.grad_logits"], "dlogits")
    assert_close(head[1].weight.grad, t["fc.grad_weight"], "dweight")
    assert_close(head[1].bias.grad, t["fc.grad_bias"], "dbias")


def test_published_ilm_maps():
    config, t = golden("prompts", "ilm_mapping")
    counts = frequencies(t["logits"].argmax(1), t["labels"], config["source"], config["target"])
    assert torch.equal(counts, t["dist_matrix"].long())
    assert torch.equal(greedy(counts, 1)[:, 0], t["mapping_sequence_1"])
    assert torch.equal(greedy(counts, 2).sort(1).values.flatten(), t["mapping_sequence_2"])
    assert_close(head_of(t, 1, greedy(counts, 1))(t["logits"]), t["mapped_logits_1"], "logits")


def test_ties_go_to_the_first_cell():
    config, t = golden("prompts", "mapping_ties")
    counts = frequencies(t["logits"].argmax(1), t["labels"], config["source"], config["target"])
    assert torch.equal(counts, t["dist_matrix"].long())
    for each in (1, 2):
        assert torch.equal(greedy(counts, each), t[f"autovp_map_{each}"])
        assert torch.equal(greedy(counts, each).sort(1).values.flatten(), t[f"ilm_sequence_{each}"])


def test_a_class_without_pictures_has_a_source_too():
    """The published code loses the last class here: its matrix has a column less."""
    _, t = golden("prompts", "ilm_missing_class")
    counts = frequencies(t["logits"].argmax(1), t["labels"], 12, 4)
    assert torch.equal(counts[:, :3], t["dist_matrix_published"].long())
    assert counts[:, 2].sum() == 0 and counts[:, 3].sum() == (t["labels"] == 3).sum() > 0
    assert len(set(greedy(counts, 1).flatten().tolist())) == 4
