"""`svp list`: what there is, and with a NAME every option of it."""

from __future__ import annotations

import ast
import fnmatch
import functools
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from svp.cli.words import JSON, Page, columns, examples, say
from svp.errors import SvpError, unknown

Table = list[dict[str, Any]]  # rows by heading; the first column is the name
TYPICAL = {"Vim": "vim_small", "a ViT": "vit_base_patch16_224.augreg_in1k"}  # a family, and who stands for it
Facts = dict[str, Any]  # a page: text by heading, and under "options" a Table


@click.command(
    cls=Page,
    epilog=examples(
        "svp list methods", "svp list methods svp", "svp list backbones 'vim_small*'", "svp list recipes svp-dtd --json"
    ),
)
@click.argument("kind", metavar="backbones|methods|tasks|protocols|recipes", required=False)
@click.argument("name", metavar="[NAME]", required=False)
@JSON
def command(kind: str | None, name: str | None, as_json: bool) -> None:
    """Show what there is; with NAME every option of it, its default and where it is from.

    A NAME with * or ? narrows the table.
    """
    if kind is None:
        raise SvpError(
            "what shall be listed?", f"svp list methods; or {', '.join(k for k in KINDS if k != 'methods')}", "usage"
        )
    word = kind.lower()
    kind = next((k for k in KINDS if word in (k, k.rstrip("s"))), kind)
    if kind not in KINDS:
        raise unknown("list of", kind, KINDS)
    table, page = KINDS[kind]
    rows = table()
    names = [next(iter(row.values())) for row in rows]
    if name is not None and name in names:
        show_page(page(name), as_json)
        return
    if name is not None:
        names = fnmatch.filter(names, name)
        if not names and any(sign in name for sign in "*?["):
            raise SvpError(f"no {kind.rstrip('s')} matches '{name}'", f"svp list {kind}", "usage")
        if not names:
            raise unknown(kind.rstrip("s"), name, [next(iter(row.values())) for row in rows], f"svp list {kind}")
        rows = [row for row in rows if next(iter(row.values())) in names]
    if as_json:
        from svp.cli.words import print_json

        print_json(rows)
        return
    click.echo(as_columns(rows))
    say(f"svp list {kind} {names[0]} tells more")


# -- tables: of methods and backbones without importing them -----------------------------------------------------------


def methods() -> Table:
    from svp.registry import METHODS

    return [{"method": e.name, "what it does": e.summary} for e in METHODS.entries().values()]


def backbones() -> Table:
    from svp.registry import BACKBONES

    found: Table = []
    for e in BACKBONES.entries().values():
        rows, published = ({}, {}) if e.entry_point else written(e.module)
        of_timm = rows.get(e.name) == {}  # sizes and weights that timm knows by the name alone
        weights = "in the package" if is_shipped(e.name) else "published" if e.name in published or of_timm else "-"
        sizes = ", ".join(f"{k} {v}" for k, v in rows.get(e.name, {}).items())
        found.append(
            {
                "backbone": e.name,
                "family": e.module.rpartition(".")[2],
                "sizes": sizes,
                "weights": weights,
                "what it is": e.summary,
            }
        )
    return found


def written(module: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """VARIANTS and PUBLISHED as a family's file writes them, without importing it."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    found: dict[str, dict] = {"VARIANTS": {}, "PUBLISHED": {}}
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        table = getattr(node, "value", None)
        if isinstance(target, ast.Name) and target.id in found and isinstance(table, ast.Dict):
            for key, row in zip(table.keys, table.values, strict=True):
                words = row.keywords if isinstance(row, ast.Call) else []
                if isinstance(key, ast.Constant):
                    found[target.id][key.value] = {w.arg: ast.unparse(w.value) for w in words}
    return found["VARIANTS"], found["PUBLISHED"]


def is_shipped(name: str) -> bool:
    return (Path(__file__).parents[1] / "weights" / f"{name}.safetensors").is_file()


def tasks() -> Table:
    from svp.data.sources import TASKS

    return [{"task": name, "what it is": words} for name, words in TASKS.items()]


def protocols() -> Table:
    from svp.data.protocols import PROTOCOLS

    return [
        {"protocol": row.name, "differs from default": settings(row.differences()) or "-", "from": row.source}
        for row in PROTOCOLS.values()
    ]


def recipes() -> Table:
    from svp.training.recipe import recipes as known

    def learning(row: Any) -> str:
        return (
            "the method's"
            if row.recipe.lr is None
            else plain(row.recipe.lr) + (f" per {row.recipe.lr_per}" if row.recipe.lr_per else "")
        )

    return [
        {"recipe": row.name, "method": row.method or "any", "epochs": row.recipe.epochs, "batch": row.recipe.batch_size,
         "lr": learning(row), "protocol": row.protocol, "from": row.source, "note": row.note}
        for row in known().values()
    ]  # fmt: skip


# -- pages: facts by name, then the options ----------------------------------------------------------------------------


def method_page(name: str) -> Facts:
    from svp.options import describe
    from svp.registry import METHODS, method_class

    cls: Any = method_class(name)
    options = [
        {"option": f.name, "type": f.type, "default": f.default, "what it does": f.help} for f in describe(cls.Options)
    ]
    example = next((f for f in options if f["type"].startswith("integer")), options[0] if options else None)
    return {
        "method": name,
        "what it does": METHODS.get(name).summary,
        "in detail": inspect.getdoc(cls) or "",
        "paper": cls.paper,
        "numbers that train": cls.params_formula,
        **{f"on {family}": place(cls, typical_site(family)) for family in TYPICAL},
        "learning rate": f"{cls.default_lr:g} (default of our recipe)",
        "presets": [
            f"{name}:{preset}  {settings(values) or '(the defaults)'}" for preset, values in cls.PRESETS.items()
        ],
        "options": options,
        "use": f"svp train SOURCE --method {name}"
        + (f" -s {example['option']}={plain(example['default'])}" if example else ""),
    }


@functools.cache
def typical_site(family: str) -> Any:
    """What methods may know of the network that stands for a family; sizes alone, without memory behind its tensors."""
    import torch

    from svp.backbones.create import family_class, family_of

    name = TYPICAL[family]
    module = family_of(name)
    with torch.device("meta"):
        return family_class(module)(name, **module.VARIANTS[name]).site()


def place(cls: Any, site: Any) -> str:
    """Whether a method acts on a network as published, adapted under a label of its own, or not, and why."""
    from svp.methods.base import options_of

    opt = options_of(cls, {}, cls.__name__)
    reason, preset = cls.unfit(site, opt), ""
    for name in cls.PRESETS if reason else ():  # what the defaults cannot do, a preset may
        other = options_of(cls, {"preset": name}, cls.__name__)
        if cls.unfit(site, other) is None:
            reason, preset, opt = None, f", preset {name}", other
            break
    label = cls.label(site, opt)
    return f"refused: {reason}" if reason else f"adapted (label {label}){preset}" if label else f"direct{preset}"


def backbone_page(name: str) -> Facts:
    import torch

    from svp.backbones.create import family_class, part_of, shipped_weights
    from svp.options import type_words
    from svp.registry import BACKBONES

    entry = BACKBONES.get(name)
    module = entry.load()
    cls, sizes = family_class(module), module.VARIANTS[name]
    with torch.device("meta"):
        net = cls(name, **sizes)
    shipped, published = shipped_weights(name), part_of(module, "published")(name)
    weights = f"{published[1]} of hf:{published[0]}" if published else "none"
    weights = f"{shipped.name}, in the package" if shipped else weights
    hints = inspect.get_annotations(cls.__init__, eval_str=True)
    options = [
        {
            "keyword": p.name,
            "type": type_words(hints.get(p.name, Any)),
            "value": sizes.get(p.name, p.default),
            "default": p.default,
        }
        for p in inspect.signature(cls.__init__).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    ]
    return {
        "backbone": name,
        "what it is": entry.summary,
        "in detail": inspect.getdoc(cls) or "",
        "numbers": f"{sum(p.numel() for p in net.parameters()):,}, {net.depth} blocks, feature {net.num_features}",
        "pictures": f"{net.img_size[0]} x {net.img_size[1]} pixels; another size with --img-size",
        "default weights": weights,
        "options": options,
        "use": f"svp train SOURCE --backbone {name}",
    }


def task_page(name: str) -> Facts:
    from svp.data.sources import TASKS

    return {"task": name, "what it is": TASKS[name], "use": f"svp train {name}"}


def protocol_page(name: str) -> Facts:
    from svp.data.protocols import PROTOCOLS

    row = PROTOCOLS[name]
    return {
        "protocol": name,
        "from": row.source,
        "options": field_rows(row, leave_out=("name", "source")),
        "use": f"svp train SOURCE --protocol {name}",
    }


def recipe_page(name: str) -> Facts:
    from svp.training.recipe import recipe_row

    row = recipe_row(name)
    return {
        "recipe": name,
        "from": row.source,
        "note": row.note,
        "method": f"{row.method or 'any'}{': ' if row.method_options else ''}{settings(row.method_options)}",
        "head": row.head,
        "protocol": row.protocol,
        "seed": row.seed,
        "options": field_rows(row.recipe),
        "use": f"svp train SOURCE --recipe {name} -r epochs={row.recipe.epochs}",
    }


KINDS: dict[str, tuple[Callable[[], Table], Callable[[str], Facts]]] = {
    "backbones": (backbones, backbone_page), "methods": (methods, method_page), "tasks": (tasks, task_page),
    "protocols": (protocols, protocol_page), "recipes": (recipes, recipe_page),
}  # fmt: skip


def show_page(facts: Facts, as_json: bool) -> None:
    if as_json:
        from svp.cli.words import print_json

        print_json(facts)
        return
    options = facts.pop("options", None)
    for key, value in facts.items():
        lines = value if isinstance(value, list) else str(value).split("\n")
        if lines and lines != [""]:
            click.echo(
                "\n".join(
                    f"{start:<20}{line}".rstrip() for start, line in zip([key, *[""] * len(lines)], lines, strict=False)
                )
            )
    if options is not None:
        click.echo("\n" + (as_columns(options) if options else "it has no options"))


def as_columns(rows: Table) -> str:
    """Rows for a person: a default that is the value is left out."""

    def cell(row: dict[str, Any], key: str) -> str:
        return "" if key == "default" and "value" in row and row["value"] == row[key] else plain(row[key])

    return columns(list(rows[0]), [[cell(row, key) for key in row] for row in rows])


def field_rows(row: Any, leave_out: tuple[str, ...] = ()) -> Table:
    """Fields of an instance of options: its value, the default, what it does."""
    from svp.options import describe

    return [
        {"field": f.name, "type": f.type, "value": getattr(row, f.name), "default": f.default, "what it does": f.help}
        for f in describe(type(row)) if f.name not in leave_out
    ]  # fmt: skip


def settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={plain(value)}" for key, value in values.items())


def plain(value: Any) -> str:
    """A value as one types it after -s or -r."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return f"[{','.join(map(plain, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
