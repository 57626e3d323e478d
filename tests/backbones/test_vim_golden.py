"""Vim against the published code: outputs, losses, gradients of the picture and of every parameter."""

import pytest
import torch
import torch.nn.functional as F

from support import assert_close, cases, golden, precisions, starting
from svp.backbones.positions import resize_positions
from svp.backbones.vim import Mixer, Vim, mixer_alone
from svp.ops.add_norm.reference import rms_norm
from svp.seams import Seams


def mixer_from(config, params):
    mixer = Mixer(
        config["d_model"], d_state=config["d_state"], d_conv=config["d_conv"], expand=config["d_inner"] // config["d_model"],
        dt_rank=config["dt_rank"], scan_type=config.get("bimamba_type", "v2"), layer_scale=config.get("init_layer_scale"),
        bias=config.get("bias", False), conv_bias=config.get("conv_bias", True),
    )  # fmt: skip
    mixer.to(next(iter(params.values())).dtype).load_state_dict(params)
    return mixer


def vim_from(config, dtype):
    cls = "none" if not config["if_cls_token"] else "double" if config["use_double_cls_token"] else None
    cls = cls or ("middle" if config["use_middle_cls_token"] else "head")
    size = config["img_size"]
    net = Vim(
        embed_dim=config["embed_dim"], depth=config["depth"], d_state=config["d_state"], patch_size=config["patch_size"],
        stride=config["stride"], img_size=tuple(size) if isinstance(size, list) else size,
        num_classes=config["num_classes"], cls_token=cls,
    )  # fmt: skip
    return net.to(dtype).eval()


@pytest.mark.parametrize("precision", precisions("vim"), ids=["float64", "float32"])
@pytest.mark.parametrize("case", cases("vim", "mixer_*"))
def test_mixer(case, precision):
    dtype, kernel, close, grad_close = precision
    config, t = golden("vim", case)
    mixer = mixer_from(config, {k: v.to(dtype) for k, v in starting(t, "param.").items()})
    x = t["in.x"].to(dtype).requires_grad_()
    out = mixer_alone(
        mixer, x, scan_type=config["bimamba_type"], divide_out=config.get("if_divide_out", False), kernel=kernel
    )
    assert_close(out, t["out"], "out", close)
    (out * t["loss_weight"].to(dtype)).sum().backward()
    assert_close(x.grad, t["grad_in.x"], "dx", grad_close)
    grads = starting(t, "grad.")
    assert set(grads) == {name for name, _ in mixer.named_parameters()}
    for name, p in mixer.named_parameters():
        assert_close(p.grad, grads[name], f"d{name}", grad_close)


@pytest.mark.parametrize("precision", precisions("vim"), ids=["float64", "float32"])
@pytest.mark.parametrize("case", cases("vim", "vim_*"))
def test_whole_model(case, precision):
    dtype, kernel, close, grad_close = precision
    config, t = golden("vim", case)
    net = vim_from(config, dtype)
    net.kernel = kernel
    net.load_state_dict({k: v.to(dtype) for k, v in starting(t, "param.").items()})
    image = t["in.image"].to(dtype).requires_grad_()
    assert_close(net.features(image), t["features"], "features", close)
    logits = net(image)
    assert_close(logits, t["logits"], "logits", close)
    loss = F.cross_entropy(logits, t["in.label"])
    assert_close(loss, t["loss"], "loss", close)
    loss.backward()
    assert_close(image.grad, t["grad_in.image"], "d image", grad_close)
    grads = starting(t, "grad.")
    assert set(grads) == {name for name, _ in net.named_parameters()}
    for name, p in net.named_parameters():
        assert_close(p.grad, grads[name], f"d{name}", grad_close)


def test_every_block_returns_what_the_published_one_does():
    config, t = golden("vim", "vim_mid_24x24")
    net = vim_from(config, torch.float64)
    net.load_state_dict(starting(t, "param."))
    seen = Watch()
    net.features(t["in.image"], seen)
    for i in range(config["depth"]):
        assert_close(seen.after[i].x, t[f"trace.layers.{i}.mixer_out"], f"mixer_out {i}")
        assert_close(seen.after[i].residual, t[f"trace.layers.{i}.residual"], f"residual {i}")


class Watch(Seams):
    def __init__(self):
        self.after = {}

    def block(self, tokens, i, run):
        self.after[i] = run(tokens)
        return self.after[i]


@pytest.mark.parametrize("case", ["rmsnorm_first", "rmsnorm_residual"])
def test_rms_norm(case):
    config, t = golden("vim", case)
    leaves = {key: t[key].clone().requires_grad_() for key in t if key.startswith("in.")}
    stream = leaves["in.x"] + leaves["in.residual"] if "in.residual" in leaves else leaves["in.x"]
    out = rms_norm(stream, leaves["in.weight"], config["eps"], torch.float64)
    assert_close(out, t["out"], "out")
    ((out * t["loss_weight"]).sum() + (stream * t["loss_weight_residual"]).sum()).backward()
    for key, leaf in leaves.items():
        name = key.removeprefix("in.")
        if f"grad.{name}" in t:
            assert_close(leaf.grad, t[f"grad.{name}"], f"d{name}")


@pytest.mark.parametrize("case", ["pos_14_to_27", "pos_4_to_6", "pos_6_to_4", "pos_4_to_4"])
@pytest.mark.parametrize("mode", ["middle", "repo"])
def test_position_table(case, mode):
    config, t = golden("vim", case)
    grid = (config["dst_grid"],) * 2
    out = resize_positions(t["in.pos_embed"], grid, (grid[0] * grid[1] // 2,), mode=mode)
    assert_close(out, t["out.as_repo" if mode == "repo" else "out.middle_aware"], "table")


def test_position_table_between_rectangles():
    config, t = golden("vim", "pos_rect")
    grid, source = tuple(config["dst_grid"]), tuple(config["src_grid"])
    out = resize_positions(t["in.pos_embed"], grid, (grid[0] * grid[1] // 2,), source_grid=source)
    assert_close(out, t["out.middle_aware"], "table")
