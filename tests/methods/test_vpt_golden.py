"""VPT against the published ViT code, and on a (hidden, residual) stream against its own definition."""

import json

import pytest
import torch
import torch.nn.functional as F

from methods.published_vit import vit_of
from support import GOLDEN, assert_close, golden, starting
from svp.methods.vpt import VPT, places
from svp.model import adapt
from svp.seams import BlockSite, Site, Tokens


@pytest.mark.parametrize("case", ["vpt_shallow", "vpt_deep", "vpt_deep_project"])
def test_published_vit(case):
    config, t = golden("prompts", case)
    params = starting(t, "param.")
    net = vit_of(config, params)
    project = config["project"] if config.get("project", -1) > 0 else None
    model = adapt(
        net, "vpt", num_classes=config["classes"], num_tokens=config["num_tokens"], deep=config["deep"], project=project,
        dropout=0.0, probe=False,
    ).double()  # fmt: skip
    method = model.method
    names = [k for k in ("transformer.prompt_embeddings", "transformer.deep_prompt_embeddings") if k in params]
    method.prompts.data = torch.cat([params[k].reshape(-1, *params[k].shape[-2:]) for k in names])
    if project:
        method.proj.load_state_dict(starting(params, "transformer.prompt_proj."))
    model.head.load_state_dict(starting(params, "head."))
    x = t["x"].requires_grad_()
    logits = model(x)
    assert_close(logits, t["logits"], "logits")
    loss = F.cross_entropy(logits, t["labels"])
    loss.backward()
    assert_close(loss, t["loss"].squeeze(), "loss")
    assert_close(x.grad, t["grad_x"], "dx")
    grads = torch.cat([t[f"grad.{k}"].reshape(-1, *t[f"grad.{k}"].shape[-2:]) for k in names])
    assert_close(method.prompts.grad, grads, "dprompts")
    for name, p in model.head.named_parameters():
        assert_close(p.grad, t[f"grad.head.{name}"], f"dhead.{name}")
    if project:
        for name, p in method.proj.named_parameters():
            assert_close(p.grad, t[f"grad.transformer.prompt_proj.{name}"], f"dproj.{name}")


class StandIn:
    """Block i of the golden file's network: hidden, residual in and out."""

    def __init__(self, t, i):
        self.g, self.w = t[f"g{i}"], t[f"W{i}"]

    def __call__(self, tokens):
        stream = tokens.stream
        u = F.layer_norm(stream, stream.shape[-1:], eps=1e-5) * self.g
        count = torch.arange(1, u.shape[1] + 1, dtype=u.dtype)[:, None]
        before = u.cumsum(1) / count
        after = u.flip(1).cumsum(1).div(count).flip(1)
        return tokens._replace(x=torch.tanh((before + 0.5 * after) @ self.w.T), residual=stream)


@pytest.mark.parametrize("position", ["pre", "post", "both", "uniform", "middle"])
@pytest.mark.parametrize("mode", ["replace", "hidden_only", "add", "shallow"])
def test_delayed_residual(position, mode):
    config, t = golden("prompts", "vim_vpt_own")
    n, cls, depth, d = config["n"], config["cls"], config["L"], config["d"]
    blocks = tuple(BlockSite(d, e=2 * d, n=4, r=1, k=2, taps=4) for _ in range(depth))
    site = Site("stand-in", blocks, {}, frozenset(), (8, 8), 1, (2, 4), (cls,), d, (0,) * 3, (1,) * 3)
    deep = mode != "shallow"
    opt = VPT.Options(
        num_tokens=config["T"], deep=deep, dropout=0.0, position=position, vim_deep=mode if deep else "replace"
    )
    method = VPT(site, opt, 2).double()
    deep_prompts = [t["deep_prompt_embeddings"]] if deep else []
    method.prompts.data = torch.cat([t["prompt_embeddings"], *deep_prompts])
    patches = torch.tensor([i for i in range(n) if i != cls])
    tokens = Tokens(t["z"], None, (cls,), patches, patches.new_empty(0), (2, 4))
    for i in range(depth):
        tokens = method.block(tokens, i, StandIn(t, i))
    stream = tokens.stream
    feature = (F.layer_norm(stream, stream.shape[-1:], eps=1e-5) * t[f"g{depth}"])[:, tokens.cls[0]]
    assert_close(feature, t[f"{position}.{mode}.feature"], "feature")
    (feature * t["w"]).sum().backward()
    assert_close(method.prompts.grad[:1], t[f"{position}.{mode}.grad_prompt_embeddings"], "dprompts")
    if deep:
        assert_close(method.prompts.grad[1:], t[f"{position}.{mode}.grad_deep_prompt_embeddings"], "ddeep")


def test_places_by_table():
    rows = json.loads((GOLDEN / "prompts/vim_positions_own.json").read_text())
    assert len(rows) > 20
    for key, want in rows.items():
        *sizes, position = key.split(",")
        n, cls, count = (int(word.partition("=")[2]) for word in sizes)
        before = places(position, n, count, (cls,))
        assert [t + j for j, t in enumerate(before)] == want["prompt_slots"], key
        assert cls + sum(t <= cls for t in before) == want["cls_index"], key
