"""Writes the tables of README.md and docs/*.md between their markers; --check only says which ones are stale.

    python docs/tables.py [--check]
    python docs/tables.py --keep NAME FILE     what `svp train … --json` or `svp bench --json` wrote to FILE becomes
                                               docs/results/NAME.json

    <!-- table: NAME --> … <!-- /table -->

NAME is `methods`, `backbones` or `published` (read from the source files), `places`, `ours` or `left-out` (asked of the methods
themselves), `bench-PART` (from docs/results/bench.json, PARTS below), `methods-BACKBONE` (from docs/results/methods.json), else docs/results/NAME.json. Numbers of runs stand in the
documents only through such files.
"""

import ast
import inspect
import json
import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
TEXT = (
    "picture",
    "row",
    "part",
    "decoded",
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
    "numbers",
)  # columns that are set flush left
SAID = {"ours": "Ours", "left-out": "Left out"}  # table: how docstrings begin what is in it
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
    kind, _, part = name.partition("-")
    path = RESULTS / f"{kind if kind in ('bench', 'methods') else name}.json"
    if not path.is_file():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    if kind == "bench":
        return PARTS[part](found)
    if kind == "methods":
        return methods_on(part, found)
    if kind == "gpu":
        return gpu_scan(found) if part == "scan" else gpu_step(found)
    if kind == "scan":
        return scan_rows(found)
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


def methods_on(backbone: str, found: dict) -> str:
    """What benchmarks/methods_table.py --report wrote of one backbone: the best first, below it what is not in the table."""
    asked = [row for row in found["rows"] if row["backbone"] == backbone]
    rows = sorted((row for row in asked if "test_accuracy" in row), key=lambda row: -row["test_accuracy"])
    if not rows:
        return ""
    heads = ("method", "test accuracy, %", "validation, %", "trained numbers", "images/s", "memory, MiB", "epoch, s",
             "epochs", "learning rate", "rates tried")  # fmt: skip
    lines = [
        (named(row), f"{100 * row['test_accuracy']:.1f}", f"{100 * row['val_accuracy']:.1f}", f"{row['trained']:,}",
         f"{row['images_per_cpu_second']:.0f}", f"{row['memory_bytes'] / 2**20:,.0f}", shown(row["epoch_seconds"], ",.0f"),
         str(row["epochs"]), f"{row['lr']:.2g}", f"{row['rates_done']} of {len(found['factors'])}")
        for row in rows
    ]  # fmt: skip
    refused = [f"`{row['method']}` ({row['refused']})" for row in asked if "refused" in row]
    failed = [f"`{row['method']}` at {rate} ({why})" for row in asked for rate, why in row.get("failed", {}).items()]
    waiting = [
        f"`{row['method']}`" for row in asked if "refused" not in row and not row["rates_done"] and not row["failed"]
    ]
    tail = [
        f"{title}: {'; '.join(what)}.\n"
        for title, what in (("Refused", refused), ("Failed", failed), ("Not run yet", waiting))
        if what
    ]
    return markdown(heads, lines) + "\n" + measured_on(backbone, found, len(asked) - len(refused)) + "".join(tail)


def named(row: dict) -> str:
    """The method as `--method` takes it, and its label where it was carried over to this kind of network."""
    label = f" ({row['label']})" if row["label"] != row["method"] else ""
    return f"`{row['method']}{':' + row['preset'] if row['preset'] else ''}`{label}"


def measured_on(backbone: str, found: dict, methods: int) -> str:
    from svp.studies.table import binomial_interval

    runs = [{**found["shared"], **run} for run in found["runs"] if run["backbone"] == backbone and "failed" not in run]
    wanted = methods * len(found["factors"])
    commits = list(dict.fromkeys((run["git"] or "unknown")[:12] for run in runs))
    low, high = binomial_interval(max(run["test_accuracy"] for run in runs), runs[0]["data"]["sizes"]["test"])
    return (
        origin([{**runs[0], "epochs": runs[0]["recipe"]["epochs"]}])
        + f" {len(runs)} of {wanted} runs are done; images/s of forward and backward passes, in seconds of one core; memory of the whole process; an epoch with its validation,"
        + " the median, beside other work on the machine;"
        + f" chance is {100 / runs[0]['classes']:.1f} %, the 95 % interval of the best accuracy ± {50 * (high - low):.1f} by the number"
        + f" of test pictures alone; svp at {', '.join(commits)}; `benchmarks/methods_table.py`.\n"
    )


def model_card(facts: dict) -> str:
    """What benchmarks/pretrain.py writes to facts.json: how a shipped backbone was trained and what it reaches."""
    percent = {key: f"{100 * facts[key]:.1f} %" for key in facts if key.startswith("val_") and key != "val_pictures"}
    rows = [("numbers", f"{facts['parameters']:,}, stored as fp16"), ("trained on", f"`{facts['source']}`, training split"),
            ("pictures seen", f"{facts['pictures_seen']:,}"), ("time", f"{facts['seconds'] / 60:.0f} minutes on {facts['device']}")]  # fmt: skip
    for stage in facts["stages"]:
        r = stage["recipe"]
        mixed = [f"{name} {r[name]:g}" for name in ("mixup", "cutmix", "drop_path") if r[name]]
        words = f"{stage['epochs']} epoch{'s' * (stage['epochs'] > 1)}, batch {r['batch_size']}, AdamW, lr {r['lr']:g}, weight decay {r['weight_decay']:g}, cosine"
        rows.append((f"stage at {stage['img_size']} px", ", ".join([words, *mixed])))
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


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def gpu_scan(found: dict) -> str:
    """What benchmarks/gpu.py wrote: one direction of Vim-S's scan, ours, mamba_ssm's, and the bound."""
    heads = ("numbers", "tokens", "row", "forward, ms", "with backward, ms", "forward / bound")
    lines = []
    for run in found["scan"]:
        bound = max(run["bound_forward"].values())
        for row, times in run["ms"].items():
            forward, both = (times[key][0] for key in ("forward", "forward_backward"))
            kind = run["dtype"].removeprefix("torch.")
            lines.append((kind, f"{run['tokens']:,}", row, f"{forward:.2f}", f"{both:.2f}", f"{forward / bound:.1f}"))
    m = found["machine"]
    return (
        markdown(heads, lines)
        + f"\n{m['gpu']}, batch {found['batch']}, medians; torch {m['torch']}, triton {m['triton']}; largest errors against float64: "
        + ", ".join(f"{op} {error:.0e}" for op, error in found["errors"].items())
        + "; two runs gave the same bits; `benchmarks/gpu.py`.\n"
    )


def scan_rows(found: dict) -> str:
    """What `benchmarks/scan.py --json` wrote: ours beside its peers and the floor of the same run."""
    m, rows = found["machine"], []
    for run in found["runs"] + found["levels"]:
        ours = run["candidates"]["ours"]["min_ms"]
        peers = [run["candidates"].get(name) for name in ("loop", "pscan")]
        rows.append((
            run.get("level", m["level"]), str(run.get("states", 16)), str(run["threads"]),
            "with backward" if run["backward"] else "forward", f"{ours:.1f}",
            *(f"{peer['min_ms'] / ours:.1f}" if peer else "-" for peer in peers), f"{ours / run['floor_ms']:.2f}",
        ))  # fmt: skip
    heads = ("level", "states", "threads", "part", "ms, least", "loop / ours", "pscan / ours", "ours / floor")
    b, e, tokens, _ = found["shape"]
    return markdown(heads, rows) + (
        f"\n{b} pictures of {tokens} tokens, {e} channels, on {m['cpu']}; torch {m['torch']}, svp at {m['commit']}; *loop*: the "
        "recurrence token by token in PyTorch; *pscan*: mambapy's parallel scan; *floor*: exponentials, multiply-adds and bytes at "
        "the rates of this processor; `benchmarks/scan.py`.\n"
    )


def gpu_step(found: dict) -> str:
    """What `svp bench --device cuda --json` wrote, of one size."""
    (run,) = found["runs"]
    words = {"train": "step", "infer": "inference"}
    lines = [
        (words[line["what"]], line["row"], f"{1e3 * line['seconds']['min']:.1f}", f"{1e3 * line['seconds']['median']:.1f}",
         f"{run['batch_size'] / line['seconds']['min']:,.0f}", shown(line["speed_over_vit"], ".2f"))
        for line in run["rows"]
    ]  # fmt: skip
    asked, gpu = found["asked"], found["machine"]["gpus"][0]["name"]
    names = ",".join(dict.fromkeys(line["row"] for line in run["rows"]))
    command = (
        f"svp bench --device cuda --amp {asked['amp']} --img-size {run['img_size']} --batch-size {run['batch_size']} "
        f"--seconds {asked['seconds']:g} --only {names}"
    )
    dirty = ", with changes not committed then" if found["git"].endswith("-dirty") else ""
    return markdown(("part", "row", "ms, least", "median", "images/s", "of ViT's speed"), lines) + (
        f"\n{asked['backbone']} on {gpu}, torch {found['versions']['torch']}, svp at {found['git'][:12]}{dirty}; `{command}`.\n"
    )


# -- svp bench ---------------------------------------------------------------------------------------------------------


def bench_machine(found: dict) -> str:
    m, left_out = found["machine"], "".join(f"; without {r['row']} ({r['reason']})" for r in found["left_out"])
    rounds = min(
        (len(line["seconds"]["all"]) for run in found["runs"] for line in run["rows"] if line["row"] == "ours"),
        default=0,
    )
    errors = ", ".join(f"{c['row']} {c['error']:.0e}" for c in found["checks"])
    return (
        f"{found['asked']['backbone']}, method {found['asked']['method']}, float32, on {m['cpu']}, {m['cores']} cores, "
        f"{m['level']} kernels, torch {found['versions']['torch']}, svp at {(found['git'] or 'unknown')[:12]}{left_out}; the least of {rounds} round{'s' * (rounds != 1)}. "
        f"Largest errors against float64, of a tensor's largest entry: {errors}.\n"
    )


def bench_counts(found: dict) -> str:
    """Multiply-adds by the formulas; the shares of a picture at the first size."""
    counts = found["runs"][0]["counts"]
    whole = sum(counts["parts"].values())
    rows = [(name, f"{mac:,.0f}", f"{mac / whole:.1%}") for name, mac in counts["parts"].items()]
    rows.append(("all", f"{whole:,.0f}", ""))
    text = markdown(("part", "multiply-adds a token and block", "share"), rows)
    tail = [
        f"{run['img_size']} px: {run['counts']['tokens']:,} tokens, {run['counts']['gmac_train']:.2f} GMAC a picture and step, "
        f"{run['counts']['gmac_infer']:.2f} in the backbone's forward pass, {run['counts']['exponentials'] / 1e6:,.0f} million exponentials a pass"
        for run in one_of_each_size(found)
    ]  # fmt: skip
    return text + "\n" + ".\n".join(tail) + ".\n"


def one_of_each_size(found: dict) -> list[dict]:
    return list({(run["img_size"], run["batch_size"]): run for run in found["runs"]}.values())


def clock(run: dict) -> str:
    return "cpu_seconds" if run["counts_cpu_time"] else "seconds"


def where(run: dict) -> tuple[str, str]:
    return f"{run['img_size']} px, batch {run['batch_size']}", str(run["threads"])


def bench_rows(what: str):
    def rows(found: dict) -> str:
        heads = (
            "picture",
            "threads",
            "row",
            "seconds",
            "images/s",
            "x floor",
            "of ViT's speed",
            "MiB",
            "of ViT's memory",
        )
        lines = []
        for run in found["runs"]:
            for line in run["rows"]:
                if line["what"] != what:
                    continue
                part = "~" if "of_blocks" in line else ""
                ratio, memory, share = line["speed_over_vit"], line["memory_bytes"], line["memory_over_vit"]
                lines.append((
                    *where(run), line["row"], f"{part}{line[clock(run)]['min']:.3g}", f"{line['images_per_second']:.3g}",
                    f"{line['over_floor']:.2f}", shown(ratio, ".2f"), shown(memory and memory / 2**20, ",.0f"), shown(share, ".2f"),
                ))  # fmt: skip
        return markdown(heads, lines)

    return rows


def bench_floor(found: dict) -> str:
    heads = (
        "picture",
        "threads",
        "part",
        "products, s",
        "scans at least, s",
        "ours, s",
        "ours / products",
        "ours / both",
    )
    lines = []
    for run in found["runs"]:
        for what, word in (("train", "step"), ("infer", "inference")):
            floor, key = run["floor"][what], clock(run)
            ours = [line[key]["min"] for line in run["rows"] if (line["row"], line["what"]) == ("ours", what)]
            if ours:
                products, scans = floor[key]["min"], floor["scan_seconds"]
                lines.append((*where(run), word, *(f"{v:.3g}" for v in (products, scans, ours[0])),
                              f"{ours[0] / products:.2f}", f"{ours[0] / (products + scans):.2f}"))  # fmt: skip
    return markdown(heads, lines)


def bench_sweep(found: dict) -> str:
    heads = ("picture", "tokens", "row", "microseconds a token", "KiB a token")
    lines = [
        (f"{run['img_size']} px, batch {run['batch_size']}", f"{run['tokens']:,}", line["row"],
         f"{1e6 * line['seconds_per_token']:,.0f}", shown(line["memory_bytes_per_token"] and line["memory_bytes_per_token"] / 1024, ",.0f"))
        for run in found["sweep"] for line in run["rows"] if line["what"] == "train"
    ]  # fmt: skip
    return markdown(heads, lines) if lines else ""


def bench_data(found: dict) -> str:
    heads = ("picture", "workers", "decoded", "pictures/s", "images/s of the step", "step waits")
    lines = [
        (f"{d['img_size']} px, batch {d['batch_size']}", str(r["workers"]), r["decoded"], f"{r['pictures_per_second']:,.0f}",
         shown(d["step_images_per_second"], ".3g"), shown(r["step_waits"], ".1%"))
        for d in found["data"] for r in d["rows"]
    ]  # fmt: skip
    return markdown(heads, lines) if lines else ""


def bench_probe(found: dict) -> str:
    heads = ("picture", "images/s, features computed", "images/s, features kept", "epochs", "times faster")
    lines = [
        (f"{p['img_size']} px, batch {p['batch_size']}", f"{p['computed']['images_per_second']:.3g}",
         f"{p['kept']['images_per_second']:,.0f}", str(p["epochs"]), f"{p['times_faster']:.1f}")
        for p in found["probe"]
    ]  # fmt: skip
    return markdown(heads, lines) if lines else ""


def shown(value, form: str) -> str:
    return "-" if value is None else format(value, form)


PARTS = {
    "machine": bench_machine, "counts": bench_counts, "train": bench_rows("train"), "infer": bench_rows("infer"),
    "floor": bench_floor, "sweep": bench_sweep, "data": bench_data, "probe": bench_probe,
}  # fmt: skip


def markdown(heads, rows) -> str:
    right = {i for i, h in enumerate(heads) if h not in TEXT}
    line = " | ".join("---:" if i in right else "---" for i in range(len(heads)))
    return "".join(f"| {text} |\n" for text in (" | ".join(heads), line, *(" | ".join(row) for row in rows)))


def keep(name: str, path: str) -> None:
    """The part of a command's JSON that tables show; folders of somebody's machine stay out of it."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    if "checks" in found:
        (RESULTS / f"{name}.json").write_text(json.dumps(short(found), indent=1) + "\n", encoding="utf-8")
        return
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


def short(value):
    """Numbers with six digits that count."""
    if isinstance(value, dict):
        return {key: short(v) for key, v in value.items()}
    if isinstance(value, list):
        return [short(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


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
