"""The seams against published methods that are not ours yet: what they compute can be said through the six places alone."""

import pytest
import torch
from torch import nn

from methods.test_lora_golden import mixer_of, site_of
from support import assert_close, golden, precisions, starting
from svp.backbones.vim import Vim, mixer_alone
from svp.methods.lora import Lora
from svp.ops import causal_conv1d, selective_scan
from svp.seams import Scan, Seams, Stack

PRECISIONS = pytest.mark.parametrize("precision", precisions("peft"), ids=["float64", "float32"])


class Named(Seams):
    """A method of one mixer: its trained tensors by published name, and the front of the mixer's names among all."""

    def __init__(self, trained, front="mixer."):
        self.t, self.front = trained, front

    def replaced(self, w, change):
        """{full name: change(name in the mixer, tensor)} where that is not None."""
        own = {name.removeprefix(self.front): t for name, t in w.items() if name.startswith(self.front)}
        changed = {name: change(name, t) for name, t in own.items()}
        return {self.front + name: t for name, t in changed.items() if t is not None}


class Offsets(Named):
    """Partial tuning: frozen tensor plus offset."""

    OF = {
        "A_log": "A_log", "A_b_log": "A_b_log", "D": "D", "D_b": "D_b", "conv1d.weight": "conv1d_weight",
        "conv1d_b.weight": "conv1d_weight_b", "dt_proj.bias": "bias", "dt_proj_b.bias": "bias_b",
    }  # fmt: skip

    def weights(self, w):
        def change(name, t):
            offset = self.t.get(f"learnable_{self.OF.get(name)}")
            return None if offset is None else t + offset

        return self.replaced(w, change)


class Dora(Named):
    """m times the normed columns of (frozen rows + scaled product); the norm takes no gradient."""

    ROWS = {"lora_X": ("in_proj", slice(0, 48)), "lora_x_proj": ("x_proj", slice(None)), "lora_dt": ("dt_proj", slice(None)),
            "lora_out_proj": ("out_proj", slice(None))}  # fmt: skip

    def __init__(self, trained, scales):
        super().__init__(trained)
        self.scales = scales

    def weights(self, w):
        def change(name, t):
            for option, (layer, rows) in self.ROWS.items():
                for twin in ("", "_b"):
                    m = self.t.get(f"{option}{twin}.m")
                    if m is not None and name == f"{layer}{twin}.weight":
                        up, down = (self.t[f"{option}{twin}.adapter_{part}.weight"] for part in ("up", "down"))
                        full = t[rows] + self.scales[option] * up @ down
                        return torch.cat([m * full / full.norm(dim=0, keepdim=True).detach(), t[len(full) :]])
            return None

        return self.replaced(w, change)


class MoreStates(Named):
    """Additional scan: more columns of A, more rows of x_proj, in front of the frozen ones or behind."""

    def __init__(self, trained, place):
        super().__init__(trained)
        self.order = (lambda new, old: [new, old]) if place == "prefix" else (lambda new, old: [old, new])

    def weights(self, w):
        n = w["mixer.A_log"].shape[1]

        def change(name, t):
            new = self.t.get(f"{name.removesuffix('.weight')}_scan_addi" + ".weight" * name.endswith(".weight"))
            if new is None:
                return None
            if name.startswith("A_"):
                return torch.cat(self.order(new, t), 1)
            d, B, C = t.split([len(t) - 2 * n, n, n])
            more_B, more_C = new.chunk(2)
            return torch.cat([d, *self.order(more_B, B), *self.order(more_C, C)])

        return self.replaced(w, change)


class Parallel(Named):
    """An adapter beside out_proj."""

    def __init__(self, trained, scale):
        super().__init__(trained)
        self.scale = scale

    def beside(self, i):
        down, up = self.t["adaptf.adapter_down.weight"], self.t["adaptf.adapter_up.weight"]
        return {"out_proj": lambda y: self.scale * torch.relu(y @ down.T) @ up.T}


class Affix(Seams):
    """Tokens that walk through each direction before the picture's: what they leave behind is all that is seen of them.

    columns   (block, weights in force) -> for each direction, in its own order, (1|b, tokens, e) x columns, or None
    """

    def __init__(self, columns, kernel):
        self.columns, self.kernel = columns, kernel

    def memory(self, i, w):
        given = self.columns(i, w)
        b = next(len(x) for x in given if x is not None)
        e, n = w["A_log"].shape
        held = [self.left_by(w, k, x) for k, x in enumerate(given)]
        blank = [w["D"].new_zeros(b, e, size) for size in (n, w["conv1d.weight"].shape[2] - 1)]
        h0, past = (torch.stack([one[j] if one else blank[j] for one in held], 1) for j in (0, 1))
        return Scan(h0=h0, past=past)

    def left_by(self, w, k, x):
        """The state and the last inputs of direction k after the tokens."""
        if x is None:
            return None
        twin, n, taps = ("", "_b")[k], w["A_log"].shape[1], w["conv1d.weight"].shape[2]
        u = causal_conv1d(
            x, w[f"conv1d{twin}.weight"][:, 0], w[f"conv1d{twin}.bias"], activation="silu", kernel=self.kernel
        )
        d, B, C = (u @ w[f"x_proj{twin}.weight"].T).split([w[f"dt_proj{twin}.weight"].shape[1], n, n], dim=-1)
        A = -torch.exp(w["A_b_log" if twin else "A_log"])
        _, state = selective_scan(
            u, d @ w[f"dt_proj{twin}.weight"].T, A, B, C, delta_bias=w[f"dt_proj{twin}.bias"], delta_softplus=True,
            return_last_state=True, kernel=self.kernel,
        )  # fmt: skip
        return state, nn.functional.pad(x, (0, 0, taps - 1, 0))[:, -(taps - 1) :].mT


def affix_columns(kind, tokens):
    """The two directions' x columns of each published kind; those of a suffix, and z, are seen by nothing."""
    e = 48
    inner = {
        "inner_dual_prefix": lambda i, w: (tokens[..., :e], tokens[..., 2 * e : 3 * e]),
        "inner_single_prefix": lambda i, w: (tokens[..., :e], tokens[..., :e]),
        "inner_single_suffix": lambda i, w: (None, tokens[:, :0, :e]),
    }

    def outer(i, w):
        front, behind = tokens[..., :24], tokens[..., 24:].flip(1)
        into = w["in_proj.weight"][:e].T
        return front @ into, (behind @ into if behind.shape[-1] else None)

    return inner.get(kind, outer)


def loras(site, front, sizes, params):
    """Our LoRA for each (target, rank, scale), holding the published values; and {published name: our parameter}.

    front  name of a frozen tensor -> the front of the published names of what is added to it
    """
    modules, trained = [], {}
    for target, rank, scale in sizes:
        module = Lora(site, Lora.Options(rank=rank, scale=scale, targets=(target,)), 2)
        modules.append(module.to(next(iter(params.values())).dtype))
        for (name, _, layer), down, up in zip(module.slices, module.down, module.up, strict=True):
            key = f"{front(name)}lora_{target}{'_b' * layer.endswith('_b')}"
            for part, p in (("down", down), ("up", up)):
                trained[f"{key}.adapter_{part}.weight"] = p
                p.data.copy_(params[f"{key}.adapter_{part}.weight"])
    return modules, trained


def compare(t, y, trained, inputs, close, grad_close):
    """Output, and the gradient of everything that trains and of every input, against the file."""
    assert_close(y, t["out.y"], "y", close)
    loss = (y * t["loss_weight"].to(y.dtype)).sum()
    assert abs(loss.item() - t["loss"].item()) <= close * t["loss_weight"].abs().sum().item() * t["out.y"].abs().max()
    loss.backward()
    grads = starting(t, "grad.")
    assert set(grads) == set(trained)
    for name, leaf in trained.items():
        assert_close(leaf.grad, grads[name], f"d{name}", grad_close)
    for name, leaf in inputs.items():
        got = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        assert_close(got, t[f"grad_in.{name}"], f"d{name}", grad_close)


MIXERS = [
    "addscan_prefix_copy", "addscan_prefix_plus_lora_B_C", "addscan_suffix", "affix_inner_dual_prefix",
    "affix_inner_single_prefix", "affix_inner_single_suffix", "affix_outer_dual_prefix", "affix_outer_single_prefix", "dora_X",
    "dora_xproj_dt_out", "parallel_adapter", "partial_A_D_conv_bias_v2",
]  # fmt: skip


@PRECISIONS
@pytest.mark.parametrize("case", MIXERS)
def test_one_mixer(case, precision):
    dtype, kernel, close, grad_close = precision
    config, t = golden("peft", case)
    params, peft = {name: p.to(dtype) for name, p in starting(t, "param.").items()}, config["peft"]
    mixer = mixer_of(config, params, dtype)
    inputs = {name: x.to(dtype).requires_grad_() for name, x in starting(t, "in.").items()}
    trained = {name: params[name].clone().requires_grad_() for name in starting(t, "grad.")}
    parts = []
    if case.startswith("addscan"):
        if "lora_B" in peft:
            sizes = [(target, peft[f"dim_{target}"], peft[f"s_{target}"]) for target in ("B", "C")]
            modules, ours = loras(site_of(config, mixer), lambda name: "", sizes, params)
            trained |= ours
            parts += [Renamed(module) for module in modules]
        parts.append(MoreStates(trained, peft["scan_addition_pos"]))
    elif case.startswith("affix"):
        (kind,) = config["kwargs"]
        parts.append(Affix(affix_columns(kind, inputs[kind]), kernel))
    elif case.startswith("dora"):
        scales = {"lora_X": "s_X", "lora_x_proj": "s_x_proj", "lora_dt": "s_dt", "lora_out_proj": "s"}
        parts.append(Dora(trained, {option: peft.get(key) for option, key in scales.items()}))
    elif case == "parallel_adapter":
        parts.append(Parallel(trained, peft["s_adaptf"]))
    else:
        parts.append(Offsets(trained))
    y = mixer_alone(mixer, inputs["x"], kernel=kernel, seams=Stack(parts))
    compare(t, y, trained, inputs, close, grad_close)


class Renamed(Seams):
    """A method of a whole network on the only mixer there is."""

    def __init__(self, part):
        self.part = part

    def weights(self, w):
        changed = self.part.weights({f"layers.0.{name}": t for name, t in w.items()})
        return {name.removeprefix("layers.0."): t for name, t in changed.items()}


class Token(Seams):
    """An offset on the class token."""

    def __init__(self, offset):
        self.offset = offset

    def weights(self, w):
        return {"cls_token": w["cls_token"] + self.offset}


class PatchEmbed(Seams):
    """LoRA on the convolution that cuts patches."""

    def __init__(self, trained, scale):
        self.down, self.up = (trained[f"patch_embed.lora_patch_embed.adapter_{part}.weight"] for part in ("down", "up"))
        self.scale = scale

    def weights(self, w):
        added = (self.up.flatten(1) @ self.down.flatten(1)).view_as(w["patch_embed.proj.weight"])
        return {"patch_embed.proj.weight": w["patch_embed.proj.weight"] + self.scale * added}


@PRECISIONS
@pytest.mark.parametrize("case", ["model_lora_patch_embed", "model_hybrid_step2"])
def test_whole_network(case, precision):
    dtype, kernel, close, grad_close = precision
    config, t = golden("peft", case)
    params, peft = {name: p.to(dtype) for name, p in starting(t, "param.").items()}, config["peft"]
    net = Vim(embed_dim=24, depth=2, d_state=4, patch_size=4, img_size=16, num_classes=0).to(dtype)
    net.kernel = kernel
    net.load_state_dict({name: params[name] for name in net.state_dict()})
    trained = {name: params[name].clone().requires_grad_() for name in starting(t, "grad.")}
    if case == "model_lora_patch_embed":
        parts = [PatchEmbed(trained, peft["s_patch_embed"])]
    else:
        sizes = [("out_proj", peft["dim"], peft["s"])]
        sizes += [(target, peft[f"dim_{target}"], peft[f"s_{target}"]) for target in ("in_proj", "X", "B", "dt")]
        parts, ours = loras(net.site(), lambda name: name[: name.index("mixer.") + 6], sizes, params)
        trained |= ours
        tokens = trained["prefix_encoder.embedding.weight"][None]  # (1, n, blocks * directions * 2e)
        for i in range(2):
            front = f"layers.{i}.mixer."
            parts.append(Offsets({k.removeprefix(front): v for k, v in trained.items() if k.startswith(front)}, front))
        parts += [
            Token(trained["learnable_cls_token"]),
            Affix(lambda i, w: affix_columns("inner_dual_prefix", tokens[..., 192 * i : 192 * (i + 1)])(i, w), kernel),
        ]
    image = t["in.x"].to(dtype).requires_grad_()
    y = net.features(image, Stack(parts))
    compare(t, y, trained, {"x": image}, close, grad_close)
