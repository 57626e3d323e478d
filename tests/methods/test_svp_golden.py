"""SVP against the released code and the paper's definition: logits, loss, every trainable gradient, AdamW steps."""

import pytest
import torch
import torch.nn.functional as F

from support import assert_close, cases, golden, precisions, starting
from svp.backbones.vim import Vim
from svp.methods.svp import from_published, simam
from svp.model import adapt
from svp.seams import Seams, Stack
from svp.training.losses import Criterion
from svp.training.optim import optimizer_for, parameter_groups
from svp.training.recipe import Recipe

PATHS = {"inner": ["inner.", "beta."], "cross": ["cross.", "alpha."]}
KINDS = [(torch.float64, "reference", 1e-10, 1e-10), precisions("svp")[1]]


def options(config):
    """The released or the paper's settings of a golden case in our words."""
    if "paper_options" in config:
        paper = config["paper_options"]
        return dict(
            hidden=config["hidden"], shared_layers=config["shared_layers"], gen_input=paper["gen_input"],
            cross_act="silu" if paper.get("cross_act", True) else "none", inner=paper.get("inner", True),
            cross=paper.get("cross", True), prompt_cls=paper.get("prompt_cls", False),
            cross_scale="layer" if paper.get("alpha_per_layer") else "group",
        )  # fmt: skip
    return dict(
        preset="published", hidden=128 if config["prompt_add_gen"].endswith("128") else 64,
        shared_layers=config["shared_layers"], input_filter="simam" if config["input_relu"] else "none",
    )  # fmt: skip


def model_from(config, params, dtype, kernel="auto"):
    net = Vim(
        embed_dim=config["embed_dim"], depth=config["depth"], patch_size=config["patch_size"], stride=config["stride"],
        d_state=config.get("d_state") or config["ssm_cfg"]["d_state"], img_size=tuple(config["img_size"]), num_classes=0,
    )  # fmt: skip
    net = net.to(dtype)
    net.kernel = kernel
    params = {k: v.to(dtype) for k, v in params.items()}
    net.load_state_dict({k: v for k, v in params.items() if not k.startswith(("prompt_", "head"))})
    two = "head.0.weight" in params
    model = adapt(
        net,
        "svp",
        num_classes=config["num_classes"],
        head="two_linear" if two else "linear",
        probe=False,
        **options(config),
    )
    model.load_state_dict(ours(params, config))
    return model


def ours(tensors, config):
    """Published names of method and head -> the adapter's state dict; a path that is switched off has no tensors."""
    paper = config.get("paper_options", {})
    off = [part for part, names in PATHS.items() if not paper.get(part, True) for part in names]
    adapter = {
        f"method.{k}": v for k, v in from_published(tensors, config["depth"]).items() if not k.startswith(tuple(off))
    }
    return adapter | {k: v for k, v in tensors.items() if k.startswith("head.")}


@pytest.mark.parametrize("precision", KINDS, ids=["float64", "float32"])
@pytest.mark.parametrize("case", cases("svp", "code_s*", "paper_*"))
def test_logits_loss_and_gradients(case, precision):
    dtype, kernel, close, grad_close = precision
    config, t = golden("svp", case)
    model = model_from(config, starting(t, "param."), dtype, kernel)
    image = t["in.image"].to(dtype).requires_grad_()
    logits = model(image)
    assert_close(logits, t["logits"], "logits", close)
    loss = F.cross_entropy(logits, t["in.label"])
    assert_close(loss, t["loss"], "loss", close)
    loss.backward()
    assert_close(image.grad, t["grad_in.image"], "d image", grad_close)
    grads = ours(starting(t, "grad."), config)
    assert set(grads) == {name for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        assert_close(p.grad, grads[name], f"d{name}", grad_close)


def test_the_input_of_every_block():
    config, t = golden("svp", "code_s2_h64_dtd")
    model = model_from(config, starting(t, "param."), torch.float64)
    seen = []

    class Watch(Seams):
        def block(self, tokens, i, run):
            seen.append(tokens.x)
            return run(tokens)

    model.backbone.features(t["in.image"], Stack([model.method, Watch()]))
    for i in range(config["depth"]):
        assert_close(seen[i], t[f"trace.layers.{i}.in"], f"block {i}")


@pytest.mark.parametrize("case", ["train3_wd1e-1_ce", "train3_wd0_soft_cub"])
def test_three_adamw_steps(case):
    """The optimiser that a run is given, with its decay groups, walks where the released one did."""
    config, t = golden("svp", case)
    model = model_from(config, starting(t, "init."), torch.float64, "reference").train()
    recipe = Recipe(
        lr=config["lr"], weight_decay=config["weight_decay"], betas=tuple(config["betas"]), eps=config["eps"]
    )
    groups = parameter_groups(model.named_parameters(), recipe, model.method.groups())
    found = {group["weight_decay"]: set(group["names"]) for group in groups}
    assert found == released_groups(config, t)
    optimizer = optimizer_for(groups, recipe)
    for step in range(3):
        logits = model(t[f"step{step}.image"])
        assert_close(logits, t[f"step{step}.logits"], f"logits of step {step}")
        target = t.get(f"step{step}.label", t.get(f"step{step}.target"))
        loss = Criterion(smoothing=0.0)(logits, target)
        assert_close(loss, t["losses"][step], f"loss of step {step}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    final = ours(starting(t, "final."), config)
    assert set(final) == set(model.state_dict())
    for name, p in model.named_parameters():
        assert (p.detach() - final[name]).abs().max() <= 1e-7, name


def released_groups(config, t):
    """{weight decay: our names of what the released optimiser decays so}."""
    trained = [name.removeprefix("final.") for name in t if name.startswith("final.")]
    groups = {0.0: [name for name in trained if name not in config["decay"]]}
    if config["decay"]:
        assert sorted(groups[0.0]) == sorted(config["no_decay"])
        groups[config["weight_decay"]] = config["decay"]
    return {decay: set(ours({name: t[f"init.{name}"] for name in names}, config)) for decay, names in groups.items()}


def test_full_fine_tuning():
    config, t = golden("svp", "code_fullfinetune")
    net = Vim(
        embed_dim=config["embed_dim"], depth=config["depth"], patch_size=8, d_state=4, img_size=24, num_classes=0
    ).double()
    params = starting(t, "param.")
    net.load_state_dict({k: v for k, v in params.items() if not k.startswith("head")})
    model = adapt(net, "full", num_classes=config["num_classes"])
    model.head.load_state_dict(starting(params, "head."))
    image = t["in.image"].requires_grad_()
    logits = model(image)
    assert_close(logits, t["logits"], "logits")
    F.cross_entropy(logits, t["in.label"]).backward()
    assert_close(image.grad, t["grad_in.image"], "d image")
    grads = starting(t, "grad.")
    got = {name: p.grad for name, p in zip(model.method.names, model.method.copies, strict=True)}
    got |= {f"head.{name}": p.grad for name, p in model.head.named_parameters()}
    assert set(got) == set(grads)
    for name, grad in got.items():
        assert_close(grad, grads[name], f"d{name}")


def test_simam():
    _, t = golden("svp", "simam_a")
    x = t["in.x"].requires_grad_()
    out = simam(x)
    assert_close(out, t["out"], "out")
    (out * t["loss_weight"]).sum().backward()
    assert_close(x.grad, t["grad_in.x"], "dx")
