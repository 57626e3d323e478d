"""`svp predict`: labels with probabilities, for people, as CSV or as JSON."""

from __future__ import annotations

import csv
import io
import itertools
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from svp.cli.words import BAD_IMAGE, DEVICE, JSON, KERNEL, RUN_WEIGHTS, Page, examples, say
from svp.errors import SvpError

if TYPE_CHECKING:
    from svp.model import Prediction
    from svp.training.trained import Unread

SECTIONS = {
    "Output": ("top", "as_csv", "as_json", "quiet"),
    "Pictures": ("on_bad_image",),
    "Model": ("weights", "kernel", "device", "batch_size"),
}
TOLD = 20  # names of left-out pictures that are listed


@click.command(
    cls=Page,
    sections=SECTIONS,
    epilog=examples(
        "svp predict runs/flowers photo.jpg",
        "svp predict runs/flowers holiday/ --csv > labels.csv",
        "svp predict runs/flowers holiday/ --top 3 --on-bad-image skip",
        "find /photos -name '*.jpg' -newer last | svp predict runs/flowers - --json",
    ),
)
@click.argument("run")
@click.argument("images", metavar="IMAGE|FOLDER...", nargs=-1, required=True)
@click.option(
    "--top", type=click.IntRange(1, 100_000), metavar="K", help="The K best labels.  [default: 1; with --json 5]"
)
@click.option("--csv", "as_csv", is_flag=True, help="Comma-separated, for programs.")
@click.option("--batch-size", "-b", type=click.IntRange(1, 1_000_000), default=32, show_default=True, help="Pictures of a forward pass.")  # fmt: skip
@click.option("--quiet", "-q", is_flag=True, help="No progress on stderr.")
@RUN_WEIGHTS
@KERNEL
@BAD_IMAGE
@DEVICE
@JSON
def command(**typed: Any) -> None:
    """Label pictures with a trained run.

    RUN is a run folder, its model/, or any adapter folder. A folder of pictures is searched with all below it; - reads the
    names of files from standard input, one a line. With --on-bad-image skip, files that cannot be read are listed at the
    end.
    """
    if typed["as_csv"] and typed["as_json"]:
        raise SvpError("--csv and --json exclude each other", "give one", "usage")
    from svp.data.sources import picture_files
    from svp.training.machine import device_named
    from svp.training.trained import Unread, label, read_trained

    found = read_trained(typed["run"])
    skips, lost = typed["on_bad_image"] == "skip", dict[str, str]()
    files = picture_files(names(typed["images"]), lost if skips else None)
    model = found.model(weights=typed["weights"], kernel=typed["kernel"], device=str(device_named(typed["device"])))
    top = typed["top"] or (5 if typed["as_json"] else 1)
    labels = label(model, files, batch_size=typed["batch_size"], top=top, skip=skips)
    labels = itertools.chain(labels, (Unread(path, reason) for path, reason in lost.items()))
    count = len(files) + len(lost)
    labels, top = counted(labels, count, typed["quiet"]), min(top, model.num_classes)
    if typed["as_json"]:
        bad = print_list(labels)
    else:
        bad = print_csv(labels, top) if typed["as_csv"] else print_lines(labels)
    if bad:
        tell(bad, count)


def names(images: tuple[str, ...]) -> list[str]:
    """The words as they are, - replaced by the lines of standard input."""
    found: list[str] = []
    for word in images:
        if word != "-":
            found.append(word)
            continue
        if sys.stdin.isatty():
            say("reading file names from the keyboard, one a line; Ctrl-D ends")
        lines = [line.rstrip(b"\r") for line in sys.stdin.buffer.read().split(b"\n")]  # names need not be text
        given = [os.fsdecode(line) for line in lines if line.strip()]
        if not given:
            raise SvpError("standard input names no pictures", "ls *.jpg | svp predict RUN -", "usage")
        found += given
    return found


def counted(labels: Iterator[Prediction | Unread], count: int, quiet: bool) -> Iterator[Prediction | Unread]:
    """The same; where a person waits for many, with a bar on stderr."""
    if quiet or count < 100 or not sys.stderr.isatty() or sys.stdout.isatty():  # what scrolls by is progress enough
        yield from labels
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(labels, "pictures", count, console=Console(stderr=True), transient=True)


def readable(labels: Iterator[Prediction | Unread], bad: list[Unread]) -> Iterator[Prediction]:
    """The labels alone; what was left out goes into `bad`."""
    from svp.training.trained import Unread

    for p in labels:
        if isinstance(p, Unread):
            bad.append(p)
        else:
            yield p


def print_lines(labels: Iterator[Prediction | Unread]) -> list[Unread]:
    from svp.data.pictures import shown

    bad: list[Unread] = []
    for p in readable(labels, bad):
        others = ", ".join(f"{name} {value:.1%}" for name, value in p.top5[1:])
        click.echo(f"{p.probability:6.1%}  {p.label}  {shown(p.path)}" + (f"  (then {others})" if others else ""))
    return bad


def print_csv(labels: Iterator[Prediction | Unread], top: int) -> list[Unread]:
    bad: list[Unread] = []
    more = [f"{word}{k}" for k in range(2, top + 1) for word in ("label", "probability")]
    click.echo(_csv_line(["picture", "label", "probability", *more]), nl=False)
    for p in readable(labels, bad):
        click.echo(_csv_line([p.path, *(x for name, value in p.top5 for x in (name, f"{value:.6f}"))]), nl=False)
    return bad


def print_list(labels: Iterator[Prediction | Unread]) -> list[Unread]:
    """One object a picture, in order; one that was left out has an error and no label."""
    from svp.cli.words import print_json
    from svp.training.trained import Unread

    found: list[dict[str, Any]] = []
    bad: list[Unread] = []
    for p in labels:
        if isinstance(p, Unread):
            bad.append(p)
            found.append({"path": p.path, "label": None, "error": p.reason})
        else:
            best = [{"label": name, "probability": value} for name, value in p.top5]
            found.append({"path": p.path, "label": p.label, "probability": p.probability, "top": best})
    if len(bad) < len(found):
        print_json(found)
    return bad


def tell(bad: list[Unread], count: int) -> None:
    """The pictures that were left out; an error when all were."""
    if len(bad) == count:
        first = "; ".join(p.reason for p in bad[:3])
        raise SvpError(f"none of the {count} pictures can be read: {first}", "convert them to PNG or JPEG", "data")
    say(f"note: {len(bad)} of {count} pictures were left out:")
    for p in bad[:TOLD]:
        say(f"  {p.reason}")
    if len(bad) > TOLD:
        say(f"  … and {len(bad) - TOLD} more")


def _csv_line(cells: list[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()
