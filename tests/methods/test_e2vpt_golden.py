"""E2VPT against the published ViT code, and its pruning against the published trainer."""

import json

import pytest
import torch
import torch.nn.functional as F

from methods.published_vit import vit_of
from support import GOLDEN, assert_close, golden, starting
from svp.methods.e2vpt import lowest, masked_count
from svp.model import adapt

KV = "transformer.encoder.layer.{}.attn.deep_QKV_embeddings{}"
TOKENS, PIECES = "transformer.prompt_soft_tokens_mask_cls_token", "transformer.prompt_soft_tokens_pieces_mask_cls_token"
PROMPTS = ("transformer.prompt_embeddings", "transformer.deep_prompt_embeddings")


@pytest.mark.parametrize("case", ["e2vpt_shared_softmask", "e2vpt_separate_append", "e2vpt_shared_rewind_binarymask"])
def test_published_vit(case):
    config, t = golden("prompts", case)
    params = starting(t, "param.")
    net = vit_of(config, {k: v for k, v in params.items() if "deep_QKV" not in k})
    share, depth = config["share_kv"], config["depth"]
    model = adapt(
        net, "e2vpt", num_classes=config["classes"], num_tokens=config["num_tokens_p"], kv_tokens=config["num_tokens_kv"],
        share_kv=share, pieces=config["pieces"], segments="interleaved", masks_train=TOKENS in config["trainable"],
        dropout=0.0, probe=False,
    ).double()  # fmt: skip
    method = model.method
    tables = {"k": "" if share else "_K"} | ({} if share else {"v": "_V"})
    method.prompts.data = torch.cat([params[k].reshape(-1, *params[k].shape[-2:]) for k in PROMPTS])
    for name, suffix in tables.items():
        getattr(method, name).data = torch.stack([params[KV.format(i, suffix)] for i in range(depth)])
    method.token_mask.data, method.piece_mask.data = params[TOKENS], params[PIECES]
    model.head.load_state_dict(starting(params, "head."))
    x = t["x"].requires_grad_()
    logits = model(x)
    assert_close(logits, t["logits"], "logits")
    loss = F.cross_entropy(logits, t["labels"])
    loss.backward()
    assert_close(loss, t["loss"].squeeze(), "loss")
    assert_close(x.grad, t["grad_x"], "dx")
    assert_close(
        method.prompts.grad,
        torch.cat([t[f"grad.{k}"].reshape(-1, *t[f"grad.{k}"].shape[-2:]) for k in PROMPTS]),
        "dprompts",
    )
    for name, suffix in tables.items():
        want = torch.stack([t[f"grad.{KV.format(i, suffix)}"] for i in range(depth)])
        assert_close(getattr(method, name).grad, want, f"d{name}")
    for p, name in ((method.token_mask, TOKENS), (method.piece_mask, PIECES)):
        assert (p.grad is None) == (name not in config["trainable"])
        if p.grad is not None:
            assert_close(p.grad, t[f"grad.{name}"], f"d{name}")
    for name, p in model.head.named_parameters():
        assert_close(p.grad, t[f"grad.head.{name}"], f"dhead.{name}")


def test_levels_and_selection_of_the_published_trainer():
    rows = json.loads((GOLDEN / "prompts/e2vpt_pruning.json").read_text())
    picked = rows.pop("selection")
    for key, want in rows.items():
        tokens, pieces = (int(word.partition("=")[2]) for word in key.split(","))
        for count, kept, levels in ((tokens, 1, want["token_cumulative"]), (pieces, 4, want["piece_cumulative"])):
            assert [masked_count(count, (j + 1) / 10, kept) for j in range(len(levels))] == levels, key
    total = 0
    for more, want in zip(picked["increments"], picked["masked_after_each"], strict=True):
        total += more
        assert sorted(lowest(torch.tensor(picked["token_importance"]), total).tolist()) == want
    total, scores = 0, torch.tensor(picked["piece_importance"])
    for more, want in zip(picked["piece_increments"], picked["pieces_masked_after_each"], strict=True):
        total += more
        found = lowest(scores, total)
        assert {str(t): sorted(row) for t, row in enumerate(found.tolist())} == want
