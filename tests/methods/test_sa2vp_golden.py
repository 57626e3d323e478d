"""SA2VP's cross attention and its two streams against the published encoder."""

import pytest
import torch

from support import assert_close, golden, starting
from svp.backbones.vit import Vit
from svp.methods.sa2vp import Projections, attention
from svp.model import adapt
from svp.seams import Tokens


def projections(params):
    """Published to_q, to_k, to_v, to_out -> ours."""
    qkv = [torch.cat([params[f"to_{name}.{leaf}"] for name in "qkv"]) for leaf in ("weight", "bias")]
    return Projections(*qkv, params["to_out.weight"], params["to_out.bias"])


@pytest.mark.parametrize("kind", ["base", "acc"])
def test_published_cross_attention(kind):
    config, t = golden("prompts", f"sa2vp_crossattn_{kind}")
    heads = round(config["scale"] ** 2 * config["dim"])
    out = attention(t["y_q"], t["x_kv"], projections(starting(t, "param.")), heads, (14, 14), kind)
    assert_close(out, t["out"], "out")


LAYER = {
    "attention_norm": "norm1", "ffn_norm": "norm2", "attn.out": "attn.proj", "ffn.fc1": "mlp.fc1", "ffn.fc2": "mlp.fc2",
}  # fmt: skip
OURS = {"ffn_norm": "norm", "ffn.fc1": "down", "ffn.fc2": "up"}


def frozen_vit(config, params):
    net = Vit(
        "vit",
        embed_dim=config["d"],
        depth=config["layers"],
        num_heads=config["heads"],
        mlp_ratio=2,
        patch_size=1,
        img_size=14,
    )
    net = net.double().eval()
    state = {"norm." + leaf: params[f"encoder_norm.{leaf}"] for leaf in ("weight", "bias")}
    for i in range(config["layers"]):
        for ours, name in ((v, k) for k, v in LAYER.items()):
            for leaf in ("weight", "bias"):
                state[f"blocks.{i}.{ours}.{leaf}"] = params[f"layer.{i}.{name}.{leaf}"]
        for leaf in ("weight", "bias"):
            state[f"blocks.{i}.attn.qkv.{leaf}"] = torch.cat(
                [params[f"layer.{i}.attn.{n}.{leaf}"] for n in ("query", "key", "value")]
            )
    assert not net.load_state_dict(state, strict=False).unexpected_keys
    return net


class OwnNorm:
    """A block whose norm in front of the cross attention is another than its own, as in the golden file."""

    def __init__(self, run, params, i):
        self.run, self.w = run, run.w
        self.weight, self.bias = (params[f"cross_attn.{i}.attention_norm.{leaf}"] for leaf in ("weight", "bias"))

    def __call__(self, tokens):
        return self.run(tokens)

    def norm(self, x):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, 1e-6)


@pytest.mark.parametrize("kind", ["base", "acc"])
def test_published_encoder(kind):
    config, t = golden("prompts", f"sa2vp_encoder_{kind}")
    params = starting(t, "param.")
    net = frozen_vit(config, params)
    opt = dict(hidden=config["inter_dim"], scale=config["add_scale"], attn=kind, dropout=0.0)
    method = adapt(net, "sa2vp", num_classes=2, probe=False, **opt).double().method
    ours = {"deep": "deep_ppt", "deep_scale": "cross_conv"}
    ours |= {f"deep_proj.{j}.{leaf}": f"deep_proj.{j}.{leaf}" for j in range(2) for leaf in ("weight", "bias")}
    ours |= {
        f"cross.{i}.{new}.{leaf}": f"cross_attn.{i}.{old}.{leaf}"
        for i in range(config["layers"]) for old, new in OURS.items() for leaf in ("weight", "bias")
    }  # fmt: skip
    assert set(ours.values()) == set(config["trainable"])
    named = dict(method.named_parameters())
    for name, old in ours.items():
        named[name].data.copy_(params[old].reshape(named[name].shape))
    # the file's cross attention has projections of its own where the method copies the block's
    method.frozen = lambda i, run: projections(starting(params, f"cross_attn.{i}.attn."))
    block = method.block
    method.block = lambda tokens, i, run: block(tokens, i, OwnNorm(run, params, i))
    places = torch.arange(1, 197)
    hidden, prompt = t["hidden_in"].requires_grad_(), t["prompt_in"].requires_grad_()
    net.embed = lambda images, w: Tokens(hidden, None, (0,), places, places[:0], (14, 14))
    w = net.in_force(method)
    tokens = net.run_blocks(None, w, method, prompt, 0.0)
    q = net.last_norm(tokens.side, w)
    assert_close(tokens.x, t["encoded"], "encoded")
    assert_close(q, t["encoded_prompt"], "encoded_prompt")
    ((tokens.x * t["w"]).sum() + (q * t["w2"]).sum()).backward()
    assert_close(hidden.grad, t["grad_hidden_in"], "dhidden")
    assert_close(prompt.grad, t["grad_prompt_in"], "dprompt")
    for name, old in ours.items():
        assert_close(named[name].grad, t[f"grad.{old}"].reshape(named[name].shape), f"d{name}")


def test_the_second_loss_and_its_absence():
    net = Vit("vit", embed_dim=8, depth=4, num_heads=2, mlp_ratio=2, patch_size=4, img_size=12)
    model = adapt(net, "sa2vp", num_classes=3, dropout=0.0, hidden=2, second_loss=0.25)
    images, target, seen = torch.randn(2, 3, 12, 12), torch.tensor([0, 2]), []

    def criterion(logits, target):
        seen.append(logits)
        return torch.nn.functional.cross_entropy(logits, target)

    loss = model.method.loss(model, images, target, criterion)
    assert torch.equal(seen[0], model(images)) and not torch.equal(*seen)
    assert torch.allclose(loss, 0.75 * criterion(seen[0], target) + 0.25 * criterion(seen[1], target))
    assert model.method.seconds is None
    published = adapt(net, "sa2vp", num_classes=3, dropout=0.0, hidden=2, preset="published").train()
    assert not torch.equal(published(images), published(images)) and torch.equal(
        published.eval()(images), published(images)
    )
