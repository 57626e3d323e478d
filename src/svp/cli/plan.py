"""From words to a plan: built-in default < recipe row < config file < command line, each value with its origin."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from svp.cli.config import read_config
from svp.cli.words import MAX_PIXELS, short_name, without_dashes
from svp.errors import SvpError, unknown
from svp.options import assignments
from svp.registry import METHODS, method_class
from svp.training.recipe import Recipe, recipe_from

BACKBONE, WEIGHTS = "vim_nano", "default"
SHORTCUTS = ("epochs", "lr", "weight_decay", "batch_size", "accumulate")  # recipe fields with a flag of their own


@dataclass(frozen=True)
class Wanted:
    """One adaptation to train: its label in the table, and (method, options) pairs that act together."""

    label: str
    specs: tuple[tuple[str, dict[str, Any]], ...]

    @property
    def folder(self) -> str:
        return self.label.replace(":", "-")


@dataclass(frozen=True)
class Plan:
    """All that one command asks for."""

    source: str
    protocol: Any  # a Protocol or its name
    backbone: str
    weights: str | None
    img_size: tuple[int, int] | int | None
    overrides: dict[str, Any]
    kernel: str
    wanted: tuple[Wanted, ...]
    head: str
    recipe: Recipe
    seeds: tuple[int, ...]
    amp: str
    device: str
    workers: int | None
    on_bad_image: str = "error"
    max_pixels: int = MAX_PIXELS
    cut_seed: int = 0
    compile: bool = False
    deterministic: bool = False
    origins: dict[str, str] = field(default_factory=dict)
    repeats: dict[str, str] = field(default_factory=dict)  # of a config file: the file, fingerprint and hash of its run

    @property
    def count(self) -> int:
        return len(self.wanted) * len(self.seeds)

    def out(self, given: str | None, wanted: Wanted, seed: int) -> Path:
        """The folder of one run: runs/<data>-<method>-<backbone>-s<seed>, or of several OUT/<method>-s<seed>."""
        data = short_name(self.source)
        if self.count == 1:
            return Path(given or f"runs/{data}-{wanted.folder}-{self.backbone}-s{seed}")
        return Path(given or f"runs/{data}-{self.backbone}") / f"{wanted.folder}-s{seed}"


class Words:
    """Looks a value up on the command line, then in the config file, then in the recipe row, and remembers where it was."""

    def __init__(
        self, typed: dict[str, Any], config: dict[str, Any], row: dict[str, Any], path: str | None, row_name: str
    ):
        self.places = (("command line", typed), (path or "config", config), (f"recipe {row_name}", row))
        self.origins: dict[str, str] = {}

    def get(self, name: str, default: Any) -> Any:
        for origin, values in self.places:
            if values.get(name) is not None:
                self.origins[name] = origin
                return values[name]
        self.origins[name] = "default"
        return default


def plan_from(typed: dict[str, Any]) -> Plan:
    """The plan of `svp train` from its parsed words; raises SvpError (kind "usage") for what does not fit together."""
    path = typed.get("config")
    config = read_config(path) if path else {}
    if "overrides" in config and typed.get("backbone") not in (None, config["backbone"]):  # they are another network's
        config = {k: v for k, v in config.items() if k not in ("overrides", "weights", "img_size", "fingerprint")}
    typed = {**typed, "seeds": _seeds(typed)}
    named = typed.get("recipe") or (config.get("recipe") if isinstance(config.get("recipe"), str) else None)
    row = recipe_from(named or "default")
    words = Words(typed, config, {"head": row.head, "protocol": row.protocol, "seeds": (row.seed,)}, path, row.name)
    source = words.get("source", None)
    if source is None:
        raise SvpError("no SOURCE was given", "svp train digits, or svp train folder:photos/", "usage")
    meant = without_dashes(str(source), click.get_current_context())
    if meant is not None and not Path(source).exists():
        raise meant
    weights = words.get("weights", WEIGHTS)
    machine, reading = config.get("machine") or {}, config.get("reading") or {}
    return Plan(
        source=str(source), protocol=words.get("protocol", "default"), backbone=words.get("backbone", BACKBONE),
        weights=None if weights in ("none", "random") else weights, img_size=words.get("img_size", None),
        overrides=config.get("overrides", {}), kernel=words.get("kernel", "auto"),
        wanted=_wanted(typed, config, row), head=words.get("head", "linear"),
        recipe=_recipe(typed, config, row, words, path), seeds=tuple(words.get("seeds", (0,))),
        amp=words.get("amp", "auto"), device=typed.get("device") or machine.get("device") or "auto",
        workers=typed["workers"] if typed.get("workers") is not None else machine.get("workers"),
        on_bad_image=typed.get("on_bad_image") or reading.get("on_bad_image") or "error",
        max_pixels=typed.get("max_pixels") or reading.get("max_pixels") or MAX_PIXELS,
        cut_seed=reading.get("seed", 0), compile=bool(typed.get("compile") or machine.get("compile")),
        deterministic=bool(typed.get("deterministic") or machine.get("deterministic")),
        origins=words.origins, repeats=_repeats(config, words, path),
    )  # fmt: skip


def _repeats(config: dict[str, Any], words: Words, path: str | None) -> dict[str, str]:
    """What the file says of weights and pictures that it names too, and nobody has typed others."""
    by = {"fingerprint": ("backbone", "weights"), "hash": ("source", "protocol")}
    known = {
        key: config[key]
        for key, names in by.items()
        if config.get(key) and all(words.origins[n] == path for n in names)
    }
    return {"file": str(path), **known} if known else {}


def _seeds(typed: dict[str, Any]) -> tuple[int, ...] | None:
    if typed.get("seed") is not None and typed.get("seeds") is not None:
        raise SvpError("--seed and --seeds exclude each other", "--seeds 0,1,2 names all of them", "usage")
    return (typed["seed"],) if typed.get("seed") is not None else typed.get("seeds")


def _recipe(typed: dict[str, Any], config: dict[str, Any], row: Any, words: Words, path: str | None) -> Recipe:
    recipe = row.recipe
    before = {f.name: getattr(Recipe(), f.name) for f in dataclasses.fields(Recipe)}
    words.origins |= {
        f"recipe.{name}": "default" if getattr(recipe, name) == value else f"recipe {row.name}"
        for name, value in before.items()
    }
    if isinstance(config.get("recipe"), dict) and not typed.get("recipe"):
        try:
            recipe = recipe.but(**config["recipe"])
        except SvpError as err:
            raise SvpError(
                f"{path}, recipe from line {config['recipe_line']}: {err.problem}", err.hint, "usage"
            ) from err
        words.origins |= {f"recipe.{name}": str(path) for name in config["recipe"]}
    fields = assignments(typed.get("recipe_fields") or (), "-r")
    flags = {name: typed[name] for name in SHORTCUTS if typed.get(name) is not None}
    for name in fields.keys() & flags.keys():
        if fields[name] != flags[name]:
            raise SvpError(
                f"-r {name}={fields[name]} and --{name.replace('_', '-')} {flags[name]} disagree", "give one", "usage"
            )
    words.origins |= {f"recipe.{name}": "command line" for name in fields | flags}
    return recipe.but(**fields, **{k: v for k, v in flags.items() if k not in fields})


def _wanted(typed: dict[str, Any], config: dict[str, Any], row: Any) -> tuple[Wanted, ...]:
    if not typed.get("method") and "specs" in config:
        specs = config["specs"]
        chosen = [Wanted("+".join(name for name, _ in specs), specs)]
    else:
        text = typed.get("method") or config.get("method") or row.method or "svp"
        chosen = [_composed(word.strip(), row) for word in text.split(",")]
    labels = [w.label for w in chosen]
    for label in labels:
        if labels.count(label) > 1:
            raise SvpError(f"the method {label} is named twice", "--method svp,linear", "usage")
    return _with_options(chosen, assignments(typed.get("method_options") or (), "-s"))


def _composed(word: str, row: Any) -> Wanted:
    """ "svp", "svp:published" (a method with one of its presets) or "svp+lora" (together)."""
    specs = []
    for part in word.split("+"):
        name, colon, preset = part.strip().partition(":")
        if not name:
            raise SvpError(
                f"--method '{word}' names no method", "--method svp,linear compares, svp+lora composes", "usage"
            )
        METHODS.get(name)
        options = dict(row.method_options) if name == row.method else {}
        if colon:
            presets = method_class(name).PRESETS  # type: ignore[attr-defined]
            if preset not in presets:
                raise unknown(f"preset of {name} named", preset, presets, f"svp list methods {name}")
            options["preset"] = preset
        specs.append((name, options))
    return Wanted(word, tuple(specs))


def _with_options(chosen: list[Wanted], given: dict[str, Any]) -> tuple[Wanted, ...]:
    """`hidden=32` where one method is named, `svp.hidden=32` where several are."""
    names = {name for wanted in chosen for name, _ in wanted.specs}
    for key in given:
        owner, dot, _ = key.partition(".")
        if dot and owner not in names:
            hint = f"-s {sorted(names)[0]}.{key.partition('.')[2]}=…"
            raise SvpError(f"-s {key}: {owner} is not among the methods {', '.join(sorted(names))}", hint, "usage")
        if not dot and len(names) > 1:
            hint = " or ".join(f"-s {name}.{key}=…" for name in sorted(names)[:3])
            raise SvpError(f"-s {key}: which of {', '.join(sorted(names))} is meant?", hint, "usage")

    def filled(name: str, options: dict[str, Any]) -> dict[str, Any]:
        own = {k.partition(".")[2] or k: v for k, v in given.items() if "." not in k or k.startswith(f"{name}.")}
        return {**options, **own}

    return tuple(Wanted(w.label, tuple((n, filled(n, o)) for n, o in w.specs)) for w in chosen)
