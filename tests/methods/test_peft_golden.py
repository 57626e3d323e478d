"""The methods of weights, states and adapters against the published code: outputs and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from methods.test_lora_golden import mixer_of, site_of
from support import assert_close, golden, precisions, starting
from svp.backbones.vim import Vim, mixer_alone
from svp.methods.adapter import Adapter
from svp.methods.additional_scan import AdditionalScan
from svp.methods.affix import Affix
from svp.methods.initial_state import InitialState
from svp.methods.lora import Lora
from svp.methods.partial import Partial
from svp.methods.prompt_tuning import PromptTuning
from svp.methods.repadapter import RepAdapter
from svp.methods.sdt import SDT
from svp.methods.state_offset import StateOffset
from svp.ops import causal_conv1d, selective_scan
from svp.seams import BlockSite, Seams, Site, Stack

PRECISIONS = pytest.mark.parametrize("precision", precisions("peft"), ids=["float64", "float32"])
ALL = slice(None)


class Pairs:
    """Parameters of ours beside the published tensors that they hold."""

    def __init__(self, t):
        self.values, self.grads = starting(t, "param."), starting(t, "grad.")
        self.rows, self.names = [], set()

    def hold(self, ours, name, at=ALL, theirs=ALL):
        """ours[at] takes the value of the published tensor `name` at [theirs]."""
        place = ours.data[at]
        ours.data[at] = self.values[name][theirs].reshape(place.shape).to(ours.dtype)
        self.rows.append((ours, at, name, theirs))
        self.names.add(name)

    def lora(self, method, *names):
        """The slices of a LoRA in their order, each under its published name."""
        for j, name in enumerate(names):
            self.hold(method.down[j], f"{name}.adapter_down.weight")
            self.hold(method.up[j], f"{name}.adapter_up.weight")
            if method.opt.dora != "none":
                self.hold(method.norm[j], f"{name}.m")

    def compare(self, tolerance):
        assert self.names == set(self.grads)
        for ours, at, name, theirs in self.rows:
            want = self.grads[name][theirs]
            assert_close(ours.grad[at].reshape(want.shape), want, f"d{name}", tolerance)


class OneMixer(Seams):
    """Methods of a whole network on the only mixer there is."""

    def __init__(self, *parts):
        self.stack = Stack(parts)

    def acts(self, seam):
        return self.stack.acts(seam)

    def weights(self, w):
        changed = self.stack.weights({f"layers.0.{name}": t for name, t in w.items()})
        return {name.removeprefix("layers.0."): t for name, t in changed.items()}

    def beside(self, i):
        return self.stack.beside(i)

    def memory(self, i, w):
        return self.stack.memory(i, w)


def finish(t, y, pairs, inputs, close, grad_close):
    """Output, gradients of parameters and of inputs."""
    assert_close(y, t["out.y"], "y", close)
    (y * t["loss_weight"].to(y.dtype)).sum().backward()
    pairs.compare(grad_close)
    for name, leaf in inputs.items():
        assert_close(leaf.grad, t[f"grad_in.{name}"], f"d{name}", grad_close)


# -- one mixer ---------------------------------------------------------------------------------------------------------


def parallel_adapter(site, peft, pairs, dtype):
    method = Adapter(site, Adapter.Options(kind="parallel", hidden=peft["dim_adaptf"], scale=peft["s_adaptf"]), 2).to(
        dtype
    )
    for part in ("down", "up"):
        pairs.hold(getattr(method.parts["mixer_0"], part).weight, f"adaptf.adapter_{part}.weight")
    return [method]


def partial(site, peft, pairs, dtype):
    published = {
        "A_log": "A_log", "A_b_log": "A_b_log", "D": "D", "D_b": "D_b", "conv1d.weight": "conv1d_weight",
        "conv1d_b.weight": "conv1d_weight_b", "dt_proj.bias": "bias", "dt_proj_b.bias": "bias_b",
    }  # fmt: skip
    method = Partial(site, Partial.Options(parts=("A", "D", "conv1d", "bias")), 2).to(dtype)
    for name, offset in zip(method.names, method.offsets, strict=True):
        pairs.hold(offset, f"learnable_{published[name.removeprefix('layers.0.mixer.')]}")
    return [method]


def additional_scan(site, peft, pairs, dtype):
    n = peft["scan_addition_num"]
    parts = []
    for target in ("B", "C"):
        if f"lora_{target}" in peft:
            opt = Lora.Options(rank=peft[f"dim_{target}"], scale=peft[f"s_{target}"], targets=(target,))
            parts.append(Lora(site, opt, 2).to(dtype))
            pairs.lora(parts[-1], f"lora_{target}", f"lora_{target}_b")
    method = AdditionalScan(site, AdditionalScan.Options(n=n, pos=peft["scan_addition_pos"]), 2).to(dtype)
    for j, (a, x) in enumerate((("A_log", "x_proj"), ("A_b_log", "x_proj_b"))):
        pairs.hold(method.A_log[j], f"{a}_scan_addi")
        pairs.hold(method.B[j], f"{x}_scan_addi.weight", theirs=slice(0, n))
        pairs.hold(method.C[j], f"{x}_scan_addi.weight", theirs=slice(n, 2 * n))
    return [*parts, method]


def dora(site, peft, pairs, dtype):
    sizes = {
        "X": ("dim_X", "s_X"),
        "x_proj": ("dim_x_proj", "s_x_proj"),
        "dt": ("dim_dt", "s_dt"),
        "out_proj": ("dim", "s"),
    }
    parts = []
    for target, (dim, scale) in sizes.items():
        if f"lora_{target}" in peft:
            opt = Lora.Options(rank=peft[dim], scale=peft[scale], targets=(target,), dora=True)
            parts.append(Lora(site, opt, 2).to(dtype))
            pairs.lora(parts[-1], *[f"lora_{target}{twin}" for twin in ("", "_b")[: len(parts[-1].slices)]])
    return parts


def states(kind):
    def made(site, peft, pairs, dtype):
        if kind == "h0":
            method = InitialState(site, InitialState.Options(), 2).to(dtype)
            places = (0, 0), (0, 1)
        else:
            method, places = StateOffset(site, StateOffset.Options(kind=kind), 2).to(dtype), (0, 1)
        held = method.h0[0] if kind == "h0" else method.offset[0]
        for at, name in zip(places, ("state", "state_b"), strict=True):
            pairs.hold(held, name, at=at)
        return [method]

    return made


MIXERS = {
    "parallel_adapter": parallel_adapter, "partial_A_D_conv_bias_v2": partial, "addscan_prefix_copy": additional_scan,
    "addscan_suffix": additional_scan, "addscan_prefix_plus_lora_B_C": additional_scan, "dora_X": dora,
    "dora_xproj_dt_out": dora, "vim_init_state": states("h0"), "vim_state_offset_h": states("h"),
    "vim_state_offset_y": states("y"),
}  # fmt: skip


@PRECISIONS
@pytest.mark.parametrize("case", MIXERS)
def test_one_mixer(case, precision):
    dtype, kernel, close, grad_close = precision
    config, t = golden("peft", case)
    pairs = Pairs(t)
    mixer = mixer_of(config, pairs.values, dtype)
    parts = MIXERS[case](site_of(config, mixer), config.get("peft", {}), pairs, dtype)
    x = t["in.x"].to(dtype).requires_grad_()
    y = mixer_alone(mixer, x, kernel=kernel, seams=OneMixer(*parts))
    finish(t, y, pairs, {"x": x}, close, grad_close)


AFFIX = ["inner_dual_prefix", "inner_single_prefix", "outer_single_prefix", "outer_dual_prefix"]


@PRECISIONS
@pytest.mark.parametrize("type", AFFIX)
def test_affix(type, precision, monkeypatch):
    """The file gives tokens of each picture; ours are one set, but what they leave behind is computed alike."""
    dtype, kernel, close, grad_close = precision
    config, t = golden("peft", f"affix_{type}")
    mixer = mixer_of(config, starting(t, "param."), dtype)
    inputs = {name: x.to(dtype).requires_grad_() for name, x in starting(t, "in.").items()}
    method = Affix(site_of(config, mixer), Affix.Options(n=3, type=type, x_only=False), 2).to(dtype)
    assert method.tokens(0).shape[1:] == inputs[type].shape[1:]
    monkeypatch.setattr(method, "tokens", lambda i: inputs[type])
    y = mixer_alone(mixer, inputs["x"], kernel=kernel, seams=OneMixer(method))
    finish(t, y, Pairs({}), inputs, close, grad_close)


@PRECISIONS
def test_a_suffix_is_seen_by_nothing(precision):
    """Why ours has none: the published output is that of the mixer alone, and the suffix takes no gradient."""
    dtype, kernel, close, grad_close = precision
    config, t = golden("peft", "affix_inner_single_suffix")
    mixer = mixer_of(config, starting(t, "param."), dtype)
    x = t["in.x"].to(dtype).requires_grad_()
    finish(t, mixer_alone(mixer, x, kernel=kernel), Pairs({}), {"x": x}, close, grad_close)
    assert t["in.inner_single_suffix"].any() and not t["grad_in.inner_single_suffix"].any()


# -- whole networks ----------------------------------------------------------------------------------------------------


def affix_of(net, config, pairs, dtype, x_only):
    """Our affix with the published table or generator; the numbers of z that ours leaves out have no gradient there."""
    n, e = config["peft"]["num_virtual_tokens"], 48
    projection, hidden = config["peft"]["prefix_projection"], config["peft"].get("encoder_hidden_size")
    options = Affix.Options(n=n, projection=projection, hidden=hidden, x_only=x_only)
    method = Affix(net.site(), options, 2).to(dtype)
    for i in range(2):
        start = 4 * e * i
        columns = torch.cat([torch.arange(start, start + e), torch.arange(start + 2 * e, start + 3 * e)])
        columns = columns if x_only else torch.arange(start, start + 4 * e)
        if projection:
            for part in ("weight", "bias"):
                pairs.hold(
                    getattr(method.generator.outer[i], part), f"prefix_encoder.transform.2.{part}", theirs=columns
                )
                z = pairs.grads[f"prefix_encoder.transform.2.{part}"][start + e : start + 2 * e]
                assert not z.any()
        else:
            pairs.hold(method.generator.tokens[i], "prefix_encoder.embedding.weight", theirs=(ALL, columns))
    if projection:
        pairs.hold(method.generator.embedding, "prefix_encoder.embedding.weight")
        for part in ("weight", "bias"):
            pairs.hold(getattr(method.generator.inner, part), f"prefix_encoder.transform.0.{part}")
    return method


def partial_of(net, parts, pairs, dtype):
    method = Partial(net.site(), Partial.Options(parts=parts), 2).to(dtype)
    for name, offset in zip(method.names, method.offsets, strict=True):
        front, _, last = name.rpartition(".")
        pairs.hold(offset, f"{front}.learnable_{last}".removeprefix("."))
    return method


def lora_of(net, target, rank, scale, pairs, dtype):
    method = Lora(net.site(), Lora.Options(rank=rank, scale=scale, targets=(target,)), 2).to(dtype)
    names = [
        f"{name[: name.index('mixer.') + 6]}lora_{target}{'_b' * layer.endswith('_b')}"
        for name, _, layer in method.slices
    ]
    pairs.lora(method, *names)
    return method


def hybrid(net, config, pairs, dtype):
    peft = config["peft"]
    sizes = [("out_proj", peft["dim"], peft["s"])]
    sizes += [(target, peft[f"dim_{target}"], peft[f"s_{target}"]) for target in ("in_proj", "X", "B", "dt")]
    parts = [lora_of(net, *size, pairs, dtype) for size in sizes]
    return [*parts, partial_of(net, ("A", "cls"), pairs, dtype), affix_of(net, config, pairs, dtype, x_only=True)]


def patch_embed(net, config, pairs, dtype):
    peft = config["peft"]
    method = Lora(
        net.site(), Lora.Options(rank=peft["dim_patch_embed"], scale=peft["s_patch_embed"], targets=("embed",)), 2
    )
    pairs.lora(method.to(dtype), "patch_embed.lora_patch_embed")
    return [method]


def prompts(net, config, pairs, dtype):
    options = PromptTuning.Options(n=config["peft"]["prompt_num_tokens"], type="prefix_suffix", projection=True)
    method = PromptTuning(net.site(), options, 2).to(dtype)
    layers = {"0": method.generator.inner, "2": method.generator.outer[0]}
    for number, layer in layers.items():
        for part in ("weight", "bias"):
            pairs.hold(getattr(layer, part), f"prompt_encoder.transform.{number}.{part}")
    pairs.hold(method.generator.embedding, "prompt_encoder.embedding.weight")
    return [method, partial_of(net, ("cls", "pos"), pairs, dtype)]


MODELS = {
    "model_affix_dual_noproj": lambda *a: [affix_of(*a, x_only=False)],
    "model_affix_dual_noproj x": lambda *a: [affix_of(*a, x_only=True)],
    "model_affix_dual_proj": lambda *a: [affix_of(*a, x_only=False)],
    "model_affix_dual_proj x": lambda *a: [affix_of(*a, x_only=True)],
    "model_hybrid_step2": hybrid, "model_lora_patch_embed": patch_embed, "model_prompt_prefix_suffix_proj": prompts,
}  # fmt: skip


@PRECISIONS
@pytest.mark.parametrize("case", MODELS)
def test_whole_network(case, precision):
    dtype, kernel, close, grad_close = precision
    config, t = golden("peft", case.split()[0])
    pairs = Pairs(t)
    net = Vim(embed_dim=24, depth=2, d_state=4, patch_size=4, img_size=16, num_classes=0).to(dtype)
    net.kernel = kernel
    net.load_state_dict({name: pairs.values[name].to(dtype) for name in net.state_dict()})
    parts = MODELS[case](net, config, pairs, dtype)
    x = t["in.x"].to(dtype).requires_grad_()
    finish(t, net.features(x, Stack(parts)), pairs, {"x": x}, close, grad_close)


# -- scans, layers, branches alone -------------------------------------------------------------------------------------


def site_alone(weights, **sizes):
    """A network of one block that holds `weights`."""
    block = BlockSite(**{"width": 12, "kinds": ("mixer",), **sizes})
    return Site("alone", (block,), weights, frozenset(), (16, 16), 4, (4, 4), (0,), 12, (0,) * 3, (1,) * 3)


STATES = {
    "init_state": (InitialState, dict()), "state_offset_h": (StateOffset, dict(kind="h")),
    "state_offset_y": (StateOffset, dict(kind="y")), "state_offset_h_lowrank": (StateOffset, dict(rank=2)),
    "state_offset_h_lowrank_ratio2": (StateOffset, dict(rank=2, ratio=2)),
}  # fmt: skip


@PRECISIONS
@pytest.mark.parametrize("case", STATES)
def test_states(case, precision):
    dtype, kernel, close, grad_close = precision
    _, t = golden("peft", case)
    cls, options = STATES[case]
    pairs = Pairs(t)
    method = cls(site_alone({}, e=10, n=4, k=1), cls.Options(**options), 2).to(dtype)
    ends = {name.rpartition(".")[2]: name for name in pairs.values}
    if "rank" in options:
        pairs.hold(method.down[0], ends["lora_A"])
        pairs.hold(method.up[0], ends["lora_B"])
    else:
        pairs.hold((method.h0 if cls is InitialState else method.offset)[0], *ends.values())
    inputs = {name: x.to(dtype).requires_grad_() for name, x in starting(t, "in.").items()}
    turned = {name: x.transpose(-1, -2) for name, x in inputs.items() if x.dim() == 3}
    memory = method.memory(0, {}).direction(0)
    extra = dict(h0=memory.h0, offset=memory.offset, bias=memory.bias)
    y = selective_scan(**{**inputs, **turned}, **extra, delta_softplus=True, kernel=kernel).transpose(1, 2)
    finish(t, y, pairs, inputs, close, grad_close)


@PRECISIONS
def test_past_of_the_convolution(precision):
    dtype, kernel, close, grad_close = precision
    _, t = golden("peft", "conv_init_state")
    pairs = Pairs(t)
    method = InitialState(site_alone({}, e=10, n=4, k=1, taps=4), InitialState.Options(state=False, conv=True), 2).to(
        dtype
    )
    pairs.hold(method.past[0], "ssmpeft_conv_state.default")
    weight, bias = (pairs.values[f"base_layer.{part}"].to(dtype).requires_grad_() for part in ("weight", "bias"))
    pairs.hold(weight, "base_layer.weight")
    pairs.hold(bias, "base_layer.bias")
    x = t["in.x"].to(dtype).requires_grad_()
    past = method.memory(0, {}).direction(0).past
    y = causal_conv1d(x.transpose(1, 2), weight[:, 0], bias, past=past, kernel=kernel).transpose(1, 2)
    finish(t, y, pairs, {"x": x}, close, grad_close)


def test_sdt_chooses_and_scatters_as_published():
    config, t = golden("peft", "sdt_masks")
    pairs = Pairs(t)
    A_log, B, C = (pairs.values[k] for k in ("A_log", "x_proj_B.weight", "x_proj_C.weight"))
    weights = {"layers.0.mixer.A_log": A_log, "layers.0.mixer.x_proj.weight": torch.cat([B, C])}
    frozen = config["num_freeze"]
    options = SDT.Options(freeze_channels=frozen["channel"], freeze_states=frozen["state"])
    method = SDT(site_alone(weights, e=config["d"], n=config["n"], k=1), options, 2).double()
    method.warm_up()
    assert [name for name, p in method.named_parameters() if p.requires_grad] == ["warm.0"]
    method.warm[0].data = t["warmup"]
    assert torch.equal(method.weights(weights)["layers.0.mixer.A_log"], A_log + t["warmup"].T)
    method.choose()
    assert torch.equal(method.mask(0), t["mask.A"].bool())
    assert torch.equal(method.mask(0).any(0).expand(4, -1), t["mask.B"].bool()) and torch.equal(
        t["mask.B"], t["mask.C"]
    )
    for part in "ABC":
        pairs.hold(getattr(method, part)[0], f"adapter_{part}")
    x = t["in.x"].requires_grad_()
    changed = method.weights(weights)
    B, C = changed["layers.0.mixer.x_proj.weight"].chunk(2)
    out = {"A_log": changed["layers.0.mixer.A_log"], "yB": x @ B.T, "yC": x @ C.T}
    for name, value in out.items():
        assert_close(value, t[f"out.{name}"], name)
    sum((value * t[f"loss_weight.{name}"]).sum() for name, value in out.items()).backward()
    pairs.compare(1e-10)
    assert_close(x.grad, t["grad_in.x"], "dx")


PEFT = {"peft_lora_linear": {}, "peft_dora_linear": dict(dora="row"), "peft_rslora_linear": dict(rslora=True)}


@pytest.mark.parametrize("case", PEFT)
def test_peft_layers(case):
    """peft's scaling is our scale; with rslora ours is its lora_alpha."""
    config, t = golden("peft", case)
    pairs, names = Pairs(t), {"fc1": "in_proj", "fc2": "out_proj"}
    weights = {f"blocks.0.mlp.{ours}.weight": pairs.values[f"{name}.base_layer.weight"] for ours, name in names.items()}
    scale = config["lora_alpha"] if "rslora" in case else config["scaling"]
    options = Lora.Options(rank=config["r"], scale=scale, targets=("fc1", "fc2"), **PEFT[case])
    method = Lora(site_alone(weights, kinds=("attn", "mlp")), options, 2).double()
    assert abs(method.factor - config["scaling"]) < 1e-12
    for j, name in enumerate(names.values()):
        pairs.hold(method.down[j], f"{name}.lora_A.weight")
        pairs.hold(method.up[j], f"{name}.lora_B.weight")
        if "dora" in case:
            pairs.hold(method.norm[j], f"{name}.lora_magnitude_vector.weight")
    x = t["in.x"].requires_grad_()
    first, second = method.weights(weights).values()
    y = F.linear(torch.tanh(x @ first.T), second, pairs.values["out_proj.base_layer.bias"])
    finish(t, y, pairs, {"x": x}, 1e-10, 1e-10)


@pytest.mark.parametrize("case", ["vit_adaptformer", "vit_adaptformer_ln_in"])
def test_adaptformer(case):
    config, t = golden("peft", case)
    pairs, has_norm = Pairs(t), config["layernorm"] == "in"
    options = Adapter.Options(
        hidden=config["bottleneck"],
        layernorm=config["layernorm"],
        scale="learned" if has_norm else float(config["scalar"]),
    )
    method = Adapter(site_alone({}, kinds=("attn", "mlp")), options, 2).double()
    part = method.parts["mlp_0"]
    for layer, name in {"down": "down_proj", "up": "up_proj", "norm": "adapter_layer_norm_before"}.items():
        for leaf in ("weight", "bias") if has_norm or layer != "norm" else ():
            pairs.hold(getattr(getattr(part, layer), leaf), f"{name}.{leaf}")
    if has_norm:
        pairs.hold(part.scale, "scale")
    x = t["in.x"].requires_grad_()
    y = method.branch(x, x, 0, "mlp", torch.zeros_like)  # the file holds what is added to the branch
    finish(t, y, pairs, {"x": x}, 1e-10, 1e-10)


def test_repadapter_beside_and_inside_the_layer():
    config, t = golden("peft", "vit_repadapter")
    pairs = Pairs(t)
    weight, bias = pairs.values["next.weight"], pairs.values["next.bias"]
    weights = {"blocks.0.attn.qkv.weight": weight, "blocks.0.attn.qkv.bias": bias}
    options = RepAdapter.Options(rank=config["hidden"], groups=config["groups"], scale=config["scale"], where="attn")
    method = RepAdapter(site_alone(weights, kinds=("attn", "mlp")), options, 2).double()
    part = method.parts["attn_0"]
    for ours, name in (
        (part.down.weight, "A.weight"),
        (part.down.bias, "A.bias"),
        (part.up, "B.weight"),
        (part.bias, "B.bias"),
    ):
        pairs.hold(ours, f"adapter.conv_{name}")
    merged = method.weights(weights)
    assert_close(merged["blocks.0.attn.qkv.weight"], t["merged.weight"], "weight")
    assert_close(merged["blocks.0.attn.qkv.bias"], t["merged.bias"], "bias")
    x = t["in.x"].requires_grad_()
    inside = F.linear(x, *merged.values())
    assert_close(inside, t["out.y"], "inside")
    grads = torch.autograd.grad((inside * t["loss_weight"]).sum(), [x, part.down.weight, part.up])
    finish(t, method.branch(x, x, 0, "attn", lambda h: F.linear(h, weight, bias)), pairs, {"x": x}, 1e-10, 1e-10)
    for got, want in zip(grads, (x.grad, part.down.weight.grad, part.up.grad), strict=True):
        assert_close(got, want, "gradients of the merged form")
