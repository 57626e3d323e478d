"""Prefixes, beside one attention block by hand; affixes without the half that a gate ignores."""

import sys

import torch

from methods.nets import net_of
from support import assert_close
from svp.model import adapt
from svp.ops import dispatch


def test_prefixes_are_tokens_that_everybody_attends_to(images):
    """One block by hand: softmax over the n trained keys and the sequence's own."""
    net = net_of("vit", depth=1)
    model = adapt(net, "prefix_tuning", num_classes=3, n=5)
    k0, v0 = model.method.memory(0, {})
    assert k0.shape == v0.shape == (1, 2, 5, 8)
    block, w = net.blocks[0], dict(net.named_parameters())
    with torch.no_grad():
        x = net.embed(images, w).x
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        k, v = (torch.cat([t0.expand(3, -1, -1, -1), t], 2) for t0, t in ((k0, k), (v0, v)))
        y = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + block.attn.proj(y)
        x = x + block.mlp(block.norm2(x))
        assert_close(model.features(images), net.norm(x)[:, 0], "feature", 1e-12)


def test_affix_without_the_dead_half_is_affix(images):
    net = net_of("vim")
    full, half = (adapt(net, "affix", num_classes=3, x_only=x_only) for x_only in (False, True))
    for ours, theirs in zip(half.method.generator.tokens, full.method.generator.tokens, strict=True):
        ours.data = theirs.data.unflatten(1, (2, 2, 32))[:, :, 0].flatten(1)
    half.head = full.head
    with torch.no_grad():
        assert torch.equal(half(images), full(images))


def test_a_named_kernel_computes_what_affixes_leave_behind(images, monkeypatch):
    asked = []

    def noted(rows, wanted, *args, **more):
        asked.append(wanted)
        return dispatch.pick(rows, wanted, *args, **more)

    for op in ("selective_scan", "causal_conv1d"):
        monkeypatch.setattr(sys.modules[f"svp.ops.{op}"], "pick", noted)
    net = net_of("vim")
    net.kernel = "reference"
    model = adapt(net, "affix", num_classes=3, probe=False)
    x = images.requires_grad_()
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    first.square().sum().backward()  # which the reference alone has
    assert set(asked) == {"reference"}
