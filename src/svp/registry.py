"""Finds methods, backbones and other plug-ins by file name and entry point, without importing them."""

from __future__ import annotations

import ast
import fnmatch
import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from svp.errors import SvpError, unknown

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Entry:
    """One registered thing: where it lives, and its first docstring line."""

    name: str
    module: str
    summary: str
    entry_point: Any = None

    def load(self) -> Any:
        """The module of a built-in entry, or what a third party's entry point names."""
        if self.entry_point is None:
            return importlib.import_module(self.module)
        try:
            return self.entry_point.load()
        except Exception as err:  # whatever a stranger's module does
            raise SvpError(
                f"the plug-in {self.name} ({self.module}) cannot be loaded: {type(err).__name__}: {err}",
                "pip uninstall or upgrade the package that brings it", "env",
            ) from err  # fmt: skip


@dataclass(frozen=True)
class Room:
    """A folder of plug-ins, one file each. `names_in` reads the registered names from a file's syntax tree."""

    kind: str
    folder: str
    leave_out: frozenset[str]
    names_in: Callable[[str, ast.Module], dict[str, str]]

    def entries(self) -> dict[str, Entry]:
        return _entries(self)

    def get(self, name: str) -> Entry:
        found = self.entries()
        if name not in found:
            raise unknown(self.kind, name, found, f"svp list {self.folder}")
        return found[name]


def _by_file_name(stem: str, tree: ast.Module) -> dict[str, str]:
    return {stem: (ast.get_docstring(tree) or "").split("\n")[0]}


def _by_variants(stem: str, tree: ast.Module) -> dict[str, str]:
    """The keys of the dictionary VARIANTS; each row's value may carry its summary under `about`."""
    first = (ast.get_docstring(tree) or "").split("\n")[0]
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id == "VARIANTS" and isinstance(node.value, ast.Dict):
                return {str(key.value): first for key in node.value.keys if isinstance(key, ast.Constant)}
    return {}


METHODS = Room("method", "methods", frozenset({"base"}), _by_file_name)
BACKBONES = Room(
    "backbone", "backbones", frozenset({"base", "checkpoints", "positions", "timm_registry", "create"}), _by_variants
)
ROOMS = {room.folder: room for room in (METHODS, BACKBONES)}


@cache
def _entries(room: Room) -> dict[str, Entry]:
    found = {}
    for path in sorted((HERE / room.folder).glob("*.py")):
        if path.stem.startswith("_") or path.stem in room.leave_out:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name, summary in room.names_in(path.stem, tree).items():
            found[name] = Entry(name, f"svp.{room.folder}.{path.stem}", summary)
    for point in importlib.metadata.entry_points(group=f"svp.{room.folder}"):
        if point.name in found:
            raise SvpError(
                f"the {room.kind} '{point.name}' of {point.value} has the name of a built-in one",
                f"pip uninstall {point.value.partition('.')[0]}, or another name in its pyproject.toml", "env",
            )  # fmt: skip
        found[point.name] = Entry(point.name, point.value, f"from {point.value}", point)
    return found


def list_methods(pattern: str = "*") -> list[str]:
    """The names of the methods that match a wildcard pattern; nothing is imported."""
    return fnmatch.filter(METHODS.entries(), pattern)


def list_backbones(pattern: str = "*") -> list[str]:
    """The names of the backbones that match a wildcard pattern, for example "vim*"; nothing is imported."""
    return fnmatch.filter(BACKBONES.entries(), pattern)


NO_OVERRIDES = ("name", "weights", "img_size", "kernel", "seed", "pos_resize", "trust_pickle")


def overrides_of(values: Any) -> dict[str, Any]:
    """Keywords of a family that a file holds; raises ValueError for one that `create_backbone` takes itself.

    What a file says must not choose what is read or trusted.
    """
    found = dict(values)
    for key in found:
        if key in NO_OVERRIDES:
            raise ValueError(f"'backbone.overrides.{key}'")
    return found


def method_class(name: str) -> type:
    """The class of the method `name`: the one class of its file that knows where it is unfit."""
    entry = METHODS.get(name)
    loaded = entry.load()
    if isinstance(loaded, type):
        return loaded
    classes = [
        value
        for value in vars(loaded).values()
        if isinstance(value, type) and value.__module__ == loaded.__name__ and hasattr(value, "unfit")
    ]
    assert len(classes) == 1, f"{entry.module} holds {len(classes)} methods, expected one"
    return classes[0]
