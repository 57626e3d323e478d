"""Plug-ins are found by file name and entry point, and nothing is imported to list them."""

import importlib
import json
import os
import subprocess
import sys

import pytest

from svp import registry
from svp.backbones.checkpoints import save_backbone
from svp.backbones.create import create_backbone
from svp.errors import SvpError
from svp.methods.base import Method
from svp.model import adapt
from svp.registry import BACKBONES, METHODS, Entry, Room, list_backbones, list_methods, method_class


class Point:
    """An entry point of somebody else's package."""

    def __init__(self, name, value, thing=None):
        self.name, self.value, self.thing = name, value, thing

    def load(self):
        return self.thing


@pytest.fixture
def point(monkeypatch):
    """point(name, value, thing): the only entry point that is installed."""

    def installed(*args):
        registry._entries.cache_clear()
        monkeypatch.setattr(
            "importlib.metadata.entry_points", lambda group: [Point(*args)] if group == "svp.methods" else []
        )

    yield installed
    monkeypatch.undo()
    registry._entries.cache_clear()


def test_every_file_is_a_method_with_a_summary():
    assert {"svp", "linear", "full", "lora"} <= set(list_methods())
    for name, entry in METHODS.entries().items():
        assert entry.summary and not entry.summary.endswith(":"), name
        cls = method_class(name)
        assert issubclass(cls, Method) and cls.__doc__ and cls.paper and cls.params_formula, name


def test_every_variant_is_a_backbone():
    names = list_backbones()
    assert {"vim_tiny", "vim_small", "vim_base", "vim_tiny_64", "vim_nano"} <= set(names)
    for name, entry in BACKBONES.entries().items():
        assert entry.summary, name
        family = entry.module.rpartition(".")[2]  # a ViT is named as timm names it
        assert name.startswith((family, "deit") if family == "vit" else family), name
        assert name in entry.load().VARIANTS


def test_wildcards():
    assert list_backbones("vim_tiny*") == [name for name in list_backbones() if name.startswith("vim_tiny")]
    assert list_methods("nothing*") == []


def test_listing_loads_no_torch():
    code = (
        "import sys; from svp.registry import list_methods, list_backbones; list_methods(), list_backbones();"
        "print('torch' in sys.modules, any(m.startswith('svp.methods.') for m in sys.modules))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("room,near", [(METHODS, "lora"), (BACKBONES, "vim_tiny")])
def test_a_mistyped_name_is_wrong_usage(room, near):
    with pytest.raises(SvpError) as err:
        room.get(near + "x")
    assert near in err.value.hint and f"svp list {room.folder}" in err.value.hint and err.value.exit_code == 2


def test_an_entry_point_brings_a_method(point):
    class Mine(Method):
        pass

    point("mine", "mine_package.method:Mine", Mine)
    assert "mine" in list_methods() and method_class("mine") is Mine
    assert METHODS.get("mine").summary == "from mine_package.method:Mine"


def test_an_entry_point_that_cannot_be_loaded_is_not_our_mistake(point, monkeypatch):
    point("broken", "json:Nope")
    monkeypatch.setattr(Point, "load", lambda self: json.Nope)
    with pytest.raises(SvpError, match=r"the plug-in broken \(json:Nope\) cannot be loaded: AttributeError") as err:
        method_class("broken")
    assert err.value.kind == "env"


def test_an_entry_point_may_not_take_a_name_of_ours(point):
    point("svp", "mine_package.method:Mine")
    with pytest.raises(SvpError, match=r"the method 'svp' of mine_package\.method:Mine has the name of a built-in one"):
        list_methods()


def test_an_entry_point_brings_a_backbone(monkeypatch, tmp_path):
    """Sizes and a subclass are enough: weights from a file load, and none are published."""
    (tmp_path / "my_net.py").write_text(
        "from svp.backbones import vim\n"
        "VARIANTS = {'my_net': dict(embed_dim=16, depth=2, d_state=4, patch_size=4, img_size=16, num_classes=3)}\n"
        "class Mine(vim.Vim):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("my_net")
    monkeypatch.setattr(
        "importlib.metadata.entry_points",
        lambda group: [Point("my_net", "my_net", module)] if group == "svp.backbones" else [],
    )
    registry._entries.cache_clear()
    try:
        net = create_backbone("my_net", seed=1)
        save_backbone(net, tmp_path / "net.safetensors")
        again = create_backbone("my_net", weights=tmp_path / "net.safetensors")
        assert again.fingerprint() == net.fingerprint() and type(again) is module.Mine
        with pytest.raises(SvpError, match="no weights ship with my_net and none are published"):
            create_backbone("my_net", weights="default")
        assert adapt(again, "svp", num_classes=2, hidden=4).num_trainable() > 0
    finally:
        monkeypatch.undo()
        registry._entries.cache_clear()


def test_a_file_without_variants_brings_none(tmp_path, monkeypatch):
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys" / "plain.py").write_text('"""Nothing here."""\nX = 1\n')
    (tmp_path / "toys" / "car.py").write_text('"""Cars."""\nVARIANTS: dict = {"car_red": {}, **{}}\n')
    (tmp_path / "toys" / "_own.py").write_text("VARIANTS = {'hidden': {}}\n")
    monkeypatch.setattr(registry, "HERE", tmp_path)
    room = Room("toy", "toys", frozenset(), BACKBONES.names_in)
    assert room.entries() == {"car_red": Entry("car_red", "svp.toys.car", "Cars.")}
