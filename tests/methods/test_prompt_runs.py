"""Prompting methods in whole runs: what their phases make of data, and that it is saved, loaded and resumed."""

import pytest
import torch
from safetensors.torch import save_file

from svp.backbones.create import create_backbone
from svp.backbones.vit import Vit
from svp.errors import SvpError
from svp.methods.e2vpt import masked_count
from svp.model import adapt, load
from svp.training.evaluate import evaluate
from svp.training.loop import fit
from svp.training.optim import parameter_groups
from svp.training.recipe import Recipe
from training.small import Crash, at_step, splits

RECIPE = Recipe(epochs=1, batch_size=16, lr=1e-2, eval_batch_size=16)
METHODS = {
    "e2vpt": dict(num_tokens=4, kv_tokens=2),
    "spt": dict(num_tokens=3),
    "damvp": dict(max_clusters=3),
    "autovp": dict(mapping="iter", num_map=2),
    "ilm_vp": {},
    "sa2vp": dict(hidden=2),
    "insvp": dict(num_tokens=2, hidden=2, kernels=[3, 5]),
}
MORE = [
    ("e2vpt", dict(preset="published", num_tokens=4, kv_tokens=2, share_kv=False)),
    ("e2vpt", dict(num_tokens=4, prune_tokens=0.0, prune_pieces=0.0)),
    ("e2vpt", dict(num_tokens=4, masks=False, kv_tokens=0)),
    ("spt", dict(num_tokens=3, prototypes="mean")),
    ("spt", dict(num_tokens=3, prototypes="max", preset="published")),
    ("spt", dict(num_tokens=3, prototypes="kmeans")),
    ("spt", dict(num_tokens=3, deep=False)),
    ("damvp", dict(preset="head_free", max_clusters=3)),
    ("autovp", dict(mapping="fully")),
    ("autovp", dict(mapping="freq", learnable=False, scale=0.7)),
    ("ilm_vp", dict(mapping="flm", prompt="additive")),
    ("ilm_vp", dict(mapping="rlm")),
    ("sa2vp", dict(hidden=2, attn="acc", preset="published")),
    ("insvp", dict(num_tokens=2, hidden=2, kernels=[3, 5], preset="published", simam=True)),
    ("insvp", dict(tokens=False, hidden=2, kernels=[3, 5])),
]


def vim():
    return create_backbone("vim_tiny", depth=2, embed_dim=16, d_state=4, patch_size=8, img_size=16, num_classes=9)


def vit(depth=6):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Vit(
            "vit", embed_dim=16, depth=depth, num_heads=2, mlp_ratio=2, patch_size=8, img_size=16, num_classes=9
        ).eval()
    net.name, net.overrides = "vit_nano", {}
    return net


BACKBONES = {"vim": vim, "vit": vit}


def cases():
    return [("vit", m, o) for m, o in [*METHODS.items(), *MORE]] + [
        ("vim", m, o) for m, o in METHODS.items() if m != "sa2vp"
    ]


@pytest.mark.parametrize(
    "backbone,method,options", cases(), ids=lambda x: x if isinstance(x, str) else ",".join(map(str, x.values()))
)
def test_trains_and_comes_back(backbone, method, options, tmp_path):
    net = BACKBONES[backbone]()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    model = adapt(net, method, num_classes=3, **options)  # the probe has found an effect of every tensor
    start = {name: t.clone() for name, t in model.state_dict().items()}
    run = fit(model, splits(train=16, val=6, test=6), recipe=RECIPE, out=tmp_path)
    assert 0 <= run.test_accuracy <= 1
    changed = [name for name, t in model.state_dict().items() if name not in start or not torch.equal(t, start[name])]
    assert changed
    assert all(torch.equal(t, net.state_dict()[name]) for name, t in before.items())
    images = torch.rand(2, 3, *model.preprocessing.crop)
    again = load(tmp_path, backbone=net)
    assert torch.equal(model.eval()(images), again(images))
    assert again.num_trainable(True) == model.num_trainable(True)


@pytest.mark.parametrize("method,step", [("e2vpt", 1), ("e2vpt", 3), ("damvp", 1), ("autovp", 2)])
def test_a_killed_run_ends_in_the_same_numbers(method, step, tmp_path):
    data, recipe = splits(train=32, val=6, test=6), RECIPE.but(epochs=2 if method == "autovp" else 1)

    def model():
        return adapt(vit(), method, num_classes=3, probe=False, **METHODS[method])

    whole = model()
    fit(whole, data, recipe=recipe, out=tmp_path / "whole")

    def save_and_crash(run):
        run.save()
        raise Crash

    with pytest.raises(Crash), at_step(step, save_and_crash):
        fit(model(), data, recipe=recipe, out=tmp_path / "half")
    half = model()
    fit(half, data, recipe=recipe, out=tmp_path / "half", resume=True)
    for (name, want), got in zip(whole.state_dict().items(), half.state_dict().values(), strict=True):
        assert torch.equal(want, got), name


def test_pruning_masks_its_shares_and_rewinds(tmp_path):
    model = adapt(
        vit(), "e2vpt", num_classes=3, num_tokens=4, kv_tokens=2, pieces=8, prune_tokens=0.5, prune_pieces=0.3
    )
    start = {name: t.clone() for name, t in model.state_dict().items()}
    method, seen = model.method, []
    prune = method.prune

    def watched(run):
        trained = model.state_dict()["method.prompts"].clone()
        prune(run)
        seen.append((trained, {name: t.clone() for name, t in model.state_dict().items()}))

    method.prune = watched
    fit(model, splits(train=16, val=6, test=6), recipe=RECIPE)
    trained, rewound = seen[0]
    assert not torch.equal(trained, start["method.prompts"]) and torch.equal(
        rewound["method.prompts"], start["method.prompts"]
    )
    assert torch.equal(rewound["head.weight"], start["head.weight"])
    assert (method.token_mask == 0).sum() == 2 and ((method.piece_mask == 0).sum(1) == 2).all()
    assert not method.token_mask.requires_grad and not method.opt.masks_train
    fresh = adapt(vit(), "e2vpt", num_classes=3, num_tokens=4, kv_tokens=2, preset="published")
    start = fresh.method.prompts.detach().clone()
    method, seen = fresh.method, []
    fresh.method.prune = lambda run: (type(method).prune(method, run), seen.append(method.prompts.detach().clone()))
    fit(fresh, splits(train=16, val=6, test=6), recipe=RECIPE)
    assert not torch.equal(seen[0], start)


def test_clusters_are_found_kept_and_given(tmp_path):
    model = adapt(vit(), "damvp", num_classes=3, threshold=1e-6)
    fit(model, splits(train=8, val=6, test=6), recipe=RECIPE, out=tmp_path / "run")
    assert model.method.opt.clusters == len(model.method.up) == 8 and len(model.method.prototypes) == 8
    assert model.specs[0][1]["clusters"] == 8
    feature = model.method.prototypes[[3, 5]]
    assert model.method.nearest(feature).tolist() == [3, 5]
    save_file({f"pad_{part}": torch.ones(1, *getattr(model.method, part).shape[1:]) for part in ("up", "down", "left", "right")},
              tmp_path / "meta.safetensors")  # fmt: skip
    started = adapt(vit(), "damvp", num_classes=3, clusters=2, meta=str(tmp_path / "meta.safetensors"))
    fit(started, splits(train=8, val=6, test=6), recipe=RECIPE.but(lr=1e-9))
    assert torch.allclose(started.method.up, torch.ones(()), atol=1e-6)


@pytest.mark.parametrize(
    "method,options", [("damvp", {}), ("e2vpt", dict(preset="published", num_tokens=4, kv_tokens=2))]
)
def test_what_training_fills_in_is_no_other_setting(method, options, tmp_path):
    """A notebook that fits one model twice, or goes on with it after a stop, means the same run."""
    model = adapt(vit(), method, num_classes=3, **options)
    data = splits(train=16, val=6, test=6)

    def stop(run):
        run.save()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), at_step(2, stop):
        fit(model, data, recipe=RECIPE.but(epochs=3), out=tmp_path / "run")
    run = fit(model, data, recipe=RECIPE.but(epochs=3), out=tmp_path / "run", resume=True)
    assert fit(model, data, recipe=RECIPE.but(epochs=3), out=tmp_path / "run").result == run.result


def test_a_cluster_is_chosen_in_full_precision():
    model = adapt(vit(), "damvp", num_classes=3, clusters=4).eval()
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    chosen = []
    nearest = model.method.nearest
    model.method.nearest = lambda feature: (chosen.append(feature), nearest(feature))[1]
    with torch.no_grad():
        model(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(images)
    assert torch.equal(*chosen)


@pytest.mark.parametrize("methods", [["vp", "damvp"], ["damvp", "vp"]], ids="+".join)
def test_clusters_are_of_pictures_that_nobody_has_changed(methods):
    model = adapt(vit(), [(m, dict(clusters=2) if m == "damvp" else {}) for m in methods], num_classes=3).eval()
    seen = []
    damvp = model.method.parts["damvp"]
    damvp.nearest = lambda feature: (seen.append(feature), torch.zeros(len(feature), dtype=torch.long))[1]
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        model(images)
        torch.testing.assert_close(seen[0], model.backbone.features(images))


def test_places_drawn_in_evaluation_are_the_same_for_a_seed():
    def scores():
        model = adapt(vit(), ("vp", dict(preset="published", kind="random_patch", size=3)), num_classes=3)
        return fit(model, splits(train=16, val=30, test=30), recipe=RECIPE.but(lr=3.0, epochs=2)).result, model

    torch.manual_seed(5)
    (first, model), state = scores(), torch.get_rng_state()
    (second, _) = scores()
    for key in ("val_accuracy", "test_accuracy", "test_ece"):
        assert first[key] == second[key]
    evaluate(model, splits(), "val")
    torch.manual_seed(5)
    assert torch.equal(state, torch.get_rng_state())


def test_shares_of_tokens_are_not_rounded_to_whole_per_cent():
    assert masked_count(8, 0.125, 1) == 1 and masked_count(16, 0.125, 4) == 2 and masked_count(10, 0.3, 1) == 3
    assert masked_count(4, 1.0, 1) == 3


@pytest.mark.parametrize(
    "method,options,reason",
    [
        ("insvp", dict(position="post"), "attention knows no order"), ("insvp", dict(vim_deep="add"), "is of the running sum"),
        ("vpt", dict(vim_deep="add"), "is of the running sum"), ("spt", dict(vim_deep="hidden_only"), "is of the running sum"),
    ],
)  # fmt: skip
def test_what_belongs_to_vim_is_refused_on_a_vit(method, options, reason):
    with pytest.raises(SvpError, match=reason):
        adapt(vit(), method, num_classes=3, **options)


@pytest.mark.parametrize("switches", [dict(reg_tokens=2), dict(global_pool="avg")], ids=str)
def test_a_branch_that_counts_its_tokens_knows_them_all(switches):
    net = Vit("vit", embed_dim=16, depth=2, num_heads=2, patch_size=8, img_size=16, **switches)
    with pytest.raises(SvpError, match="has others"):
        adapt(net, "svp", num_classes=3, hidden=4, add_to="branch", gen_input="normed")
    assert adapt(net, "svp", num_classes=3, hidden=4)(torch.randn(2, 3, 16, 16)).shape == (2, 3)


@pytest.mark.parametrize("method", ["vp", "damvp", "linear", "ilm_vp", "autovp"])
@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (3, 16, 16), (2, 16, 16, 3)], ids=str)
def test_pictures_of_another_form_are_refused_before_a_frame_is_put_on_them(method, shape):
    model = adapt(vit(), method, num_classes=3)
    with pytest.raises(SvpError, match=r"expected \(b, 3, 16, 16\)"):
        model(torch.rand(shape))


def test_a_map_by_frequency_follows_what_the_network_says():
    model = adapt(vit(), "ilm_vp", num_classes=3, mapping="flm")
    fit(model, splits(train=16, val=6, test=6), recipe=RECIPE.but(lr=1e-9))
    assert len(set(model.head.map.flatten().tolist())) == 3
    assert "head.map" in model.state_dict() and not any("source" in name for name in model.state_dict())


def test_semantic_maps_need_embeddings(tmp_path):
    with pytest.raises(SvpError, match="names of its 9 source classes are not known"):
        adapt(vit(), "autovp", num_classes=3, mapping="semantic")
    path = tmp_path / "names.safetensors"
    save_file({"source": torch.eye(9), "target": torch.eye(9)[[4, 0, 7]].contiguous()}, path)
    model = adapt(vit(), "autovp", num_classes=3, mapping="semantic", embeddings=str(path))
    fit(model, splits(train=16, val=6, test=6), recipe=RECIPE, out=tmp_path / "run")
    assert model.head.map.flatten().tolist() == [4, 0, 7]
    path.unlink()  # the map is in the adapter
    assert load(tmp_path / "run", backbone=vit()).head.map.flatten().tolist() == [4, 0, 7]
    with pytest.raises(SvpError, match="with embeddings of the classes does not exist"):
        fit(adapt(vit(), "autovp", num_classes=3, mapping="semantic", embeddings=str(path)), splits(), recipe=RECIPE)


def test_pictures_are_read_by_texts(tmp_path):
    """CLIP's logits by hand; the adapter brings the embeddings along."""
    net, path = vit(), tmp_path / "texts.safetensors"
    spec = ("vp", dict(head="text", embeddings=str(path)))
    texts = torch.randn(3, 9, generator=torch.Generator().manual_seed(4))
    save_file({"target": texts}, path)
    model = adapt(net, spec, num_classes=3).eval()
    assert model.num_trainable(True) == model.num_trainable() and model.head_name == "method"
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        z = torch.nn.functional.linear(model.features(images), net.head.weight, net.head.bias)
        want = torch.stack([100 * torch.cosine_similarity(z, row[None]) for row in texts], dim=1)
        torch.testing.assert_close(model(images), want)
    fit(model, splits(train=16, val=6, test=6), recipe=RECIPE, out=tmp_path / "run")
    path.unlink()
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "run", backbone=net)(images), model.eval()(images))
    with pytest.raises(SvpError, match="with embeddings of the classes does not exist"):
        adapt(net, spec, num_classes=3)
    for tensors, said in (
        ({"target": texts[:2]}, "expected \\(3, 9\\)"),
        ({"source": texts}, "it lacks target"),
    ):
        save_file({name: t.contiguous() for name, t in tensors.items()}, path)
        with pytest.raises(SvpError, match=said):
            adapt(net, spec, num_classes=3)


REFUSED = [
    ("vit", ("vp", dict(head="text")), {}, "which text side belongs to vit_nano is not known"),
    ("vim", ("vp", dict(head="text")), {}, "which text side belongs to"),
    ("vit", "vp", dict(embeddings="x.safetensors"), 'head "new" does not read'),
    ("vit", "autovp", dict(embeddings="x.safetensors"), 'mapping "fully" does not read'),
    ("vit", "ilm_vp", dict(embeddings="x.safetensors"), "CLIP alone reads"),
    ("vit", "e2vpt", dict(pieces=7), "width 16 do not divide into 7 pieces"),
    ("vit", "e2vpt", dict(position="post"), "attention knows no order"),
    ("vit", "spt", dict(prototypes="mean", num_tokens=20), "4 patches cannot be pooled in 20 windows"),
    ("vit", "damvp", dict(size=8), "size 8 leaves nothing"),
    ("vit", "autovp", dict(scale=2.0), "scale 2 leaves no frame"),
    ("vit", "autovp", dict(mapping="freq", num_map=4), "4 source classes for each of 3"),
    ("vit", "ilm_vp", dict(size=16), "size 16 leaves no frame"),
    ("vim", "sa2vp", {}, "frozen projections of attention blocks"),
    ("vit", "insvp", dict(kernels=[4, 5]), "two odd sizes"),
]


@pytest.mark.parametrize("backbone,method,options,reason", REFUSED)
def test_what_cannot_act_says_why(backbone, method, options, reason):
    with pytest.raises(SvpError, match=reason):
        adapt(BACKBONES[backbone](), method, num_classes=3, **options)


@pytest.mark.parametrize("method", ["autovp", "ilm_vp", ("vp", {"head": "source"})], ids=str)
def test_maps_need_source_classes(method):
    net = vim()
    net.reset_classifier(0)
    with pytest.raises(SvpError, match="no source head"):
        adapt(net, method, num_classes=3)


def test_a_projection_is_no_classifier():
    net = vit()
    net.name = "vit_base_patch16_clip_quickgelu_224.openai"
    with pytest.raises(SvpError, match="projection to text embeddings"):
        adapt(net, ("vp", {"head": "source"}), num_classes=3)


def test_a_rule_for_the_head_holds_in_company():
    model = adapt(vit(), [("damvp", dict(preset="paper")), "lora"], num_classes=3)
    found = {
        name: group["base_lr"]
        for group in parameter_groups(model.named_parameters(), RECIPE, model.method.groups())
        for name in group["names"]
    }
    assert found["head.weight"] == 0.1 and {v for k, v in found.items() if k.startswith("method.")} == {1e-2}


def test_a_last_block_for_prompts_alone_is_refused():
    with pytest.raises(SvpError, match="of 5 blocks the last would change the prompts alone"):
        adapt(vit(5), "sa2vp", num_classes=3)


def test_an_adapted_form_is_labelled():
    model = adapt(vim(), "e2vpt", num_classes=3, num_tokens=2)
    assert model.labels == ("e2vpt_in",) and model.summary().startswith("e2vpt_in on vim_tiny")
    assert adapt(vit(), ["e2vpt", "lora"], num_classes=3).labels == ("e2vpt", "lora")


def test_a_second_training_begins_with_whole_masks():
    options = dict(num_tokens=4, kv_tokens=2, preset="published")
    model, data = adapt(vit(), "e2vpt", num_classes=3, **options), splits(train=16, val=6, test=6)
    first = fit(model, data, recipe=RECIPE)
    assert first.result["options"]["e2vpt"]["masks_train"] and not model.method.token_mask.all()
    seen, remember = [], model.method.remember

    def watched(run):
        remember(run)
        seen.append([(m.detach().clone(), m.requires_grad) for m in (model.method.token_mask, model.method.piece_mask)])

    model.method.remember = watched
    fit(model, data, recipe=RECIPE)
    assert all(mask.eq(1).all() and trains for mask, trains in seen[0])


def test_the_hole_of_a_fixed_frame_is_as_large_as_the_picture():
    for dtype in (torch.float32, torch.bfloat16):
        net = create_backbone("vit_nano", img_size=288, depth=1).to(dtype)
        method = adapt(net, "autovp", num_classes=3, scale=1.4, learnable=False, probe=False).method
        assert int((method.mask() == 0).sum()) == method.input_side() ** 2


def test_on_a_vit_hidden_is_the_stream():
    net, x = vit().double(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    one, two = (
        adapt(net, "svp", num_classes=3, hidden=4, add_to="branch", scale_init=0.5, gen_input=read)
        for read in ("hidden", "sum")
    )
    with torch.no_grad():
        assert torch.equal(one(x), two(x))
