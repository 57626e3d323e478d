"""Writes the tables of README.md and docs/*.md between their markers; --check only says which ones are stale.

    python docs/tables.py [--check]
    python docs/tables.py --keep NAME FILE     what `svp train … --json` wrote to FILE becomes docs/results/NAME.json

    <!-- table: NAME --> … <!-- /table -->

NAME is `methods`, `backbones` or `published` (read from the source files), `places`, `ours` or `left-out` (asked of the methods
themselves), else docs/results/NAME.json. Numbers of runs stand in the documents only through such files.
"""

import ast
import inspect
import json
import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
TEXT = (
    "method",
    "backbone",
    "what it is",
    "file",
    "where",
    "a LoRA by",
    "on Vim",
    "on a ViT",
    "numbers that train",
    "paper",
    "ours",
    "left out",
)
SAID = {
    "ours": "Ours",
    "left-out": "Left out",
}  # table: how docstrings begin what is in it  # columns that are set flush left
RESULTS = DOCS / "results"
MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def documents() -> list[Path]:
    return [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))]


def filled(text: str) -> str:
    """The document with every marked table written anew; one without a file keeps its markers and stays empty."""
    return MARKED.sub(lambda m: m[1] + table(m["name"]) + m[3], text)


def table(name: str) -> str:
    """The lines of a table, or "" where there is nothing to show."""
    if name == "methods":
        return markdown(("method", "what it is"), [(f"`{n}`", about) for n, about in registered("METHODS")])
    if name == "backbones":
        return markdown(("backbone", "what it is"), [(f"`{n}`", about) for n, about in registered("BACKBONES")])
    if name == "published":
        rows = [
            (f"`{n}`", f"`{file}`", f"[{hub}](https://huggingface.co/{hub})") for n, (hub, file) in published().items()
        ]
        return markdown(("backbone", "file", "where"), rows)
    if name == "places":
        return markdown(("method", "on Vim", "on a ViT", "numbers that train", "paper"), places())
    if name in SAID:
        return markdown(("method", name.replace("-", " ")), said(SAID[name]))
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    if "lora" in found:
        return lora_rows(found)
    return model_card(found) if "stages" in found else results(found)


def places() -> list[tuple[str, ...]]:
    """Each method on the networks that stand for their families, as `svp list methods NAME` says it."""
    from svp.cli.list import TYPICAL, place, typical_site

    return [
        (f"`{name}`", *(place(cls, typical_site(family)) for family in TYPICAL), cls.params_formula, cls.paper)
        for name, cls in classes()
    ]


def classes() -> list[tuple[str, type]]:
    import svp.registry

    return [(name, svp.registry.method_class(name)) for name in svp.registry.METHODS.entries()]


def said(word: str) -> list[tuple[str, str]]:
    """What the methods' docstrings say after a word at the start of a line, up to the next such word."""
    found = []
    for name, cls in classes():
        text = inspect.getdoc(cls) or ""
        part = re.search(rf"^{word}: (.*?)(?=^(?:Ours|Left out|Source): |\Z)", text, re.MULTILINE | re.DOTALL)
        if part:
            found.append((f"`{name}`", " ".join(part[1].split())))
    return found


def lora_rows(found: dict) -> str:
    """What benchmarks/peft_compare.py wrote: whether a LoRA on a layer of a Mamba block acts."""
    rows = [
        (f"{row['tool']} on {row['network']}", *(c["said"] for c in row["cells"].values())) for row in found["lora"]
    ]
    heads = [f"`{target}`" for target in found["lora"][0]["cells"]]
    versions = ", ".join(f"{name} {v}" for name, v in found["versions"].items() if v != "-")
    return (
        markdown(("a LoRA by", *heads), rows)
        + f"\nRank {found['rank']}, one layer at a time; {versions}; `benchmarks/peft_compare.py`.\n"
    )


def model_card(facts: dict) -> str:
    """What benchmarks/pretrain_nano.py writes to facts.json: how a shipped backbone was trained and what it reaches."""
    percent = {key: f"{100 * facts[key]:.1f} %" for key in facts if key.startswith("val_") and key != "val_pictures"}
    rows = [("numbers", f"{facts['parameters']:,}, stored as fp16"), ("trained on", f"`{facts['source']}`, training split"),
            ("pictures seen", f"{facts['pictures_seen']:,}"), ("time", f"{facts['seconds'] / 60:.0f} minutes on {facts['threads']} CPU core{'s' * (facts['threads'] > 1)}")]  # fmt: skip
    for stage in facts["stages"]:
        r = stage["recipe"]
        words = f"{stage['epochs']} epoch{'s' * (stage['epochs'] > 1)}, batch {r['batch_size']}, AdamW, lr {r['lr']:g}, weight decay {r['weight_decay']:g}, cosine"
        rows.append((f"stage at {stage['img_size']} px", words))
    rows += [(f"validation at 64 px ({facts['val_pictures']:,} pictures)", f"top-1 {percent['val_accuracy']}, top-5 {percent['val_top5']}"),
             ("validation at 32 px", f"top-1 {percent['val_accuracy_at_32_px']}, top-5 {percent['val_top5_at_32_px']}")]  # fmt: skip
    return markdown(("what it is", "file"), rows).replace("what it is | file", " | ", 1)


def registered(room: str) -> list[tuple[str, str]]:
    import svp.registry

    return [(entry.name, entry.summary) for entry in getattr(svp.registry, room).entries().values()]


def published() -> dict[str, tuple[str, str]]:
    """{backbone: (hub repository, file)}: the tables PUBLISHED of the families' files, read without importing them."""
    import svp.registry

    found: dict[str, tuple[str, str]] = {}
    for path in sorted((Path(svp.registry.__file__).parent / "backbones").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if getattr(target, "id", "") == "PUBLISHED":
                found |= ast.literal_eval(node.value)
    return found


def results(found: dict) -> str:
    """What `svp train … --json` printed: a line a method, and below it where the numbers are from."""
    rows = [cells(line) for line in found["table"]]
    heads = list(dict.fromkeys(key for row in rows for key in row))
    heads = [h for h in heads if any(row.get(h, "-") != "-" for row in rows)]
    return markdown(heads, [[row.get(h, "-") for h in heads] for row in rows]) + "\n" + origin(found["runs"]) + "\n"


def cells(line: dict) -> dict[str, str]:
    half = line["half_width_95"]
    val = line["val_accuracy"]
    return {
        "method": line["method"],
        "trained numbers": "-" if line["trained"] is None else f"{line['trained']:,}",
        f"{line['split']} accuracy, %": f"{100 * line['mean']:.1f}"
        + (f" ± {100 * half:.1f}" if half is not None else ""),
        "validation, %": f"{100 * sum(val) / len(val):.1f}" if val else "-",
    }


def origin(runs: list[dict]) -> str:
    """One sentence: what was trained on what, with which version, on which machine."""
    first = runs[0]
    seeds = sorted({run["seed"] for run in runs})
    sizes = first["data"]["sizes"]
    several = " (± is the 95 % interval of the mean over seeds)" if len(seeds) > 1 else ""
    return (
        f"{first['backbone']} at {first['img_size'][0]} px on {source(first['source'])} "
        f"({sizes['train']:,} / {sizes['val']:,} / {sizes['test']:,} pictures), {first['epochs']} epochs, "
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}{several}; torch {first['versions']['torch']}, "
        f"{first['timing']['device']}."
    )


def source(text: str) -> str:
    """`digits`, or of a path the last part: folders of somebody's machine are of no use to a reader."""
    kind, colon, path = text.partition(":")
    return f"`{kind}:{Path(path).name}/`" if colon else f"`{text}`"


def markdown(heads, rows) -> str:
    right = {i for i, h in enumerate(heads) if h not in TEXT}
    line = " | ".join("---:" if i in right else "---" for i in range(len(heads)))
    return "".join(f"| {text} |\n" for text in (" | ".join(heads), line, *(" | ".join(row) for row in rows)))


def keep(name: str, path: str) -> None:
    """The part of a command's JSON that tables show; folders of somebody's machine stay out of it."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    fields = ("method", "backbone", "img_size", "source", "epochs", "seed", "recipe", "lr_used", "fingerprint")
    runs = []
    for run in found["runs"]:
        kind, colon, folder = run["source"].partition(":")
        values = {key: run[key] for key in fields} | {"source": f"{kind}{colon}{Path(folder).name}"}
        values["data"] = {key: run["data"][key] for key in ("hash", "sizes")}
        runs.append({**values, "versions": run["versions"], "timing": run["timing"]})
    (RESULTS / f"{name}.json").write_text(
        json.dumps({"table": found["table"], "runs": runs}, indent=1) + "\n", encoding="utf-8"
    )


def main(words: list[str]) -> int:
    if words[:1] == ["--keep"]:
        keep(*words[1:])
        return main([])
    stale = []
    for path in documents():
        old = path.read_text(encoding="utf-8")
        new = filled(old)
        if new != old:
            stale.append(path)
            if "--check" not in words:
                path.write_text(new, encoding="utf-8")
    for path in stale:
        print(f"{path.relative_to(DOCS.parent)}: {'stale; python docs/tables.py' if '--check' in words else 'written'}")
    return 1 if stale and "--check" in words else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
