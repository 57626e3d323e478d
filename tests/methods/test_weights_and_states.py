"""What methods of weights, states and adapters have in common: counts, merging, composition, refusals; and those without a file."""

import copy

import pytest
import torch
import torch.nn.functional as F

from support import assert_close
from svp.backbones.vim import VARIANTS, Vim
from svp.backbones.vit import Vit
from svp.errors import SvpError
from svp.methods.base import options_of
from svp.model import adapt, load
from svp.registry import method_class
from svp.seams import Seams
from svp.training.loop import fit
from svp.training.optim import parameter_groups
from svp.training.recipe import Recipe
from training.small import RECIPE, crash_at, splits
from training.small import model as small_model


def net_of(kind, **more):
    torch.manual_seed(0)
    if kind == "vim":
        net = Vim(
            **{**dict(embed_dim=16, depth=2, d_state=4, dt_rank=2, patch_size=4, img_size=16, num_classes=3), **more}
        )
    else:
        net = Vit(
            "vit", **{**dict(embed_dim=16, depth=2, num_heads=2, patch_size=4, img_size=16, num_classes=3), **more}
        )
    net = net.double().eval()
    with torch.no_grad():  # trained-looking values: zeros hide what a method does
        for p in net.parameters():
            p += 0.05 * torch.randn(p.shape, dtype=p.dtype)
    return net


def stirred(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


# -- counts ------------------------------------------------------------------------------------------------------------

VIM_S = [  # the specification's table on Vim-S, without heads
    ("bitfit", {}, 74_112), ("lora", {}, 1_769_472), ("lora", dict(targets=("in_proj",), rank=32), 1_474_560),
    ("lora", dict(targets=("Z",)), 1_769_472), ("lora", dict(targets=("out_proj",), rank=96), 2_654_208),
    ("lora", dict(targets=("x_proj",)), 2_531_328), ("lora", dict(targets=("d",)), 2_433_024),
    ("lora", dict(targets=("B",)), 2_408_448), ("lora", dict(targets=("C",)), 2_408_448),
    ("lora", dict(targets=("dt",)), 2_433_024), ("lora", dict(targets=("embed",), rank=32), 36_864),
    ("lora", dict(preset="dora"), 1_778_688), ("adapter", dict(preset="parallel"), 884_736),
    ("adapter", dict(kind="parallel", hidden=24), 663_552), ("adapter", {}, 1_190_400),
    ("adapter", dict(preset="pfeiffer"), 156_864), ("adapter", dict(preset="houlsby"), 156_864),
    ("affix", dict(preset="published"), 221_184), ("affix", {}, 110_592), ("affix", dict(preset="projection"), 115_685_376),
    ("prompt_tuning", {}, 3_072), ("prompt_tuning", dict(projection=True), 298_752), ("additional_scan", {}, 663_552),
    ("partial", dict(parts=("A",)), 589_824), ("partial", dict(parts=("D",)), 36_864), ("partial", {}, 147_456),
    ("partial", dict(parts=("bias",)), 36_864), ("partial", dict(parts=("cls",)), 384), ("partial", dict(parts=("pos",)), 75_648),
    ("state_offset", {}, 589_824), ("state_offset", dict(kind="y"), 36_864), ("state_offset", dict(rank=2), 24 * 2 * 2 * 784),
    ("initial_state", {}, 589_824), ("initial_state", dict(state=False, conv=True), 110_592), ("sdt", {}, 13_056),
    ("ssf", {}, 191_232), ("ssf", dict(scan=False), 112_128), ("repadapter", {}, 120_000), ("fact", {}, 18_688),
]  # fmt: skip
VIT_B = [  # on ViT-B/16
    ("bitfit", {}, 102_912), ("lora", {}, 294_912), ("lora", dict(preset="dora"), 313_344),
    ("lora", dict(targets=("qkv",), dora=True), 322_560), ("lora", dict(rslora=True), 294_912), ("adapter", {}, 1_189_632),
    ("adapter", dict(hidden=8), 156_768), ("adapter", dict(preset="petl_vit"), 147_456),
    ("adapter", dict(preset="houlsby"), 313_536), ("adapter", dict(preset="pfeiffer"), 156_768), ("ssf", {}, 205_824),
    ("repadapter", {}, 239_808), ("repadapter", dict(where="attn"), 119_904), ("fact", {}, 30_976), ("fact", dict(rank=32), 86_528),
    ("fact", dict(preset="tt"), 61_440), ("prefix_tuning", {}, 184_320), ("prompt_tuning", {}, 6_144),
]  # fmt: skip


@pytest.fixture(scope="module")
def sites():
    """Sites of the big networks, without memory behind their tensors."""
    with torch.device("meta"):
        vim, vit = Vim("vim_small", **VARIANTS["vim_small"]), Vit("vit_base_patch16_224.augreg_in1k")
    return {"vim": vim.site(), "vit": vit.site()}


@pytest.mark.parametrize(
    "kind,method,options,count", [("vim", *row) for row in VIM_S] + [("vit", *row) for row in VIT_B], ids=str
)
def test_counts_of_the_sources(sites, kind, method, options, count):
    cls = method_class(method)
    opt = options_of(cls, options, method)
    assert cls.unfit(sites[kind], opt) is None
    with torch.device("meta"):
        made = cls(sites[kind], opt, 2)
    assert sum(p.numel() for p in made.parameters() if p.requires_grad) == count


# -- every method acts, and merges or says why not ---------------------------------------------------------------------

ON_VIM = [
    ("bitfit", {}), ("lora", {"rank": 4}), ("lora", dict(rank=3, dropout=0.5, targets=("in_proj", "X", "Z", "out_proj", "B", "embed"))),
    ("lora", dict(rank=3, dora=True, targets=("X", "d", "B", "C", "dt", "embed"))), ("lora", dict(rank=2, dora="row", rslora=True)),
    ("ssf", {}), ("ssf", dict(scan=False)), ("repadapter", {}), ("repadapter", dict(dropout=0.5)), ("fact", dict(rank=4)),
    ("fact", dict(kind="tt", rank=4)), ("partial", dict(parts=("A", "D", "conv1d", "bias", "conv1d_bias", "cls", "pos"))),
    ("additional_scan", dict(n=2)), ("additional_scan", dict(n=2, pos="suffix", init="mambapeft")), ("sdt", {}),
]  # fmt: skip
ON_VIT = [
    ("bitfit", {}), ("lora", {}), ("lora", dict(dropout=0.5, targets=("q", "v", "proj", "fc1", "fc2", "embed"))),
    ("lora", dict(dora=True, targets=("q", "k", "v", "qkv"))), ("ssf", {}), ("repadapter", {}), ("repadapter", dict(dropout=0.5)),
    ("fact", dict(rank=4)), ("fact", dict(kind="tt", rank=4)), ("partial", dict(parts=("cls", "pos"))),
]  # fmt: skip
NOT_MERGED = {
    "vim": [
        ("affix", {}), ("affix", dict(type="outer_dual_prefix", projection=True, hidden=3)), ("affix", dict(type="inner_single_prefix")),
        ("affix", dict(type="outer_single_prefix")), ("prompt_tuning", dict(type="prefix_suffix", projection=True)),
        ("state_offset", {}), ("state_offset", dict(kind="y")), ("state_offset", dict(rank=2, ratio=2)),
        ("initial_state", dict(conv=True)), ("adapter", dict(hidden=4)), ("adapter", dict(kind="parallel", hidden=4)),
        ("adapter", dict(preset="houlsby")),
    ],
    "vit": [
        ("prefix_tuning", {}), ("prefix_tuning", dict(n=2, projection=True, hidden=3)), ("prompt_tuning", {}),
        ("adapter", dict(layernorm="in", scale="learned")), ("adapter", dict(preset="houlsby")), ("adapter", dict(preset="pfeiffer")),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind,method,options", [("vim", *r) for r in ON_VIM] + [("vit", *r) for r in ON_VIT], ids=str)
def test_merged_is_unmerged(kind, method, options, images):
    net = net_of(kind)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    model = stirred(adapt(net, method, num_classes=3, **options)).eval()  # the probe runs here too
    merged = model.merge().eval()
    with torch.no_grad():
        want, got, plain = model(images), merged(images), net(images)
    assert_close(got, want, "logits", 1e-10)
    assert (want - plain).abs().max() > 1e-3 and type(merged) is type(net)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


@pytest.mark.parametrize("kind,method,options", [(k, *r) for k, rows in NOT_MERGED.items() for r in rows], ids=str)
def test_what_is_no_weight_is_not_merged(kind, method, options):
    model = adapt(net_of(kind), method, num_classes=3, **options)
    with pytest.raises(SvpError, match="cannot be merged"):
        model.merge()


STARTS = [("bitfit", {}), ("repadapter", {}), ("fact", {"rank": 4}), ("ssf", dict(init_std=0.0)), ("adapter", {})]
STARTS_VIM = [
    ("lora", {"rank": 4, "targets": ("X", "B", "embed")}), ("partial", {}), ("sdt", {}), ("additional_scan", {}),
    ("state_offset", {}), ("state_offset", dict(rank=2)), ("initial_state", {}), ("adapter", dict(preset="parallel")),
]  # fmt: skip


@pytest.mark.parametrize(
    "kind,method,options",
    [(k, *row) for k in ("vim", "vit") for row in STARTS] + [("vim", *row) for row in STARTS_VIM],
    ids=str,
)
def test_training_starts_at_the_frozen_network(kind, method, options, images):
    net = net_of(kind)
    model = adapt(net, method, num_classes=3, probe=False, **options).eval()
    with torch.no_grad():
        assert_close(model.features(images), net.features(images), "feature", 1e-12)


# -- composition -------------------------------------------------------------------------------------------------------

TOGETHER = [
    ("vim", ["svp", "lora"]), ("vim", ["affix", "lora", "partial"]), ("vim", [("state_offset", {"kind": "y"}), "additional_scan", "ssf"]),
    ("vim", ["sdt", ("lora", dict(targets=("out_proj", "in_proj"), rank=4))]), ("vim", ["svp", ("adapter", dict(preset="parallel"))]),
    ("vim", [("lora", dict(rank=4, dropout=0.1)), "adapter"]), ("vit", [("lora", dict(rank=4, dropout=0.1)), "adapter"]),
    ("vim", [("lora", dict(rank=4, dropout=0.1)), ("adapter", dict(preset="parallel"))]),
    ("vim", ["lora", "full"]), ("vit", [("lora", dict(rank=4, dora=True)), "full"]),
    ("vit", ["svp", "lora"]), ("vit", ["prefix_tuning", "adapter", "bitfit"]), ("vit", ["prompt_tuning", "fact"]),
]  # fmt: skip


@pytest.mark.parametrize("kind,methods", TOGETHER, ids=str)
def test_methods_compose(kind, methods, images):
    small = {"lora": {"rank": 4}, "svp": {"hidden": 4}, "fact": {"rank": 4}}
    methods = [(m, small.get(m, {})) if isinstance(m, str) else m for m in methods]
    model = stirred(adapt(net_of(kind), methods, num_classes=3))
    F.cross_entropy(model(images), torch.tensor([0, 1, 2])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.trainable_parameters())


def test_a_norm_of_dora_is_the_networks_whatever_the_order(images):
    """After ssf the norm would take ssf's scale out again."""
    dora = ("lora", dict(rank=2, dora="row", targets=("qkv", "fc1")))
    one, two = (stirred(adapt(net_of("vit"), pair, num_classes=3)) for pair in (["ssf", dora], [dora, "ssf"]))
    two.load_state_dict(one.state_dict())
    with torch.no_grad():
        assert torch.equal(one(images), two(images))
    name = "blocks.0.attn.qkv.weight"
    w = dict(one.backbone.named_parameters())
    before = one.method.weights(w)[name]
    with torch.no_grad():
        for p in one.method.parts["ssf"].parameters():
            p.mul_(2)
    assert_close(one.method.weights(w)[name], 2 * before, "qkv")


MERGED_TOGETHER = [
    [("lora", dict(rank=4, dropout=0.5, targets=("X", "B"))), "ssf"], ["ssf", ("lora", dict(rank=4, dropout=0.5, targets=("X", "B")))],
    [("lora", dict(rank=4, dropout=0.5, targets=("X", "embed"))), ("repadapter", dict(dropout=0.5)), "ssf", "full"],
    ["lora", "ssf", "additional_scan"], ["additional_scan", "ssf", ("lora", dict(rank=4, targets=("B", "C", "d")))], [("lora", dict(rank=4, dropout=0.5)), "repadapter"],
    ["repadapter", ("lora", dict(rank=4, dropout=0.5))], [("repadapter", dict(dropout=0.5)), "lora"],
    [("repadapter", dict(dropout=0.5)), ("lora", dict(rank=4, dropout=0.5)), "bitfit"], ["ssf", ("repadapter", dict(dropout=0.5)), "fact"],
]  # fmt: skip


@pytest.mark.parametrize("methods", MERGED_TOGETHER, ids=str)
def test_merged_is_unmerged_whatever_the_order(methods, images):
    small = {"lora": {"rank": 4}, "fact": {"rank": 4}, "additional_scan": {"n": 2}}
    model = stirred(
        adapt(net_of("vim"), [(m, small.get(m, {})) if isinstance(m, str) else m for m in methods], num_classes=3)
    )
    with torch.no_grad():
        assert_close(model.merge().eval()(images), model.eval()(images), "logits", 1e-10)


# -- refusals ----------------------------------------------------------------------------------------------------------

BAD = [
    ("vim", "lora", dict(targets=("x_porj",)), "did you mean x_proj"), ("vim", "lora", dict(targets=("q",)), "targets q are none of"),
    ("vit", "lora", dict(targets=("X",)), "targets X are none of"), ("vit", "lora", dict(targets=("fc3",)), "did you mean fc"),
    ("vim", "lora", dict(targets=()), "targets is empty"), ("vim", "lora", dict(targets=("X", "X")), "stands twice"),
    ("vim", "lora", dict(rank=4, dora=True, dropout=0.1), "dropout must be 0"), ("vim", "lora", dict(rank=999), "larger than"),
    ("vim", "affix", dict(type="inner_single_suffix"), "a suffix never learns"), ("vim", "affix", dict(type="inner_dual_infix"), "not offered"),
    ("vim", "affix", dict(type="inner_dual_prefx"), "did you mean inner_dual_prefix"), ("vit", "affix", {}, "take prefix_tuning"),
    ("vim", "prefix_tuning", {}, "take affix"), ("vit", "state_offset", {}, "does not have"), ("vit", "initial_state", {}, "does not have"),
    ("vit", "additional_scan", {}, "extends the scans of Vim"), ("vit", "sdt", {}, "tunes the scans of Vim"), ("vit", "partial", {}, "no tensors for 'conv1d'"),
    ("vit", "adapter", dict(kind="parallel"), "take kind=adaptformer"), ("vim", "adapter", dict(kind="pfeiffer", layernorm="in"), "belongs to"),
    ("vim", "repadapter", dict(groups=3), "3 groups do not divide"), ("vim", "repadapter", dict(where="attn"), "belongs to a ViT"),
    ("vim", "fact", dict(rank=17), "larger than the width"), ("vit", "prompt_tuning", dict(type="suffix"), "knows no order"),
    ("vim", "prompt_tuning", dict(hidden=3), "projection=true"), ("vim", "state_offset", dict(ratio=2), "give rank too"),
    ("vim", "partial", dict(parts=("A", "A")), "stands twice"), ("vit", "adapter", dict(kind="houlsby", scale="learned"), "a scale belongs"),
]  # fmt: skip


@pytest.mark.parametrize("kind,method,options,words", BAD, ids=str)
def test_what_cannot_act_says_why(kind, method, options, words):
    with pytest.raises(SvpError, match=words) as err:
        adapt(net_of(kind), method, num_classes=3, **options)
    assert err.value.kind == "usage"


def test_one_convolution_has_no_two_pasts():
    with pytest.raises(SvpError, match="both directions of this network share one"):
        adapt(net_of("vim", scan_type="v1"), "initial_state", num_classes=3, conv=True)


def test_fact_refuses_an_mlp_that_is_no_multiple():
    with pytest.raises(SvpError, match="cannot be cut into blocks of 16 x 16"):
        adapt(net_of("vit", mlp_ratio=2.5), "fact", num_classes=3, rank=4)


@pytest.mark.parametrize("method", ["state_offset", "initial_state"])
def test_a_state_for_other_states_is_refused(method):
    with pytest.raises(SvpError, match="holds 4 states of a scan that another method gives 10"):
        adapt(net_of("vim"), ["additional_scan", method], num_classes=3)


def test_two_memories_are_refused(images):
    model = adapt(net_of("vim"), ["affix", "initial_state"], num_classes=3, probe=False)
    with pytest.raises(SvpError, match="both bring a memory"):
        model(images)


NOT_TOGETHER = [
    ("vim", ["vpt", "prompt_tuning"]), ("vim", ["e2vpt", "vpt"]), ("vim", ["spt", "insvp"]), ("vit", ["prompt_tuning", "sa2vp"]),
    ("vit", ["sa2vp", "insvp"]), ("vit", ["sa2vp", "vpt"]),
]  # fmt: skip


@pytest.mark.parametrize("kind,methods", NOT_TOGETHER, ids=str)
def test_two_that_count_tokens_are_refused(kind, methods):
    with pytest.raises(SvpError, match=r"counts the tokens of the sequence, beside it .* would insert others") as err:
        adapt(net_of(kind, img_size=32, depth=2), methods, num_classes=3)
    assert err.value.kind == "usage"


@pytest.mark.parametrize(
    "methods", [["damvp", "ilm_vp"], ["ilm_vp", "damvp"], ["vp", "autovp"], ["autovp", "vp"]], ids=str
)
def test_who_takes_raw_pixels_comes_first_whatever_the_order(methods, images):
    model = adapt(net_of("vim", num_classes=9), methods, num_classes=3)
    assert model(images).shape == (3, 3)
    assert adapt(net_of("vim"), [("vpt", dict(preset="shallow")), "prompt_tuning"], num_classes=3)(images).shape == (
        3,
        3,
    )


# -- what no golden file holds -----------------------------------------------------------------------------------------


def hooked(net, layers, change):
    """A copy whose layers' outputs go through change(name, y)."""
    net = copy.deepcopy(net)
    for name in layers:
        net.get_submodule(name).register_forward_hook(lambda _m, _x, y, name=name: change(name, y))
    return net


def test_ssf_on_a_vit_is_a_hook_on_each_layer(images):
    """timm's own forward with gamma y + beta after each layer."""
    from timm.models.vision_transformer import VisionTransformer

    net = net_of("vit")
    model = stirred(adapt(net, "ssf", num_classes=3)).eval()
    plain = (
        VisionTransformer(embed_dim=16, depth=2, num_heads=2, patch_size=4, img_size=16, num_classes=0).double().eval()
    )
    plain.load_state_dict({k: t for k, t in net.state_dict().items() if not k.startswith("head.")})
    m = model.method
    rows = {name: (g, b) for name, g, b in zip(m.names, m.gamma, m.beta, strict=True)}
    assert len(rows) == 2 * 6 + 2

    def change(name, y):
        gamma, beta = rows[name]
        if y.dim() == 4:
            return y * gamma[:, None, None] + beta[:, None, None]
        return y * gamma + beta

    with torch.no_grad():
        assert_close(model.features(images), hooked(plain, rows, change)(images), "feature", 1e-10)


class ShiftedNorms(Seams):
    """gamma h + beta after the norm of each block."""

    def __init__(self, rows):
        self.rows = rows

    def branch(self, x, h, i, kind, run):
        gamma, beta = self.rows[f"layers.{i}.norm"]
        return run(gamma * h + beta)


def test_ssf_on_vim_is_a_hook_on_each_layer(images):
    net = net_of("vim")
    model = stirred(adapt(net, "ssf", num_classes=3)).eval()
    m = model.method
    rows = {name: (g.detach(), b.detach()) for name, g, b in zip(m.names, m.gamma, m.beta, strict=True)}
    assert len(rows) == 2 * 7 + 2
    inside = [name for name in rows if ".mixer." in name]
    slow = hooked(net, inside, lambda name, y: y * rows[name][0] + rows[name][1])
    gamma, beta = rows["patch_embed.proj"]
    with torch.no_grad():
        slow.patch_embed.proj.weight *= gamma[:, None, None, None]
        slow.patch_embed.proj.bias.mul_(gamma).add_(beta)
        feature = slow.features(images, ShiftedNorms(rows))
        gamma, beta = rows["norm_f"]
        assert_close(model.features(images), feature * gamma + beta, "feature", 1e-10)


@pytest.mark.parametrize("kind", ["tk", "tt"])
def test_fact_is_the_shared_factorisation(kind):
    """Each d x d block of a layer sees s V(U(x) T) of its own part of the input."""
    net = net_of("vit")
    model = stirred(adapt(net, "fact", num_classes=3, rank=3, kind=kind, scale=0.5))
    m, w = model.method, {name: p.detach() for name, p in net.named_parameters()}
    changed, j = m.weights(w), 0
    if kind == "tk":
        cores = [sum(m.P[s, block] * m.C[:, :, s] for s in range(3)) for block in range(24)]
    else:
        cores = list(m.T)
    for name, value in changed.items():
        rows, columns = (size // 16 for size in value.shape)
        x = torch.randn(5, 16 * columns, dtype=torch.float64)
        parts = []
        for a in range(rows):
            ways = [x[:, 16 * c : 16 * c + 16] @ m.U.T @ cores[j + a * columns + c] @ m.V.T for c in range(columns)]
            parts.append(0.5 * sum(ways))
        j += rows * columns
        assert_close(x @ value.T, (x @ w[name].T + torch.cat(parts, 1)).detach(), name, 1e-12)
    assert j == len(cores) == 24


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


def test_lora_on_a_vit_changes_its_rows_alone():
    net = net_of("vit")
    model = stirred(adapt(net, "lora", num_classes=3))
    assert model.method.opt.targets == ("q", "v") and model.method.opt.rank == 8
    w = {name: p.detach() for name, p in net.named_parameters()}
    changed = model.method.weights(w)
    assert sorted(changed) == [f"blocks.{i}.attn.qkv.weight" for i in (0, 1)]
    for name, value in changed.items():
        moved = (value != w[name]).any(1)
        assert moved[:16].all() and not moved[16:32].any() and moved[32:].all()


def test_dora_starts_at_the_frozen_network_in_both_directions(images):
    net = net_of("vim")
    model = adapt(net, "lora", num_classes=3, rank=4, dora=True, targets=("X", "Z", "out_proj", "d", "B", "C", "dt"))
    with torch.no_grad():
        assert_close(model.features(images), net.features(images), "feature", 1e-12)


def test_affix_without_the_dead_half_is_affix(images):
    net = net_of("vim")
    full, half = (adapt(net, "affix", num_classes=3, x_only=x_only) for x_only in (False, True))
    for ours, theirs in zip(half.method.generator.tokens, full.method.generator.tokens, strict=True):
        ours.data = theirs.data.unflatten(1, (2, 2, 32))[:, :, 0].flatten(1)
    half.head = full.head
    with torch.no_grad():
        assert torch.equal(half(images), full(images))


def test_a_new_decay_of_states_is_not_pulled_to_one():
    model = adapt(net_of("vim"), "additional_scan", num_classes=3)
    groups = parameter_groups(model.named_parameters(), Recipe(lr=1.0, weight_decay=0.1), model.method.groups())
    decayed = {name.split(".")[1] for group in groups if group["weight_decay"] for name in group["names"]}
    assert decayed == {"B", "C", "weight"}


def test_sdt_trains_in_two_phases(images):
    model = adapt(net_of("vim"), "sdt", num_classes=3, freeze_channels=0.8, freeze_states=0.5, warmup_epochs=3)
    method, count = model.method, model.num_trainable()

    first, second = method.phases(Recipe(epochs=7))
    assert first.recipe.epochs == 3 and second.recipe.epochs == 7
    before = method.mask(0).clone()
    stirred(model)
    first.begin(None)
    model.probe()
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2)
    F.cross_entropy(model(images), torch.tensor([0, 1, 2])).backward()
    optimizer.step()
    second.begin(None)
    model.probe()
    assert model.num_trainable() == count and not torch.equal(method.mask(0), before)
    assert all(not p.any() for p in method.parameters())
    assert all(int(method.mask(j).sum()) == 6 * 2 and int(method.mask(j).any(0).sum()) == 6 for j in range(4))
    other = adapt(net_of("vim"), "sdt", num_classes=3, freeze_channels=0.8, freeze_states=0.5)
    stirred(model)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(images), model(images))


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 9])  # in the warm-up, and after the choice
def test_sdt_in_a_whole_run_that_is_resumed(step, tmp_path):
    options = dict(freeze_channels=0.8, freeze_states=0.5, warmup_epochs=2)
    recipe = RECIPE.but(epochs=2, lr=3e-2)
    whole = small_model("sdt", **options)
    assert fit(whole, splits(), recipe=recipe).result["epochs"] == 4
    assert any(p.any() for p in whole.method.A) and not len(whole.method.warm)
    with crash_at(step):
        fit(small_model("sdt", **options), splits(), recipe=recipe, out=tmp_path, checkpoint_seconds=0)
    resumed = small_model("sdt", **options)
    fit(resumed, splits(), recipe=recipe, out=tmp_path, resume=True)
    for (name, a), (_, b) in zip(resumed.state_dict().items(), whole.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    again = load(tmp_path, backbone=whole.backbone)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again.eval()(x), whole.eval()(x))


SAVED = [("vim", *r) for r in [*ON_VIM, *NOT_MERGED["vim"]]] + [("vit", *r) for r in [*ON_VIT, *NOT_MERGED["vit"]]]


@pytest.mark.parametrize("kind,method,options", SAVED, ids=str)
def test_every_form_is_saved_and_loaded(kind, method, options, images, tmp_path):
    net = net_of(kind)
    model = stirred(adapt(net, method, num_classes=3, probe=False, **options)).eval()
    model.save_pretrained(tmp_path / "a")
    again = load(tmp_path / "a", net)
    for name, value in model.state_dict().items():  # stored as they are
        assert torch.equal(again.state_dict()[name], value), name
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


def test_what_is_adapted_is_labelled():
    for kind, method, label in [
        ("vim", "ssf", "ssf_vim"), ("vit", "ssf", "ssf"), ("vim", "repadapter", "repadapter_vim"), ("vim", "fact", "fact_vim"),
        ("vim", "adapter", "adapter_vim"), ("vit", "adapter", "adapter"), ("vit", "lora", "lora"), ("vim", "affix", "affix"),
        ("vit", "prompt_tuning", "prompt_tuning_vit"),
    ]:  # fmt: skip
        options = {"rank": 4} if method == "fact" else {}
        assert adapt(net_of(kind), method, num_classes=3, probe=False, **options).labels == (label,)


def test_a_change_of_a_weight_is_as_exact_as_the_weight_under_autocast():
    net = net_of("vim").float()
    model = stirred(adapt(net, ["lora", "repadapter", "ssf", ("fact", dict(rank=4))], num_classes=3, probe=False))
    want = net.in_force(model.method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = net.in_force(model.method)
    assert all(torch.equal(got[name], t) for name, t in want.items())
    offset = stirred(adapt(net, "state_offset", num_classes=3, rank=2)).method
    want = offset.memory(0, want).offset
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(offset.memory(0, net.in_force(None)).offset, want)


def test_what_merged_networks_are_adapted_to_asks_for_them(tmp_path):
    merged = stirred(adapt(net_of("vim"), "bitfit", num_classes=3)).merge()
    adapt(merged, "linear", num_classes=3).save_pretrained(tmp_path / "adapter")
    with pytest.raises(SvpError, match="a backbone with merged weights, which no file holds") as err:
        load(tmp_path / "adapter")
    assert err.value.hint == "give backbone="
    assert load(tmp_path / "adapter", merged).num_classes == 3
