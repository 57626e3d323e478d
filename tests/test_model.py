"""AdaptedModel: what every method must keep on every backbone, generated from the registry."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import svp.model
from svp.backbones.create import create_backbone
from svp.errors import SvpError
from svp.methods.base import Method
from svp.model import adapt, load
from svp.registry import METHODS

TINY = {"vim_tiny": dict(depth=3, embed_dim=32, d_state=4, patch_size=8, img_size=32, num_classes=7)}
SMALL = {  # options that fit a network this small
    "svp": dict(hidden=8, shared_layers=2), "lora": dict(rank=4), "sdt": dict(freeze_channels=0.8, freeze_states=0.5),
}  # fmt: skip
NEUTRAL = (  # these start at the frozen network
    "svp", "linear", "full", "lora", "bitfit", "partial", "repadapter", "fact", "adapter", "sdt", "state_offset",
)  # fmt: skip
MERGED = ("linear", "full", "lora", "bitfit", "partial", "repadapter", "fact", "ssf", "sdt", "additional_scan")
ALL = sorted(METHODS.entries())


def backbone(name="vim_tiny", **more):
    return create_backbone(name, **{**TINY[name], **more})


def made(method, net=None, **more):
    try:
        return adapt(net or backbone(), method, num_classes=5, **{**SMALL.get(method, {}), **more})
    except SvpError as err:
        if "cannot act on" not in err.problem:
            raise
        pytest.skip(err.problem)


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def stir(model, seed=1):
    """Trained-looking values: zero starts hide what a method does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator).to(p)
    return model


def step(model, images, steps=2):
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2, weight_decay=0.0)  # gradients alone move
    for _ in range(steps):
        loss = F.cross_entropy(model(images), torch.arange(len(images)) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        last = loss.item()
    return last


@pytest.mark.parametrize("method", ALL)
class TestContract:
    def test_starts_at_the_frozen_network(self, method, images):
        if method not in NEUTRAL:
            pytest.skip(f"{method} is documented to start elsewhere")
        net = backbone()
        with torch.no_grad():
            linear, other = made("linear", net), made(method, net)
            whole = other.method.acts("branch")  # then the last block computes all tokens, and rounds otherwise
            torch.testing.assert_close(other(images), linear(images), rtol=0, atol=1e-6 if whole else 0)

    def test_after_two_steps_all_that_trains_has_moved_and_nothing_else(self, method, images):
        net = backbone()
        frozen = {k: v.clone() for k, v in net.state_dict().items()}
        model = made(method, net).train()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        step(model, images, steps=2)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]) != (name in trained), name
        assert all(torch.equal(v, frozen[k]) for k, v in net.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in net.parameters()) and not net.training

    def test_the_loss_falls(self, method, images):
        model = made(method)
        least = 0.1 if model.num_trainable(True) > model.num_trainable() else 0.0  # without a head the steps are small
        assert step(model, images, steps=1) > step(model, images, steps=12) + least

    def test_saves_and_loads(self, method, images, tmp_path):
        net = backbone()
        model = stir(made(method, net, classes=list("abcde"))).eval()
        model.save_pretrained(tmp_path / "adapter")
        again = load(tmp_path / "adapter", net)
        with torch.no_grad():
            assert torch.equal(again(images), model(images))
        assert again.classes == tuple("abcde") and sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
            "README.md", "adapter_config.json", "adapter_model.safetensors",
        ]  # fmt: skip

    def test_another_backbone_is_refused(self, method, tmp_path):
        made(method).save_pretrained(tmp_path / "adapter")
        with pytest.raises(SvpError, match="was trained on vim_tiny"):
            load(tmp_path / "adapter", backbone(seed=1))

    def test_two_adapters_from_two_threads(self, method, images):
        net = backbone()
        models = [stir(made(method, net), seed).eval() for seed in (1, 2)]
        frozen = {k: v.clone() for k, v in net.state_dict().items()}

        def run(model):
            loss = F.cross_entropy(model(images), torch.arange(4) % 5)
            grads = torch.autograd.grad(loss, model.trainable_parameters())
            return [loss.detach(), *grads]

        want = [run(model) for model in models]
        wrong = []

        def often(k):
            for _ in range(8):
                if not all(torch.equal(a, b) for a, b in zip(run(models[k]), want[k], strict=True)):
                    wrong.append(k)

        threads = [threading.Thread(target=often, args=(k,)) for k in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert all(torch.equal(v, frozen[k]) for k, v in net.state_dict().items())

    def test_batches_agree(self, method, images):
        model = stir(made(method)).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(images), torch.cat([model(x[None]) for x in images]))

    def test_disabled_is_the_backbone(self, method, images):
        net = backbone()
        model = stir(made(method, net))
        with model.disabled(), torch.no_grad():
            assert torch.equal(model.features(images), net.features(images))

    def test_copies_and_pickles(self, method, images):
        model = stir(made(method)).eval()
        with torch.no_grad():
            want = model(images)
            assert torch.equal(copy.deepcopy(model)(images), want)
            assert torch.equal(pickle.loads(pickle.dumps(model))(images), want)

    def test_bfloat16_autocast_is_finite_and_near(self, method, images):
        model = stir(made(method)).eval()
        with torch.no_grad():
            want = model(images)
            with torch.autocast("cpu", torch.bfloat16):
                got = model(images)
        assert got.isfinite().all() and (got - want).abs().max() < 0.1 * want.abs().max()

    def test_checkpointing_gives_the_same_gradients(self, method, images):
        net = backbone()
        model = stir(made(method, net)).eval()  # no dropout

        def grads():
            loss = F.cross_entropy(model(images), torch.arange(4) % 5)
            return torch.autograd.grad(loss, model.trainable_parameters())

        want = grads()
        net.set_grad_checkpointing()
        for a, b in zip(grads(), want, strict=True):
            torch.testing.assert_close(a, b)

    def test_merges_or_says_why_not(self, method, images):
        model = stir(made(method)).eval()
        try:
            net = model.merge()
        except SvpError as err:
            assert method not in MERGED and "cannot be merged" in str(err)
            return
        with torch.no_grad():
            torch.testing.assert_close(net.eval()(images), model(images), atol=1e-5, rtol=1e-5)

    def test_other_picture_sizes_and_double_precision(self, method):
        model = stir(made(method, backbone(img_size=(48, 32)))).double()
        out = model(torch.randn(1, 3, 48, 32, dtype=torch.float64))
        assert out.shape == (1, 5) and out.dtype == torch.float64
        assert next(model.backbone.parameters()).dtype == torch.float64

    def test_without_gradients_nothing_is_kept(self, method, images):
        with torch.no_grad():
            assert made(method)(images).grad_fn is None


@pytest.mark.parametrize("method", [m for m in NEUTRAL if m != "linear"])
def test_a_zero_start_is_the_linear_probe_bit_for_bit(isa, method):
    """On the fast kernel at every level, however torch is asked to remember: the first step starts from equal logits.

    But for the last block's rounding, where a method needs all its tokens and the linear probe does not.
    """
    net = backbone(embed_dim=48, img_size=64)  # wider than a panel of the kernel, an odd count of tokens
    net.kernel = "cpu"
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    linear, other = made("linear", net), made(method, net)
    for training in (False, True):
        want, got = linear.train(training)(images), other.train(training)(images)
        with torch.no_grad():
            assert torch.equal(other(images), got) and torch.equal(linear(images), want)
        whole = other.method.acts("branch")
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6 if whole else 0)


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
    dict(layers=(0, 2)), dict(dropout=0.5), dict(input_filter="simam"), dict(generator_init="zero_up"),
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
    monkeypatch.setattr(svp.model, "method_class", lambda name: Dead)
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
