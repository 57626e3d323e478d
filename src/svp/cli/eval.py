"""`svp eval`: the scores of a trained run on a split, and its confusion matrix as a picture."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from svp.cli.words import (
    AMP,
    BAD_IMAGE,
    DEVICE,
    JSON,
    KERNEL,
    RUN_WEIGHTS,
    WORKERS,
    Page,
    columns,
    examples,
    note,
    percent,
    say,
    say_skipped,
    short_name,
)
from svp.errors import SvpError

if TYPE_CHECKING:
    from svp.data.splits import Splits
    from svp.training.evaluate import Evaluation
    from svp.training.trained import Trained

SECTIONS = {
    "Data": ("split", "on_bad_image"),
    "Model": ("weights", "kernel"),
    "Run": ("out", "device", "amp", "batch_size", "workers", "as_json", "quiet"),
}


@click.command(
    cls=Page,
    sections=SECTIONS,
    epilog=examples(
        "svp eval runs/digits-svp-vim_nano-s0",
        "svp eval runs/photos folder:newer-photos/ --out newer/",
        "svp eval runs/photos --split val --json | jq .mean_class_accuracy",
    ),
)
@click.argument("run")
@click.argument("source", required=False)
@click.option("--split", type=click.Choice(["test", "val", "train"]), help="Which pictures.  [default: test, or val where there is no test]")  # fmt: skip
@click.option("--out", metavar="FOLDER", help="Where scores and picture go.  [default: RUN/eval, of other pictures RUN/eval/SOURCE]")  # fmt: skip
@click.option(
    "--batch-size", "-b", type=click.IntRange(1, 1_000_000), help="Pictures of a forward pass.  [default: the run's]"
)
@click.option("--quiet", "-q", is_flag=True, help="Only the scores.")
@RUN_WEIGHTS
@KERNEL
@BAD_IMAGE
@DEVICE
@AMP
@WORKERS
@JSON
def command(**typed: Any) -> None:
    """Measure a trained run: accuracy, accuracy per class, confusion, calibration.

    RUN is a run folder, its model/, or any adapter folder. SOURCE is what it was trained on, if nothing else is given; of
    another one its test split is measured, or where it has none all its pictures. The scores and the confusion matrix are
    also written to a folder.
    """
    from svp.training.evaluate import evaluate
    from svp.training.machine import device_named
    from svp.training.trained import read_trained

    found = read_trained(typed["run"])
    device = device_named(typed["device"])
    data, own = data_of(found, typed)
    split = typed["split"] or ("val" if data.test is None else "test")
    data.split(split)
    if typed["split"] is None and data.test is None:
        note(
            f"{data.source} has no test split: validation is measured, on which the epoch was selected", typed["quiet"]
        )
    changed = bool(found.settings.get("data")) and not own
    if changed and same_place(typed["source"], found.source):
        note(f"the pictures of {data.source} have changed since training: some that are measured may have been trained on", typed["quiet"])  # fmt: skip
    beside = "" if not typed["source"] or own else short_name(data.source)
    out = made(Path(typed["out"] or found.home / "eval" / beside))
    model = found.model(weights=typed["weights"], kernel=typed["kernel"], device=str(device))
    scores = evaluate(
        model, data, split, batch_size=typed["batch_size"] or found.batch_size, device=str(device),
        amp=found.amp(device.type) if typed["amp"] == "auto" else typed["amp"], workers=typed["workers"],  # type: ignore[arg-type]
        seed=found.settings.get("seed", 0),
    )  # fmt: skip
    what = f"{model.method_name} on {model.backbone.name}"
    files = keep(out, scores, what, data)
    if typed["as_json"]:
        from svp.cli.words import print_json

        print_json(
            {"run": str(found.home), "source": data.source, **scores.as_dict(), **files, "skipped": data.skipped}
        )
    else:
        show(scores, what, data)
        say(f"confusion matrix: {files['picture']}", typed["quiet"])
    if not typed["source"]:
        compare(found, changed, scores, typed["quiet"])
    say_skipped(data.skipped)


def data_of(found: Trained, typed: dict[str, Any]) -> tuple[Splits, bool]:
    """The splits of SOURCE, all its pictures where no split is asked for; else of the run's own source, as the run read it.

    Beside them whether they are those that the run was trained on, which to find out may mean reading them all.
    """
    from svp.data.sources import open_data, open_whole

    source = typed["source"] or found.source
    if source is None:
        raise SvpError(f"{found.home} does not say what it was trained on", f"svp eval {typed['run']} SOURCE", "usage")
    was = found.settings.get("reading") or {}
    is_asked = (
        click.get_current_context().get_parameter_source("on_bad_image") is not click.core.ParameterSource.DEFAULT
    )
    reading = {
        "on_bad_image": typed["on_bad_image"] if is_asked else was.get("on_bad_image", "error"),
        **({"max_pixels": was["max_pixels"]} if "max_pixels" in was else {}),
    }
    cut = {"protocol": found.protocol, "seed": was.get("seed", 0), **reading}  # the validation split as it was cut
    try:
        if typed["source"] and not typed["split"]:
            # the run's own pictures, which may have moved: never those it was trained on
            with contextlib.suppress(SvpError):
                data = open_data(source, **cut)
                if is_own(found, data):
                    return data, True
            return open_whole(source, protocol=found.protocol, **reading), False
        data = open_data(source, **cut)
        return data, is_own(found, data)
    except SvpError as err:
        if typed["source"]:
            raise
        hint = f"svp eval {typed['run']} SOURCE, if the pictures are elsewhere now"
        raise SvpError(f"{err.problem} (it is what {found.home} was trained on)", hint, err.kind) from err


def is_own(found: Trained, data: Splits) -> bool:
    """Whether these are the pictures that the run was trained on; an adapter without a run says nothing of that."""
    return (found.settings.get("data") or {}).get("hash") == data.hash()


def same_place(given: str | None, trained_on: str | None) -> bool:
    """Whether SOURCE is where the run's own pictures lay."""
    if given is None or given == trained_on:
        return True
    here, there = (Path(str(text).partition(":")[2] or str(text)).expanduser() for text in (given, trained_on))
    return here.exists() and there.exists() and here.samefile(there)


def made(folder: Path) -> Path:
    """The folder, made before the work begins: what cannot be written is said now."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise SvpError(f"{folder} cannot be made: {err.strerror or err}", "--out FOLDER", "env") from err
    if not os.access(folder, os.W_OK):
        raise SvpError(f"{folder} cannot be written: no permission", "--out FOLDER", "env")
    return folder


def keep(out: Path, scores: Evaluation, what: str, data: Splits) -> dict[str, str]:
    """Write the scores and the picture; their paths."""
    from svp.training.confusion import confusion_png
    from svp.training.folder import RunFolder, to_json

    folder = RunFolder(out)
    title = f"{what}: {scores.split} of {data.source}\n{percent(scores.accuracy)} % of {scores.count:,} pictures"
    names = {"picture": f"{scores.split}-confusion.png", "scores": f"{scores.split}.json"}
    folder.write(names["picture"], confusion_png(scores, title))
    folder.write(
        names["scores"], to_json({"source": data.source, **scores.as_dict(), "skipped": data.skipped}, indent=2) + "\n"
    )
    return {key: str(out / name) for key, name in names.items()}


def show(scores: Evaluation, what: str, data: Splits) -> None:
    """Whole scores first, then a line a class."""
    from svp.studies.table import binomial_interval

    low, high = binomial_interval(scores.accuracy, scores.count)
    rows = [("accuracy", f"{percent(scores.accuracy)} %", f"between {percent(low)} and {percent(high)} % (95 %, Wilson)"),
            ("mean class accuracy", f"{percent(scores.mean_class_accuracy)} %", "each class counts the same")]  # fmt: skip
    if len(scores.classes) > 5:
        rows.append(("top-5", f"{percent(scores.top5)} %", "the label is among the five best"))
    rows += [("calibration error", f"{percent(scores.ece)} %", "mean gap between confidence and accuracy, 15 bins"),
             ("loss", f"{scores.loss:.3f}", "cross-entropy")]  # fmt: skip
    click.echo(f"{what}, {scores.split} of {data.source}: {scores.count:,} pictures, {len(scores.classes)} classes\n")
    width = max(len(value) for _, value, _ in rows)
    click.echo("\n".join(f"{name:<20} {value:>{width}}  {words}" for name, value, words in rows) + "\n")
    lines = [
        [row["name"], f"{row['pictures']:,}", "-" if row["accuracy"] is None else percent(row["accuracy"]), mistake]
        for row, mistake in zip(scores.as_dict()["classes"], mistakes(scores), strict=True)
    ]
    heads = ["class", "pictures", "right %", "most often taken for"]
    click.echo(columns(heads, lines, right=heads[1:3]))


def mistakes(scores: Evaluation) -> list[str]:
    """For each class the wrong label it gets most often, with the count; empty where there is none."""
    wrong = scores.confusion.copy()
    wrong[range(len(wrong)), range(len(wrong))] = 0
    best = wrong.argmax(1)
    return [f"{scores.classes[j]} ({wrong[i, j]:,})" if wrong[i, j] else "" for i, j in enumerate(best)]


def compare(found: Trained, changed: bool, scores: Evaluation, quiet: bool) -> None:
    """Say when the run's own numbers were others, and why that may be."""
    told = found.result.get(f"{scores.split}_accuracy")
    if told is None or abs(told - scores.accuracy) < 0.5 / scores.count:
        return
    why = "the pictures are not the same" if changed else "another machine, kernel or precision rounds differently"
    note(f"the run itself reported {percent(told)} %: {why}", quiet)
