"""Writes the tables of README.md and docs/*.md between their markers; --check only says which ones are stale.

    <!-- table: NAME --> … <!-- /table -->

NAME is `methods`, `backbones` or `published` (read from the source files), else docs/results/NAME.json, as `svp train … --json` prints
it. Numbers of runs stand in the documents only through such files.
"""

import ast
import json
import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
TEXT = ("method", "backbone", "what it is", "file", "where")  # columns that are set flush left
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
        rows = [(f"`{n}`", f"`{file}`", f"[{hub}](https://huggingface.co/{hub})") for n, (hub, file) in published().items()]
        return markdown(("backbone", "file", "where"), rows)
    path = RESULTS / f"{name}.json"
    return results(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else ""


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
        f"{line['split']} accuracy, %": f"{100 * line['mean']:.1f}" + (f" ± {100 * half:.1f}" if half is not None else ""),
        "validation, %": f"{100 * sum(val) / len(val):.1f}" if val else "-",
        "time": "-" if line["seconds"] is None else f"{line['seconds']:,.0f} s",
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
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}{several}; svp {first['versions']['svp']}, "
        f"torch {first['versions']['torch']}, {first['timing']['device']}, {first['timing']['threads']} threads."
    )


def source(text: str) -> str:
    """`digits`, or of a path the last part: folders of somebody's machine are of no use to a reader."""
    kind, colon, path = text.partition(":")
    return f"`{kind}:{Path(path).name}/`" if colon else f"`{text}`"


def markdown(heads, rows) -> str:
    right = {i for i, h in enumerate(heads) if h not in TEXT}
    line = " | ".join("---:" if i in right else "---" for i in range(len(heads)))
    return "".join(f"| {text} |\n" for text in (" | ".join(heads), line, *(" | ".join(row) for row in rows)))


def main(words: list[str]) -> int:
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
