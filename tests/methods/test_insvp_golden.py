"""InsVP's prompters against the published modules: the picture is a formula, large tensors are stored with a stride."""

import torch

from support import assert_close, golden, starting
from svp.methods.insvp import InsVP
from svp.methods.svp import simam
from svp.seams import BlockSite, Site


def picture():
    i, j = torch.arange(224.0, dtype=torch.float64)[:, None], torch.arange(224.0, dtype=torch.float64)[None]
    channels = [
        torch.sin(0.11 * (c + 1) * i + 0.07 * j) + 0.3 * torch.cos(0.5 * i - 0.23 * (c + 1) * j) for c in range(3)
    ]
    return torch.stack(channels)[None]


def method_of(**options):
    blocks = (BlockSite(768, kinds=("attn", "mlp"), heads=12),) * 2
    site = Site("any", blocks, {}, frozenset(), (224, 224), 16, (14, 14), (0,), 768, (0,) * 3, (1,) * 3)
    return InsVP(site, InsVP.Options(**options), 2).double().eval()


def test_published_picture_prompter():
    config, t = golden("prompts", "insvp_image_prompter")
    method = method_of(hidden=config["hid"], hidden_global=config["hid2"], kernels=tuple(config["k"]))
    for ours, name in (("local", "meta_net"), ("broad", "meta_net_2")):
        getattr(method, ours).load_state_dict(starting(t, f"param.{name}."))
    assert_close(
        simam(picture())[:, :, ::7, ::7], t["simam_strided"], "simam"
    )  # stored beside the prompts, not before them
    x = picture()
    prompt = method.picture_prompt(x)
    assert_close(prompt.sum(), t["prompt_sum"].squeeze(), "sum", 1e-9)
    local = prompt - 2 * method.broad(x)
    assert_close(local[:, :, ::7, ::7], t["local_strided"], "local")
    got = method.network(x, lambda images, side: (images, None))
    assert_close(got[:, :, ::7, ::7], t["prompted_strided"], "prompted")
    i, j = torch.arange(224.0, dtype=torch.float64)[:, None], torch.arange(224.0, dtype=torch.float64)[None]
    loss = (got * torch.cos(0.031 * i + 0.017 * j)).mean()
    assert_close(loss, t["loss"].squeeze(), "loss")
    loss.backward()
    for ours, name in (("local", "meta_net"), ("broad", "meta_net_2")):
        for leaf, p in getattr(method, ours).named_parameters():
            assert_close(p.grad, t[f"grad.{name}.{leaf}"], f"d{ours}.{leaf}")


def test_published_token_prompter():
    config, t = golden("prompts", "insvp_token_prompter")
    net = method_of(num_tokens=config["p_len"], token_kernels=tuple(config["k"])).token_net
    net.load_state_dict(starting(t, "param."))
    x = picture().requires_grad_()
    out = net(x)
    assert_close(out, t["out"], "out")
    loss = (out * t["w"]).sum()
    assert_close(loss, t["loss"].squeeze(), "loss")
    loss.backward()
    assert_close(x.grad[:, :, ::9, ::9], t["grad_x_strided"], "dx")
    assert_close(x.grad.sum(), t["grad_x_sum"].squeeze(), "sum dx", 1e-9)
    for name, p in net.named_parameters():
        assert_close(p.grad, t[f"grad.{name}"], f"d{name}")


def test_tokens_once_or_anew_for_every_block():
    """What comes before the first dropout is computed once in any case."""
    calls = []
    for once, dropout, want in (
        (False, 0.1, ["conv1"]),
        (True, 0.1, ["conv1", "conv3"]),
        (False, 0.0, ["conv1", "conv3"]),
    ):
        method = method_of(num_tokens=2, dropout=dropout, token_once=once).train()
        for name in ("conv1", "conv3"):
            getattr(method.token_net, name).register_forward_hook(lambda *_, name=name: calls.append(name))
        calls.clear()
        method.network(picture(), lambda images, side: (side, None))
        assert calls == want
