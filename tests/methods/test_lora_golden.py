"""LoRA on every projection, and the memory seam, against the published mixers."""

import pytest
import torch

from support import assert_close, cases, golden, precisions, starting
from svp.backbones.vim import Mixer, mixer_alone
from svp.methods.lora import Lora
from svp.seams import BlockSite, Scan, Seams, Site

NAMES = {  # published option: (our target, its rank key, its scale key)
    "lora_in_proj": ("in_proj", "dim_in_proj", "s_in_proj"), "lora_X": ("X", "dim_X", "s_X"), "lora_Z": ("Z", "dim_Z", "s_Z"),
    "lora_out_proj": ("out_proj", "dim", "s"), "lora_x_proj": ("x_proj", "dim_x_proj", "s_x_proj"),
    "lora_d": ("d", "dim_d", "s_d"), "lora_B": ("B", "dim_B", "s_B"), "lora_C": ("C", "dim_C", "s_C"),
    "lora_dt": ("dt", "dim_dt", "s_dt"),
}  # fmt: skip


def mixer_of(config, params, dtype):
    mixer = Mixer(
        config["d_model"], d_state=config["d_state"], d_conv=config["d_conv"], expand=2, dt_rank=config["dt_rank"],
        scan_type="v2", layer_scale=None, bias=False, conv_bias=True,
    ).to(dtype)  # fmt: skip
    own = {name for name, _ in mixer.named_parameters()}
    mixer.load_state_dict({k: v.to(dtype) for k, v in params.items() if k in own})
    return mixer


def site_of(config, mixer):
    block = BlockSite(config["d_model"], e=config["d_inner"], n=config["d_state"], r=config["dt_rank"], k=2, taps=4)
    views = {f"layers.0.mixer.{name}": p.detach() for name, p in mixer.named_parameters()}
    return Site("mixer", (block,), views, frozenset(), (16, 16), 4, (4, 4), (8,), config["d_model"], (0,) * 3, (1,) * 3)


class Alone(Seams):
    """Several LoRAs with ranks and scales of their own, at the names of one mixer."""

    def __init__(self, parts):
        self.parts = parts

    def weights(self, w):
        full = {f"layers.0.{name}": t for name, t in w.items()}
        changed = {}
        for part in self.parts:
            changed |= part.weights({**full, **changed})
        return {name.removeprefix("layers.0."): t for name, t in changed.items()}


@pytest.mark.parametrize("precision", precisions("peft"), ids=["float64", "float32"])
@pytest.mark.parametrize("case", ["base_mixer", *cases("peft", "lora_*")])
def test_lora(case, precision):
    dtype, kernel, close, grad_close = precision
    config, t = golden("peft", case)
    params = starting(t, "param.")
    mixer = mixer_of(config, params, dtype)
    site, parts, names = site_of(config, mixer), [], []
    for published, (target, _, scale) in NAMES.items():
        twins = [key.split(".")[0] for key in params if key.startswith((f"{published}.", f"{published}_b."))]
        if not twins:
            continue
        rank = params[f"{published}.adapter_down.weight"].shape[0]
        part = Lora(site, Lora.Options(rank=rank, scale=config["peft"].get(scale, 0.5), targets=(target,)), 2).to(dtype)
        for j, twin in enumerate(dict.fromkeys([published, *sorted(twins)])):
            part.down[j].data.copy_(params[f"{twin}.adapter_down.weight"])
            part.up[j].data.copy_(params[f"{twin}.adapter_up.weight"])
            names += [(part.down[j], f"{twin}.adapter_down.weight"), (part.up[j], f"{twin}.adapter_up.weight")]
        parts.append(part)
    x = t["in.x"].to(dtype).requires_grad_()
    y = mixer_alone(mixer, x, kernel=kernel, seams=Alone(parts))
    assert_close(y, t["out.y"], "y", close)
    (y * t["loss_weight"].to(dtype)).sum().backward()
    assert_close(x.grad, t["grad_in.x"], "dx", grad_close)
    grads = starting(t, "grad.")
    assert {name for _, name in names} == set(grads)
    for p, name in names:
        assert_close(p.grad, grads[name], f"d{name}", grad_close)


@pytest.mark.parametrize("precision", precisions("peft"), ids=["float64", "float32"])
@pytest.mark.parametrize("case", ["vim_init_state", "vim_state_offset_h", "vim_state_offset_y"])
def test_memory(case, precision):
    dtype, kernel, close, grad_close = precision
    config, t = golden("peft", case)
    params = starting(t, "param.")
    mixer = mixer_of(config, params, dtype)
    states = torch.stack([params["state"], params["state_b"]]).to(dtype).requires_grad_()  # (k, e, n) or (k, e)
    held = {"vim_init_state": Scan(h0=states[None]), "vim_state_offset_h": Scan(offset=states)}.get(
        case, Scan(bias=states)
    )

    class Memory(Seams):
        def memory(self, i, w):
            return held

    x = t["in.x"].to(dtype).requires_grad_()
    y = mixer_alone(mixer, x, kernel=kernel, seams=Memory())
    assert_close(y, t["out.y"], "y", close)
    (y * t["loss_weight"].to(dtype)).sum().backward()
    assert_close(x.grad, t["grad_in.x"], "dx", grad_close)
    assert_close(states.grad, torch.stack([t["grad.state"], t["grad.state_b"]]), "d states", grad_close)
