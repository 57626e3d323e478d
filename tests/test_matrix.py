"""MethodContract: what every method must keep on every family of backbones, generated from the registries."""

import copy
import json
import math
import os
import pickle
import re
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from support import GOLDEN
from svp.backbones.checkpoints import save_backbone
from svp.backbones.create import create_backbone
from svp.errors import SvpError
from svp.model import adapt, load
from svp.registry import BACKBONES, METHODS

TINY = {  # family: (name, what makes it small)
    "vim": ("vim_tiny", dict(depth=3, embed_dim=32, d_state=4, patch_size=8, img_size=32, num_classes=7)),
    "vit": ("vit_nano", dict(depth=3, embed_dim=32, num_heads=4, patch_size=8, img_size=32, num_classes=7)),
}
SMALL = {  # options that fit networks this small
    "adapter": dict(hidden=4), "e2vpt": dict(num_tokens=3, kv_tokens=2), "fact": dict(rank=4),
    "insvp": dict(num_tokens=2, hidden=2, kernels=(3, 5), token_kernels=(3, 3, 3)), "lora": dict(rank=4), "sa2vp": dict(hidden=2),
    "sdt": dict(freeze_channels=0.8, freeze_states=0.5), "spt": dict(num_tokens=3), "svp": dict(hidden=8, shared_layers=2),
}  # fmt: skip
ON = {("vit", "partial"): dict(preset="tokens")}  # more of them on one family
REFUSED = {  # a method that cannot act on a family, and a word of its reason
    ("vim", "prefix_tuning"): "take affix", ("vim", "sa2vp"): "attention blocks", ("vit", "additional_scan"): "scans of Vim",
    ("vit", "affix"): "take prefix_tuning", ("vit", "initial_state"): "does not have", ("vit", "sdt"): "scans of Vim",
    ("vit", "state_offset"): "does not have",
}  # fmt: skip
NEUTRAL = (  # these start at the frozen network
    "svp", "linear", "full", "lora", "bitfit", "partial", "repadapter", "fact", "adapter", "sdt", "state_offset",
)  # fmt: skip
NEARLY = ("additional_scan", "initial_state")  # these too, but zeros are added in another order
MERGED = ("linear", "full", "lora", "bitfit", "partial", "repadapter", "fact", "ssf", "sdt", "additional_scan")
PAIRS = [(family, method) for family in TINY for method in sorted(METHODS.entries()) if (family, method) not in REFUSED]

FORMULAS = {  # params_formula of every method, with the options above: s has the sizes, v is 1 on a ViT, else 0
    "adapter": lambda s, v: s.depth * (2 * s.d * 4 + 4 + s.d),
    "additional_scan": lambda s, v: s.k * s.depth * 3 * 6 * s.e,
    "affix": lambda s, v: 3 * s.depth * 2 * s.e,
    "autovp": lambda s, v: 3 * s.side**2 + 1,
    "bitfit": lambda s, v: 11 * s.depth * s.d + 2 * s.d if v else 4 * s.depth * s.e + s.d,
    "damvp": lambda s, v: 12 * s.q * (s.side - s.q),
    "e2vpt": lambda s, v: s.depth * 3 * s.d + v * s.depth * 2 * s.d,
    "fact": lambda s, v: 2 * s.d * 4 + (12 if v else 6) * s.depth * 4 + 4**3,
    "full": lambda s, v: s.all,
    "ilm_vp": lambda s, v: 3 * s.side**2,
    "initial_state": lambda s, v: s.k * s.depth * s.e * s.n,
    "insvp": lambda s, v: (
        2 * s.c * 2 + 2 + s.c + (6 * (3 * 9 + 1) + 3 * (6 * 25 + 1)) + s.depth * 2 * s.d
        + (2 * (3 * 9 + 1) + 6 * (2 * 9 + 1) + math.ceil(2 * s.d / s.patches) * (6 * 9 + 1))
    ),
    "linear": lambda s, v: 0,
    "lora": lambda s, v: s.depth * 2 * 4 * (s.d + s.d) if v else s.depth * 4 * (s.d + s.e),
    "partial": lambda s, v: s.d + (s.patches + 1) * s.d if v else 2 * s.depth * s.e * s.taps,
    "prefix_tuning": lambda s, v: 2 * s.depth * 10 * s.d,
    "prompt_tuning": lambda s, v: 8 * s.d,
    "repadapter": lambda s, v: (2 if v else 1) * s.depth * (s.d * 8 + 8 + s.d * 8 // 2 + s.d),
    "sa2vp": lambda s, v: (s.patches + 1) * 2 + 2 * s.d + s.d + s.depth * (2 * s.d + 2 * s.d * 2 + 2 + s.d),
    "sdt": lambda s, v: s.k * s.depth * (13 * 2 + 2 * s.n * 13),
    "spt": lambda s, v: s.depth * 3 * s.d,
    "ssf": lambda s, v: (
        s.depth * (4 * s.d + 2 * (3 * s.d + s.d + 4 * s.d + s.d)) + 4 * s.d if v
        else s.depth * 2 * (s.d + 2 * s.e + s.d + s.k * (s.r + 2 * s.n + s.e)) + 4 * s.d
    ),
    "state_offset": lambda s, v: s.k * s.depth * s.e * s.n,
    "svp": lambda s, v: s.depth * (2 * s.d * 8 + 8 + s.d) + 2 * (s.d**2 + s.d) + s.depth * s.d + 2 * s.d,
    "vp": lambda s, v: 12 * s.q * (s.side - s.q),
    "vpt": lambda s, v: s.depth * 10 * s.d,
}  # fmt: skip
SIZES = dict(d=32, e=64, n=4, r=2, k=2, taps=4, depth=3, patches=16, c=3 * 8 * 8, side=32, q=round(30 * 32 / 224))


KEYS = (
    GOLDEN / "adapters" / "keys.json"
)  # written by `python tests/test_matrix.py`, when old adapters need not load any more


def backbone(family="vim", **more):
    name, sizes = TINY[family]
    return create_backbone(name, **{**sizes, **more})


def made(family, method, net, **more):
    """The method on the network, small; the probe runs in a test of its own."""
    options = {**SMALL.get(method, {}), **ON.get((family, method), {}), **more}
    return adapt(net, method, num_classes=5, **{"probe": False, **options})


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


def run(model, images):
    """[loss, gradient of every trainable tensor]"""
    loss = F.cross_entropy(model(images), torch.arange(len(images)) % 5)
    return [loss.detach(), *torch.autograd.grad(loss, model.trainable_parameters())]


def keys(model):
    """{name of a saved tensor, block numbers as *: how many there are}"""
    names = [re.sub(r"(?<=[._])\d+(?=[._]|$)", "*", name) for name in model.state_dict()]
    return {name: names.count(name) for name in sorted(set(names))}


@pytest.fixture(scope="module")
def nets():
    """One network of each family for all tests that leave it as it is; that they do is tested at the end."""
    found = {family: backbone(family) for family in TINY}
    frozen = {family: {k: v.clone() for k, v in net.state_dict().items()} for family, net in found.items()}
    yield found
    for family, net in found.items():
        assert all(torch.equal(v, frozen[family][k]) for k, v in net.state_dict().items()), family
        assert all(p.grad is None and p.requires_grad for p in net.parameters()) and not net.training


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_every_family_has_a_tiny_one():
    families = {entry.module for entry in BACKBONES.entries().values() if entry.entry_point is None}
    assert {BACKBONES.get(name).module for name, _ in TINY.values()} == families


@pytest.mark.parametrize("family,method", REFUSED)
def test_what_cannot_act_says_why(nets, family, method):
    with pytest.raises(SvpError, match=f"{method} cannot act on .*{REFUSED[family, method]}"):
        made(family, method, nets[family])


@pytest.mark.parametrize("family,method", PAIRS)
class TestContract:
    def test_every_number_that_trains_acts_and_is_in_the_formula(self, family, method, nets, images):
        net = nets[family]
        model = made(family, method, net, probe=True)  # a tensor without effect is an error
        every = sum(p.numel() for name, p in net.named_parameters() if not name.startswith("head."))
        sizes = SimpleNamespace(**SIZES, all=every)
        assert model.num_trainable() == FORMULAS[method](sizes, family == "vit")
        assert model(images).shape == (4, 5) and model(images[:1]).shape == (1, 5)

    def test_after_two_steps_all_that_trains_has_moved_and_nothing_else(self, family, method, images):
        net = backbone(family)
        frozen = {k: v.clone() for k, v in net.state_dict().items()}
        model = made(family, method, net).train()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        step(model, images, steps=2)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert trained and all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]) != (name in trained), name
        assert all(torch.equal(v, frozen[k]) for k, v in net.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in net.parameters()) and not net.training

    def test_the_loss_falls(self, family, method, nets, images):
        model = made(family, method, nets[family])
        least = 0.1 if model.num_trainable(True) > model.num_trainable() else 0.0  # without a head the steps are small
        assert step(model, images, steps=1) > step(model, images, steps=12) + least

    def test_two_runs_of_one_seed_are_equal(self, family, method, nets, images):
        found = []
        for _ in range(2):
            model = made(family, method, nets[family], seed=3).train()
            torch.manual_seed(7)  # of dropout
            step(model, images)
            found.append(model.state_dict() | {"logits": model.eval()(images).detach()})
        assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())

    def test_saves_and_loads(self, family, method, nets, images, tmp_path):
        model = stir(made(family, method, nets[family], classes=list("abcde"))).eval()
        model.save_pretrained(tmp_path / "adapter")
        again = load(tmp_path / "adapter", nets[family])
        with torch.no_grad():
            assert torch.equal(again(images), model(images))
        assert again.classes == tuple("abcde") and sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
            "README.md", "adapter_config.json", "adapter_model.safetensors",
        ]  # fmt: skip

    def test_a_saved_adapter_keeps_its_names(self, family, method, nets):
        want = json.loads(KEYS.read_text(encoding="utf-8"))[f"{method} on {family}"]
        assert keys(made(family, method, nets[family])) == want, "adapters that are saved today would not load any more"

    def test_another_backbone_is_refused(self, family, method, nets, tmp_path):
        made(family, method, nets[family]).save_pretrained(tmp_path / "adapter")
        with pytest.raises(SvpError, match=f"was trained on {nets[family].name}"):
            load(tmp_path / "adapter", backbone(family, seed=1))

    def test_two_adapters_from_two_threads(self, family, method, nets, images):
        models = [stir(made(family, method, nets[family]), seed).eval() for seed in (1, 2)]
        want = [run(model, images) for model in models]
        wrong = []

        def often(k):
            for _ in range(8):
                if not all(torch.equal(a, b) for a, b in zip(run(models[k], images), want[k], strict=True)):
                    wrong.append(k)

        threads = [threading.Thread(target=often, args=(k,)) for k in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_batches_agree(self, family, method, nets, images):
        model = stir(made(family, method, nets[family])).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(images), torch.cat([model(x[None]) for x in images]))

    def test_disabled_is_the_backbone(self, family, method, nets, images):
        model = stir(made(family, method, nets[family]))
        if method in ("autovp", "ilm_vp"):
            with pytest.raises(SvpError, match="takes pictures prepared for itself"), model.disabled():
                pass
            return
        with model.disabled(), torch.no_grad():
            assert torch.equal(model.features(images), nets[family].features(images))

    def test_copies_and_pickles(self, family, method, nets, images):
        model = stir(made(family, method, nets[family])).eval()
        with torch.no_grad():
            want = model(images)
            assert torch.equal(copy.deepcopy(model)(images), want)
            assert torch.equal(pickle.loads(pickle.dumps(model))(images), want)

    def test_bfloat16_autocast_is_finite_and_near(self, family, method, nets, images):
        model = stir(made(family, method, nets[family])).eval()
        with torch.no_grad():
            want = model(images)
            with torch.autocast("cpu", torch.bfloat16):
                got = model(images)
        assert got.isfinite().all() and (got - want).abs().max() < 0.1 * want.abs().max()
        want = torch.cat([g.flatten() for g in run(model, images)[1:]])
        with torch.autocast("cpu", torch.bfloat16):
            found = run(model, images)[1:]
        assert all(g.dtype == p.dtype for g, p in zip(found, model.trainable_parameters(), strict=True))
        assert (torch.cat([g.flatten() for g in found]) - want).norm() < 0.2 * want.norm()

    def test_checkpointing_gives_the_same_gradients(self, family, method, images):
        net = backbone(family)
        model = stir(made(family, method, net)).eval()  # no dropout
        want = run(model, images)
        net.set_grad_checkpointing()
        for a, b in zip(run(model, images), want, strict=True):
            torch.testing.assert_close(a, b)

    def test_merges_or_says_why_not(self, family, method, nets, images, tmp_path):
        model = stir(made(family, method, nets[family])).eval()
        try:
            net = model.merge()
        except SvpError as err:
            assert method not in MERGED and "cannot be merged" in str(err)
            return
        assert method in MERGED
        with torch.no_grad():
            torch.testing.assert_close(net.eval()(images), model(images), atol=1e-5, rtol=1e-5)
        assert net.preprocessing == model.preprocessing
        save_backbone(net, tmp_path / "merged.safetensors")  # filled bias slots and more states are read back too
        name, sizes = TINY[family]
        sizes = {key: value for key, value in sizes.items() if key not in ("d_state", "num_classes")}
        again = create_backbone(name, weights=tmp_path / "merged.safetensors", **sizes)
        with torch.no_grad():
            torch.testing.assert_close(again(images), net(images))

    def test_other_picture_sizes_and_double_precision(self, family, method):
        square = method in ("autovp", "ilm_vp")  # a frame is drawn around a square
        size = (48, 48) if square else (48, 32)
        model = stir(made(family, method, backbone(family, img_size=size))).eval()
        images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            fast, out = model(images), model.double()(images.double())
        assert out.shape == (1, 5) and out.dtype == torch.float64
        torch.testing.assert_close(fast.double(), out, rtol=1e-4, atol=1e-4)
        assert next(model.backbone.parameters()).dtype == torch.float64

    def test_without_gradients_nothing_is_kept(self, family, method, nets, images):
        with torch.no_grad():
            assert made(family, method, nets[family])(images).grad_fn is None


@pytest.mark.parametrize("family,method", PAIRS)
def test_the_defaults_act_on_the_small_networks_that_ship(family, method):
    net = create_backbone({"vim": "vim_nano", "vit": "vit_nano"}[family], depth=3, img_size=32)
    model = adapt(net, method, num_classes=5, **ON.get((family, method), {}))  # ends with the effect probe
    pictures = torch.randn(2, 3, *model.preprocessing.crop, generator=torch.Generator().manual_seed(0))
    F.cross_entropy(model(pictures), torch.tensor([0, 4])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.trainable_parameters())


VIM = [method for family, method in PAIRS if family == "vim"]  # a ViT has no op of ours


@pytest.mark.parametrize("method", VIM)
def test_every_kernel_path_acts_alike(isa, method, images, tmp_path):
    """Outputs and all gradients of the compiled op, at each level of this machine, are those of the reference; and saved, loaded
    and merged it acts the same."""
    net = backbone()
    model = stir(made("vim", method, net)).eval()
    model.save_pretrained(tmp_path / "adapter")
    net.kernel = "reference"
    want = run(model, images)
    net.kernel = "cpu"
    for a, b in zip(run(model, images), want, strict=True):
        assert (a - b).abs().max() <= 2e-4 * b.abs().max() + 1e-7
    with torch.no_grad():
        logits = model(images)
        assert torch.equal(load(tmp_path / "adapter", net)(images), logits)
        if method in MERGED:
            torch.testing.assert_close(model.merge().eval()(images), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family,method", [pair for pair in PAIRS if pair[1] in NEUTRAL + NEARLY])
def test_starts_at_the_frozen_network(family, method, nets, images):
    with torch.no_grad():
        linear, other = (made(family, name, nets[family]) for name in ("linear", method))
        whole = other.method.acts("branch")  # then the last block computes all tokens, and rounds otherwise
        near = 1e-6 if whole or method in NEARLY else 0
        torch.testing.assert_close(other(images), linear(images), rtol=0, atol=near)


LOADS = """
import sys, torch, svp
from pathlib import Path
torch.set_num_threads(1)
folder = Path(sys.argv[1])
images = torch.load(folder / "images.pt")
with torch.no_grad():
    torch.save({p.name: svp.load(p)(images) for p in sorted(folder.iterdir()) if p.is_dir()}, folder / "logits.pt")
"""


@pytest.mark.parametrize("family", TINY)
def test_another_process_loads_what_this_one_saved(family, nets, images, tmp_path):
    torch.save(images, tmp_path / "images.pt")
    want = {}
    for method in [method for other, method in PAIRS if other == family]:
        model = stir(made(family, method, nets[family])).eval()
        model.save_pretrained(tmp_path / method)
        with torch.no_grad():
            want[method] = model(images)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", LOADS, tmp_path], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "logits.pt")
    assert found.keys() == want.keys() and all(torch.equal(found[method], t) for method, t in want.items())


@pytest.mark.parametrize("method", [m for m in NEUTRAL if m != "linear"])
def test_a_zero_start_is_the_linear_probe_bit_for_bit(isa, method):
    """On the fast kernel at every level, however torch is asked to remember: the first step starts from equal logits.

    But for the last block's rounding, where a method needs all its tokens and the linear probe does not.
    """
    net = backbone(embed_dim=48, img_size=64)  # wider than a panel of the kernel, an odd count of tokens
    net.kernel = "cpu"
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    linear, other = made("vim", "linear", net), made("vim", method, net)
    for training in (False, True):
        want, got = linear.train(training)(images), other.train(training)(images)
        with torch.no_grad():
            assert torch.equal(other(images), got) and torch.equal(linear(images), want)
        whole = other.method.acts("branch")
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6 if whole else 0)


if __name__ == "__main__":
    found = {f"{method} on {family}": keys(made(family, method, backbone(family))) for family, method in PAIRS}
    KEYS.parent.mkdir(exist_ok=True)
    KEYS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
