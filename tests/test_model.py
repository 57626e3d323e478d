"""AdaptedModel: composition, counts, options, the probe; what every method must keep is in test_matrix.py."""

import inspect
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import svp.model.adapting
from svp.backbones.checkpoints import save_backbone
from svp.backbones.create import create_backbone
from svp.errors import SvpError
from svp.methods.base import Method
from svp.model import adapt, load, read_json
from svp.registry import NO_OVERRIDES
from svp.training.evaluate import evaluate
from svp.training.loop import fit
from svp.training.trained import read_trained
from test_matrix import backbone, step, stir
from test_matrix import made as small


def made(method, net=None, **more):
    return small("vim", method, net or backbone(), probe=True, **more)


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_adapters_of_several_methods_train_from_threads_as_they_do_alone(images):
    """AdamW steps of three methods on one backbone, one after the other and all at once."""
    net = backbone()
    frozen = {k: v.clone() for k, v in net.state_dict().items()}
    methods = ("svp", "lora", "full")
    # made one after the other: start values come from torch's global generator, which all threads share
    alone, together = ({method: made(method, net).train() for method in methods} for _ in range(2))
    for method in methods:
        step(alone[method], images, steps=4)
    threads = [threading.Thread(target=step, args=(together[method], images, 4)) for method in methods]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for method in methods:
        want = alone[method].state_dict()
        assert all(torch.equal(t, want[name]) for name, t in together[method].state_dict().items()), method
    assert all(torch.equal(v, frozen[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters()) and not net.training


def test_the_model_shows_method_and_head_alone():
    model = made("svp")
    assert all(name.startswith(("method.", "head.")) for name, _ in model.named_parameters())
    assert model.num_trainable(head=True) - model.num_trainable() == 32 * 5 + 5


COUNTS = [  # (hidden, shared_layers): the released definition on Vim-S, heads not counted (specification table)
    (64, 8, 1_644_288), (64, 4, 2_088_960), (64, 12, 1_496_064), (32, 12, 905_472), (128, 6, 2_973_696), (8, 24, 314_304),
]  # fmt: skip


@pytest.fixture(scope="module")
def vim_small():
    return create_backbone("vim_small")


@pytest.mark.parametrize("hidden,shared,count", COUNTS)
def test_counts_of_the_paper(vim_small, hidden, shared, count):
    model = adapt(vim_small, "svp", num_classes=2, hidden=hidden, shared_layers=shared, probe=False)
    assert model.num_trainable() == count
    assert sum(p.numel() for p in vim_small.parameters()) == 25_796_584


def test_lora_counts_of_the_paper(vim_small):
    for targets, rank, count in [
        ("X", 64, 1_769_472),
        ("out_proj", 96, 2_654_208),
        ("B", 64, 2_408_448),
        ("dt", 64, 2_433_024),
    ]:
        model = adapt(vim_small, "lora", num_classes=2, rank=rank, targets=(targets,), probe=False)
        assert model.num_trainable() == count, targets


def test_composition_is_one_model(images):
    model = adapt(backbone(), ["svp", ("lora", {"rank": 4})], num_classes=5)
    assert model.method_name == "svp+lora"
    step(stir(model), images)


def test_lora_with_dropout_acts_beside_the_layer(images):
    net = backbone()
    plain = stir(made("lora", net, targets=("X", "Z", "out_proj"))).eval()
    dropped = made("lora", net, targets=("X", "Z", "out_proj"), dropout=0.5)
    dropped.load_state_dict(plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(dropped.eval()(images), plain(images))
        assert not torch.allclose(dropped.train()(images), plain(images))


SWITCHES = [
    dict(preset="published"), dict(preset="literal"), dict(cross=False), dict(inner=False), dict(gen_input="sum"),
    dict(gen_input="normed"), dict(add_to="branch", gen_input="normed"), dict(add_to="branch", gen_input="sum", prompt_cls=True),
    dict(cross_kind="bottleneck"), dict(cross_kind="bottleneck", cross_hidden=3), dict(hidden="relative"),
    dict(inner_mid_act="gelu"), dict(inner_act="relu", cross_act="gelu"), dict(bias=False), dict(shared_layers=100),
    dict(cross_scale="layer"), dict(scale_init=0.1), dict(scale_kind="scalar"), dict(scale_kind="none"), dict(prompt_cls=True),
    dict(layers=(0, 2)), dict(dropout=0.5), dict(input_filter="simam"), dict(generator_init="zero_up", scale_init=0.1),
    dict(generator_init="trunc02"),
]  # fmt: skip


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_every_switch_of_svp_trains_and_is_saved(switch, images, tmp_path):
    net = backbone()
    model = adapt(net, "svp", num_classes=5, **{"hidden": 8, "shared_layers": 2, **switch})
    step(stir(model).train(), images)
    model.eval().save_pretrained(tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "a", net)(images), model(images))


BAD = [
    (dict(hiden=3), "no option of method svp named 'hiden'", "hidden"),
    (dict(hidden=0), "at least 1", ""),
    (dict(hidden="wide"), "expected integer or one of relative", ""),
    (dict(layers=(7,)), "layer 7 is out of range", ""),
    (dict(preset="papr"), "no preset 'papr'", "paper"),
    (dict(add_to="branch"), 'needs gen_input "sum" or "normed"', ""),
    (dict(dropout=float("nan")), "finite", ""),
]


@pytest.mark.parametrize("options,problem,hint", BAD, ids=str)
def test_bad_options_get_a_sentence(options, problem, hint):
    with pytest.raises(SvpError) as err:
        adapt(backbone(), "svp", num_classes=5, **options)
    assert problem in err.value.problem and hint in err.value.hint and err.value.kind == "usage"


def test_an_odd_number_of_patches_has_no_halves():
    with pytest.raises(SvpError, match="even number of patches"):
        adapt(backbone(img_size=24), "svp", num_classes=5, preset="published")


class Dead(Method):
    """Trains one tensor that nothing reads, and one whose gradient is cut."""

    def __init__(self, site, opt, num_classes):
        super().__init__(site, opt, num_classes)
        self.unread = nn.Parameter(torch.ones(3))
        self.cut = nn.Parameter(torch.ones(1))

    def network(self, images, run):
        return run(images * self.cut.detach())[0]


def test_the_probe_names_what_has_no_effect(monkeypatch):
    monkeypatch.setattr(svp.model.adapting, "method_class", lambda name: Dead)
    with pytest.raises(SvpError, match=r"2 tensors without any effect: method\.unread, method\.cut"):
        adapt(backbone(), "dead", num_classes=5)


def test_the_probe_leaves_no_trace():
    net = backbone()
    state = torch.get_rng_state()
    a, b = adapt(net, "svp", num_classes=5), adapt(net, "svp", num_classes=5, probe=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(a.parameters(), b.parameters(), strict=True))


INPUTS = [
    (torch.zeros(3, 32, 32), "expected (b, 3, 32, 32)"),
    (torch.zeros(1, 32, 32, 3), "expected (b, 3, 32, 32)"),
    (torch.zeros(1, 1, 32, 32), "expected (b, 3, 32, 32)"),
    (torch.zeros(1, 3, 64, 64), "64 x 64 pixels"),
    (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "uint8"),
    ([1, 2], "list"),
]


@pytest.mark.parametrize("bad,problem", INPUTS, ids=str)
def test_a_tensor_of_the_wrong_form_gets_a_sentence(bad, problem):
    with pytest.raises(SvpError) as err:
        made("linear")(bad)
    assert problem in str(err.value)


@pytest.mark.parametrize("method", ["svp", "lora", "vpt"])
def test_a_training_step_compiles_whole(method, images):
    model = stir(made(method)).eval()  # no dropout

    def gradients(forward):
        model.zero_grad()
        forward(images).square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    want = gradients(model)
    assert want
    for got, grad in zip(gradients(torch.compile(model, fullgraph=True, backend="aot_eager")), want, strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-5)


# -- what an adapter and its backbone must agree on --------------------------------------------------------------------


def test_how_positions_were_resized_is_kept(tmp_path):
    save_backbone(create_backbone("vim_nano", depth=2), tmp_path / "net.safetensors")

    def network(way, size=96):
        return create_backbone("vim_nano", depth=2, weights=tmp_path / "net.safetensors", img_size=size, pos_resize=way)

    model, images = adapt(network("repo"), "linear", num_classes=3), torch.randn(1, 3, 96, 96)
    model.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        want = model.eval()(images)
        assert torch.equal(load(tmp_path / "a")(images), want)
        assert torch.equal(read_trained(tmp_path / "a").model()(images), want)
    with pytest.raises(SvpError, match='with positions resized by "repo", those of this backbone are by "middle"'):
        load(tmp_path / "a", network("middle"))
    with pytest.raises(SvpError, match="on pictures of 96 x 96 pixels, this backbone takes 64 x 64"):
        load(tmp_path / "a", network("repo", 64))
    with pytest.raises(SvpError, match="bfloat16 rounds them") as err:
        load(tmp_path / "a", network("repo").bfloat16())
    assert "load first" in err.value.hint


def test_the_option_head_and_the_keyword_head():
    net = backbone()
    with pytest.raises(SvpError) as err:
        adapt(net, "vp", num_classes=5, head="source")
    assert err.value.hint == '("vp", {"head": "source"}) is the option of vp'
    with pytest.raises(SvpError, match="ilm_vp brings a head of its own, beside which head 'two_linear' has no place"):
        adapt(create_backbone("vim_nano", depth=2), "ilm_vp", num_classes=5, head="two_linear")


def test_a_head_of_ones_own(images, tmp_path):
    net = backbone()
    head = nn.Sequential(nn.Linear(32, 9), nn.ReLU(), nn.Linear(9, 5))
    model = adapt(net, "svp", num_classes=5, head=head, hidden=8).eval()
    torch.testing.assert_close(model(images), head(model.features(images)))
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(SvpError, match="saved with a head module of its own"):
        load(tmp_path / "a", net)


@pytest.mark.parametrize(
    "methods,words",
    [
        (["ilm_vp", "autovp"], "ilm_vp and autovp both bring a head of their own"),
        ([("damvp", {"head": "features"}), ("vp", {"head": "source"})], "damvp and vp both bring a head of their own"),
    ],
    ids=str,
)
def test_two_heads_are_refused(methods, words):
    with pytest.raises(SvpError, match=words) as err:
        adapt(backbone(), methods, num_classes=5)
    assert err.value.kind == "usage"


def test_two_that_train_in_phases_of_their_own_are_refused():
    model = adapt(backbone(), ["sdt", ("spt", dict(num_tokens=3))], num_classes=5)
    with pytest.raises(SvpError, match="sdt and spt both train in phases of their own"):
        model.method.phases(None)


@pytest.mark.parametrize("key", ["trust_pickle", "weights", "kernel", "seed", "name", "img_size", "pos_resize"])
def test_a_file_does_not_choose_what_is_trusted(key, tmp_path, images):
    """An adapter of a stranger beside a pickle of a stranger."""

    class Bomb:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    made("bitfit").save_pretrained(tmp_path / "a")
    torch.save({"model": Bomb()}, tmp_path / "a" / "backbone.pth")
    config = read_json(tmp_path / "a" / "adapter_config.json")
    config["backbone"]["overrides"][key] = True
    config["backbone"]["weights"] = "backbone.pth"
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(SvpError, match=f"the field 'backbone.overrides.{key}' is missing or wrong"):
        load(tmp_path / "a")
    assert not (tmp_path / "ran").exists()


def test_reserved_words_are_those_of_create_backbone():
    own = inspect.signature(create_backbone).parameters
    assert set(NO_OVERRIDES) == {name for name, p in own.items() if p.kind is not p.VAR_KEYWORD}


@pytest.mark.parametrize(
    "field,value", [("interpolation", "foo"), ("resize", -1), ("crop", [0, 16]), ("crop", [16.5, 16])]
)
def test_a_preprocessing_that_is_none_gets_a_sentence(field, value, tmp_path):
    made("bitfit").save_pretrained(tmp_path / "a")
    config = read_json(tmp_path / "a" / "adapter_config.json")
    config["preprocessing"][field] = value
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(SvpError, match=f"preprocessing.*{field}"):
        load(tmp_path / "a")


def test_the_working_directory_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", ".."):
        with pytest.raises(SvpError, match="is the working directory"):
            made("bitfit").save_pretrained(name)
    assert Path.cwd() == tmp_path / "here"


def test_a_gpu_that_nobody_has_used_is_not_seeded_for_later():
    torch.cuda._queued_calls.clear()
    made("svp", hidden=4)
    assert not torch.cuda._queued_calls


def test_adapt_leaves_the_generators_alone():
    before = torch.random.get_rng_state()
    adapt(create_backbone("vim_nano", depth=2), ("vp", dict(preset="published", kind="random_patch")), num_classes=5)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_prompts_in_a_branch_enter_what_mixes_tokens_alone():
    net = create_backbone("vit_nano", depth=2, img_size=32)
    model = adapt(net, ("svp", dict(add_to="branch", gen_input="normed", hidden=4)), num_classes=3)
    images, prompted = torch.randn(1, 3, 32, 32), []
    prompt = model.method.prompt
    model.method.prompt = lambda x, i: prompted.append(i) or prompt(x, i)
    model(images)
    assert prompted == [0, 1]


def test_clusters_are_those_of_the_network_alone():
    net = create_backbone("vit_nano", depth=2, img_size=32)
    model = stir(adapt(net, [("damvp", dict(clusters=3)), "lora"], num_classes=3)).eval()
    images = torch.randn(4, 3, 32, 32)
    chosen, nearest = [], model.method.parts["damvp"].nearest
    model.method.parts["damvp"].nearest = lambda feature: chosen.append(feature) or nearest(feature)
    with torch.no_grad():
        model(images)
        assert torch.equal(chosen[0], net.features(images))


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta")
def test_loading_leaves_the_given_backbone_where_it_is(tmp_path):
    net = backbone()
    made("svp", net).save_pretrained(tmp_path / "a")
    net.to("meta")
    before = net.fingerprint
    net.fingerprint = lambda: read_json(tmp_path / "a" / "adapter_config.json")["backbone"]["fingerprint"]
    try:
        assert next(load(tmp_path / "a", net).backbone.parameters()).device.type == "meta"
    finally:
        net.fingerprint = before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_adapter_of_another_precision_is_read_back(dtype, tmp_path, images):
    net = create_backbone("vim_tiny", depth=2, embed_dim=32, d_state=4, patch_size=8, img_size=32).to(dtype)
    model = stir(adapt(net, "svp", num_classes=5, hidden=8)).eval()
    model.save_pretrained(tmp_path / "a")
    again = load(tmp_path / "a")
    assert next(again.parameters()).dtype == dtype
    with torch.no_grad():
        assert torch.equal(again(images.to(dtype)), model(images.to(dtype)))


def test_a_method_of_weights_is_counted_on_the_meta_device():
    model = adapt(backbone(), "lora", num_classes=5, rank=4).to("meta")
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 5)


@pytest.mark.parametrize("keywords,words", [(dict(pos_resize="Repo"), "pos_resize 'Repo'"), (dict(deph=3), "deph")])
def test_what_a_backbone_does_not_know_is_wrong_usage(keywords, words):
    for name in ("vim_nano", "vit_nano"):
        with pytest.raises(SvpError, match=words) as err:
            create_backbone(name, weights="default", **keywords)
        assert err.value.kind == "usage"


def test_class_names_are_as_many_as_logits(tmp_path):
    model = made("linear")
    with pytest.raises(SvpError, match="2 class names were given for num_classes 5"):
        model.classes = ["a", "b"]
    assert model.classes is None
    model.classes = list("abcde")
    assert model.classes == tuple("abcde")


def test_what_cannot_be_written_leaves_the_old_adapter(tmp_path, monkeypatch):
    model, place = made("linear"), tmp_path / "adapter"
    model.save_pretrained(place)
    before = {p.name: p.read_bytes() for p in place.iterdir()}
    rename = Path.rename

    def fails(self, target):
        if target == place and "-old-" not in self.name:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(SvpError, match="adapter cannot be written: No space left on device"):
        model.save_pretrained(place)
    assert {p.name: p.read_bytes() for p in place.iterdir()} == before and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SvpError, match="file cannot be written"):
        model.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_random_weights_are_drawn_again(tmp_path, images):
    net = create_backbone("vim_tiny", depth=2, embed_dim=32, d_state=4, patch_size=8, img_size=32)
    model = adapt(net, "linear", num_classes=5).eval()
    model.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "a")(images), model(images))
        net.norm_f.weight *= 2
    adapt(net, "linear", num_classes=5).save_pretrained(tmp_path / "b")
    with pytest.raises(SvpError, match="was trained on vim_tiny") as err:
        load(tmp_path / "b")
    assert err.value.hint == "give the backbone it was trained on with backbone="


def test_a_backbone_of_another_seed_is_drawn_again(tmp_path, images):
    net = create_backbone("vim_tiny", depth=1, embed_dim=16, d_state=4, patch_size=8, img_size=32, seed=3)
    model = adapt(net, "linear", num_classes=3)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(images), model.eval()(images))


def test_numbers_of_numpy_are_numbers(images):
    net = create_backbone(
        "vim_tiny", depth=np.int64(1), embed_dim=16, d_state=4, patch_size=8, img_size=np.int64(32), seed=np.int64(0)
    )
    model = adapt(net, "lora", num_classes=np.int64(3), rank=np.int64(2), scale=np.float32(0.5))
    assert model.method.opt.rank == 2 and model(images).shape == (4, 3)


def test_a_backbone_keeps_its_mode():
    net = backbone().train()
    adapt(net, "linear", num_classes=3)
    assert net.training and not adapt(net, "bitfit", num_classes=3).merge().training


@pytest.mark.parametrize("count", [True, 1, 0, "3", 2.0, None])
def test_a_count_of_classes_that_is_none(count):
    with pytest.raises(SvpError, match="expected an integer from 2"):
        adapt(backbone(), "linear", num_classes=count)


def test_wrong_things_at_the_doors_get_a_sentence(tmp_path):
    with pytest.raises(SvpError, match="backbone is vim_nano, expected a backbone"):
        adapt("vim_nano", "svp", num_classes=3)
    with pytest.raises(SvpError, match="backbone is Linear, expected a backbone"):
        adapt(nn.Linear(2, 2), "svp", num_classes=3)
    for call in (fit, evaluate):
        with pytest.raises(SvpError, match="model is Vim, expected an adapted model"):
            call(backbone(), "digits")
        with pytest.raises(SvpError, match="model is the path runs/a") as err:
            call("runs/a", "digits")
        assert err.value.hint == "svp.load('runs/a')"


def test_a_head_of_other_outputs_is_refused():
    with pytest.raises(SvpError, match=r"the head makes \(2, 7\) of \(2, 32\) features, expected \(2, 2\)"):
        adapt(backbone(), "linear", num_classes=2, head=nn.Linear(32, 7))
    with pytest.raises(SvpError, match=r"the head does not take \(2, 32\) features: mat1"):
        adapt(backbone(), "linear", num_classes=2, head=nn.Linear(16, 2))


BAD_KEYWORDS = [
    ("vim_tiny", dict(cls_token="foo"), "cls_token of vim_tiny"), ("vim_tiny", dict(scan_type="v3"), "scan_type of vim_tiny"),
    ("vim_tiny", dict(num_classes=-1), "num_classes of vim_tiny is -1"), ("vim_tiny", dict(img_size=(1, 2, 3)), "img_size is"),
    ("vim_tiny", dict(img_size=32.0), "img_size is 32.0"), ("vim_tiny", dict(img_size="32"), "img_size is '32'"),
    ("vit_nano", dict(num_heads=7), "vit_nano: "), ("vit_nano", dict(img_size=70), "patches of 8 with stride 8 do not fill it"),
]  # fmt: skip


@pytest.mark.parametrize("name,keywords,words", BAD_KEYWORDS, ids=str)
def test_keywords_of_a_backbone_that_are_wrong(name, keywords, words):
    with pytest.raises(SvpError, match=words) as err:
        create_backbone(name, **keywords)
    assert err.value.kind == "usage"
