"""Which method is how good, large and fast under one recipe? Every method on vit_nano and vim_nano, three learning rates each.

    python benchmarks/methods_table.py parquet:flowers102 OUT            runs what is not done yet; may be stopped any time
    python benchmarks/methods_table.py parquet:flowers102 OUT --report   docs/results/methods.json from what is done

Each method with its own defaults (or, where those are refused, the first preset that fits) and its own learning rate times 1,
3 and 1/3; the rate is chosen on validation, and test is measured at the end of every run and taken from the chosen one. The
first rate of all methods comes first, so that a part of the runs is a table too.

OUT/BACKBONE/METHOD/xFACTOR/ is the run folder of `svp.fit`, which resumes; xFACTOR.json beside it says what came of it. Each run
is a process of its own: its memory is its own, and one that fails is a line in the table. `--only vit_nano,svp` narrows
the work to the backbones and methods that it names.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import svp

BACKBONES = ("vit_nano", "vim_nano")
FACTORS = (1.0, 3.0, 1 / 3)  # of a method's own learning rate, in the order of work
RESULTS = Path(__file__).parents[1] / "docs" / "results" / "methods.json"
KEPT = (
    "label", "options", "head", "fingerprint", "img_size", "protocol", "selection", "recipe", "lr_used", "amp", "seed",
    "epochs", "selected_epoch", "val_accuracy", "test_accuracy", "test_top5", "trainable", "features_cached", "data",
    "versions", "git", "kernel", "timing", "classes",
)  # fmt: skip
LATER = {"mixup_prob": 1.0}  # fields of a recipe that came after the first runs, and what these did


class Cell(NamedTuple):
    """One run of the table."""

    backbone: str
    method: str
    factor: float

    def place(self, out: Path) -> Path:
        """The run folder; with .json behind it the file of its facts."""
        return out / self.backbone / self.method / f"x{self.factor:.3g}"

    def facts(self, out: Path) -> dict[str, Any] | None:
        path = facts_file(self.place(out))
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def __str__(self) -> str:
        return f"{self.method} on {self.backbone} x{self.factor:.3g}"


def facts_file(place: Path) -> Path:
    return place.with_name(f"{place.name}.json")


def cells(backbones: tuple[str, ...] = BACKBONES) -> list[Cell]:
    """All runs in the order of work: the yardstick first, and every method at its own rate before any other rate."""
    methods = sorted(svp.list_methods(), key=lambda name: name != "linear")
    first, *others = FACTORS
    rates = [(b, first) for b in backbones] + [(b, factor) for b in backbones for factor in others]
    return [Cell(backbone, method, factor) for backbone, factor in rates for method in methods]


def narrowed(work: list[Cell], only: str) -> list[Cell]:
    """The cells of the backbones and methods in a text of names."""
    names = {name for name in only.split(",") if name}
    for column in ("backbone", "method"):
        known = {getattr(cell, column) for cell in work}
        work = [cell for cell in work if getattr(cell, column) in names or not names & known]
        names -= known
    if names:
        sys.exit(f"no backbone or method of this table: {', '.join(sorted(names))}")
    return work


# -- one run -----------------------------------------------------------------------------------------------------------


def train(cell: Cell, opt: argparse.Namespace) -> None:
    """One run, in a process of its own; writes the file of its facts."""
    import torch

    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(opt.threads)
    place = cell.place(opt.out)
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        found = trained(cell, place, opt)
    except Exception as err:
        text = str(err) if isinstance(err, svp.SvpError) else f"{type(err).__name__}: {err}"
        found = {"failed": text.replace(str(opt.out), "OUT")}
    write(facts_file(place), {**cell._asdict(), **found})


def end_with_parent() -> None:
    """A run whose table was killed would hold its folder; what it has trained so far is in its checkpoint."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def trained(cell: Cell, place: Path, opt: argparse.Namespace) -> dict[str, Any]:
    from svp.training.facts import default_lr
    from svp.training.recipe import recipe_named

    net = svp.create_backbone(cell.backbone, weights="default", img_size=opt.img_size)
    reason, preset = fitting(cell.method, net.site())
    if reason:
        return {"refused": reason}
    data = svp.open_data(opt.source)
    spec = (cell.method, {"preset": preset} if preset else {})
    model = svp.adapt(net, spec, num_classes=data.num_classes, classes=data.classes, seed=opt.seed)
    recipe = recipe_named("default").but(epochs=opt.epochs, lr=cell.factor * default_lr(model.method))
    speed = images_per_cpu_second(svp.adapt(net, spec, num_classes=data.num_classes, probe=False), recipe.batch_size)
    run = svp.fit(model, data, recipe=recipe, seed=opt.seed, out=place, resume=place.exists(), workers=0)
    kind, colon, path = run.result["source"].partition(":")
    values = {key: run.result[key] for key in KEPT}
    return {**values, "source": f"{kind}{colon}{Path(path).name}", "preset": preset, "images_per_cpu_second": speed}


def images_per_cpu_second(model: Any, batch_size: int, repeats: int = 5) -> float:
    """Of the fastest forward and backward pass on random pictures: what else this machine does meanwhile does not count."""
    import torch

    images = torch.randn(batch_size, 3, *model.preprocessing.crop, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(batch_size) % model.num_classes
    model.train()
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        model.method.loss(model, images, labels, torch.nn.functional.cross_entropy).backward()
        seconds.append(time.process_time() - started)
    return batch_size / min(seconds)


def fitting(method: str, site: Any) -> tuple[str | None, str | None]:
    """(reason, None) where a method cannot act on a network, else (None, preset): what its defaults cannot do, one may."""
    from svp.methods.base import options_of
    from svp.registry import method_class

    cls = method_class(method)
    reason = cls.unfit(site, options_of(cls, {}, method))
    for name in cls.PRESETS if reason else ():
        if cls.unfit(site, options_of(cls, {"preset": name}, method)) is None:
            return None, name
    return reason, None


def write(path: Path, facts: dict[str, Any]) -> None:
    """The file appears whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


# -- all of them -------------------------------------------------------------------------------------------------------


def todo(work: list[Cell], opt: argparse.Namespace) -> Iterator[Cell]:
    """What has no facts yet; a method that is refused is refused at any rate, a failed run runs again where asked."""
    for cell in work:
        found, first = cell.facts(opt.out), cell._replace(factor=FACTORS[0]).facts(opt.out)
        is_open = found is None or (opt.retry and "failed" in found)
        if is_open and "refused" not in (first or {}):
            yield cell


def run_all(work: list[Cell], opt: argparse.Namespace) -> None:
    spawn = multiprocessing.get_context("spawn")
    left = list(todo(work, opt))
    for number, cell in enumerate(left, 1):
        if cell not in todo([cell], opt):  # refused since, or done by another process
            continue
        started = time.monotonic()
        child = spawn.Process(target=train, args=(cell, opt))
        child.start()
        child.join()
        if cell.facts(opt.out) is None:
            write(
                facts_file(cell.place(opt.out)),
                {**cell._asdict(), "failed": f"the process ended with {child.exitcode}"},
            )
        told = f"{number}/{len(left)} {cell}: {said(cell.facts(opt.out) or {})}, {time.monotonic() - started:.0f} s"
        print(told, flush=True)


def said(facts: dict[str, Any]) -> str:
    if "val_accuracy" in facts:
        return f"val {100 * facts['val_accuracy']:.1f} %, test {100 * facts['test_accuracy']:.1f} %"
    return "refused" if "refused" in facts else "failed: " + facts.get("failed", "?").splitlines()[0]


# -- the table ---------------------------------------------------------------------------------------------------------


def report(work: list[Cell], out: Path) -> dict[str, Any]:
    """What is done, as docs/tables.py reads it: a row for each backbone and method, what all runs share, and each run."""
    found = [(cell, with_epochs(cell.facts(out), cell.place(out))) for cell in work]
    runs = [slim(facts) for _, facts in found if facts and "refused" not in facts]
    done = [facts for facts in runs if "failed" not in facts]
    shared = {key: value for key, value in (done or [{}])[0].items() if all(r.get(key, ...) == value for r in done)}
    shared = {key: value for key, value in shared.items() if key not in Cell._fields}
    pairs = list(dict.fromkeys((cell.backbone, cell.method) for cell in work))
    rows = [
        row(backbone, method, [facts or {} for cell, facts in found if cell[:2] == (backbone, method)])
        for backbone, method in pairs
    ]
    own = [{key: value for key, value in facts.items() if key not in shared} for facts in runs]
    return {"factors": list(FACTORS), "shared": shared, "rows": rows, "runs": own}


def with_epochs(facts: dict[str, Any] | None, place: Path) -> dict[str, Any] | None:
    """With the median seconds of an epoch, its validation included: a run that was stopped for a while took no longer."""
    log = place / "metrics.jsonl"
    if not facts or "val_accuracy" not in facts or not log.is_file():
        return facts
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    ends = [0.0, *(line["timing"]["seconds"] for line in lines if "timing" in line)]
    return {**facts, "epoch_seconds": statistics.median(b - a for a, b in itertools.pairwise(ends))}


def slim(facts: dict[str, Any]) -> dict[str, Any]:
    """Without what another field says too: the recipe's rate is the run's, pictures are known by their hash."""
    if "failed" in facts:
        return facts
    recipe = {key: value for key, value in facts["recipe"].items() if key != "lr"}
    recipe |= {key: value for key, value in LATER.items() if "mixup" in recipe and key not in recipe}
    return {**facts, "recipe": recipe, "data": {key: facts["data"][key] for key in ("hash", "sizes")}}


def row(backbone: str, method: str, rates: list[dict[str, Any]]) -> dict[str, Any]:
    """The run with the best validation accuracy of the rates that are done; the first of equals, the method's own rate."""
    head = {"backbone": backbone, "method": method}
    refused = next((facts["refused"] for facts in rates if "refused" in facts), None)
    if refused:
        return {**head, "refused": refused}
    done = [facts for facts in rates if "val_accuracy" in facts]
    head["rates_done"] = len(done)
    head["failed"] = {
        f"x{facts['factor']:.3g}": facts["failed"].splitlines()[0] for facts in rates if "failed" in facts
    }
    if not done:
        return head
    best = max(done, key=lambda facts: facts["val_accuracy"])
    return {
        **head, "label": label_of(best), "preset": best["preset"], "factor": best["factor"], "lr": best["lr_used"],
        "test_accuracy": best["test_accuracy"], "val_accuracy": best["val_accuracy"], "trained": best["trainable"]["total"],
        "epochs": best["epochs"], "images_per_cpu_second": best["images_per_cpu_second"],
        "memory_bytes": best["timing"]["peak_memory_bytes"], "epoch_seconds": best.get("epoch_seconds"),
    }  # fmt: skip


def label_of(facts: dict[str, Any]) -> str:
    """How the method is called on this backbone today."""
    from svp.methods.base import options_of
    from svp.registry import method_class

    method = facts["method"]
    cls = method_class(method)
    return cls.label(site_of(facts["backbone"]), options_of(cls, facts["options"][method], method)) or method


@functools.cache
def site_of(backbone: str) -> Any:
    return svp.create_backbone(backbone).site()


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("source")
    words.add_argument("out", type=Path)
    words.add_argument("--img-size", type=int, default=32)
    words.add_argument("--epochs", type=int, default=10)
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--threads", type=int, default=1)
    words.add_argument("--only", default="", metavar="NAME,…", help="backbones and methods")
    words.add_argument("--retry", action="store_true", help="run again what failed")
    words.add_argument(
        "--report", nargs="?", const=RESULTS, type=Path, metavar="FILE", help="write the JSON, run nothing"
    )
    opt = words.parse_args()
    work = narrowed(cells(), opt.only)
    if opt.report is None:
        run_all(work, opt)
        return
    found = report(work, opt.out)
    write(opt.report, found)
    print(f"{len(found['runs'])} runs: {opt.report}")


if __name__ == "__main__":
    main()
