"""What verbs share: examples in help pages, number types that refuse nan, tables, notes on stderr."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from svp.errors import SvpError

MAX_PIXELS = 178_956_970  # data/pictures.py's, which loads Pillow
DEVICE = click.option("--device", metavar="auto|cpu|cuda|mps", default="auto", show_default=True, help="Where to compute.")  # fmt: skip
AMP = click.option(
    "--amp", type=click.Choice(["auto", "off", "bf16", "fp16"]), default="auto", show_default=True,
    help="Precision of the forward pass; scans keep float32.",
)  # fmt: skip
WORKERS = click.option("--workers", type=click.IntRange(0, 256), help="Processes that decode pictures.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
BAD_IMAGE = click.option(
    "--on-bad-image", type=click.Choice(["error", "skip"]), default="error", show_default=True,
    help="What to do with a picture that cannot be read.",
)  # fmt: skip

KERNEL = click.option("--kernel", type=click.Choice(["auto", "reference", "cpu", "triton"]), default="auto", show_default=True, help="Which selective scan answers.")  # fmt: skip
RUN_WEIGHTS = click.option("--weights", metavar="FILE|hf:OWNER/NAME", help="Of the backbone, where they have moved since the run.")  # fmt: skip


class Finite(click.ParamType):
    """A finite number in a range; click itself lets nan and inf pass."""

    name = "number"

    def __init__(self, above: float | None = None, low: float | None = None):
        self.above, self.low = above, low

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is no number", param, ctx)
        wanted = (
            f"above {self.above:g}"
            if self.above is not None
            else f"at least {self.low:g}"
            if self.low is not None
            else ""
        )
        inside = (self.above is None or number > self.above) and (self.low is None or number >= self.low)
        if not math.isfinite(number) or not inside:
            self.fail(f"{value} is not a finite number {wanted}".rstrip(), param, ctx)
        return number


class Seeds(click.ParamType):
    """ "0", "0,1,2" or "0-4" as a tuple of seeds."""

    name = "0,1,2"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        found: list[int] = []
        for part in str(value).split(","):
            first, dash, last = part.strip().partition("-")
            if not first.isdigit() or (dash and not last.isdigit()) or len(first + last) > 18:
                self.fail(f"{value!r} is not a list of seeds such as 0,1,2 or 0-4", param, ctx)
            found += range(int(first), int(last if dash else first) + 1)
        if not found or len(set(found)) < len(found):
            self.fail(f"{value!r} names {'a seed twice' if found else 'no seed'}", param, ctx)
        return tuple(found)


class Counts(click.ParamType):
    """ "8,1" as a tuple of whole numbers from 1."""

    name = "8,1"

    def __init__(self, what: str, most: int = 100_000):
        self.what, self.most = what, most

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if not all(
            part.isascii() and part.isdigit() and len(part) < 9 and 1 <= int(part) <= self.most for part in parts
        ):
            self.fail(f"{value!r} is not a list of {self.what} such as 8,1, each from 1 to {self.most:,}", param, ctx)
        return tuple(map(int, parts))


class Page(click.Command):
    """A help page whose epilog keeps its lines, and whose options stand in groups named by `sections`."""

    def __init__(self, *args: Any, sections: dict[str, Sequence[str]] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.sections = sections or {}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        params = [p for p in self.get_params(ctx) if isinstance(p, click.Option)]  # arguments stand in the text above
        left = {p.name: record for p in params if (record := p.get_help_record(ctx)) is not None}
        for title, names in self.sections.items():
            with formatter.section(title):
                formatter.write_dl([left.pop(name) for name in names if name in left])
        if left:
            with formatter.section("Options"):
                formatter.write_dl(list(left.values()))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.epilog:
            formatter.write("\n" + self.epilog + "\n")


def examples(*lines: str) -> str:
    """The epilog of a help page."""
    return "Examples:\n" + "\n".join(f"  {line}" for line in lines)


def without_dashes(word: str, ctx: click.Context) -> SvpError | None:
    """The error for `epochs=10`, as other programs have it, with what this verb would take; None for any other word."""
    key, equals, value = word.partition("=")
    if not equals or not key.isidentifier():
        return None
    known = {name for p in ctx.command.params for name in p.opts}
    flag = f"--{key.replace('_', '-')}"
    forms = [f"{flag} {value}"] * (flag in known) + [f"-r {key}={value}"] * ("-r" in known)
    return SvpError(
        f"{word} is not understood", f"use {', or '.join(forms)}" if forms else f"{ctx.command_path} --help", "usage"
    )


def short_name(source: str) -> str:
    """The end of a source as the name of a folder: "folder:photos/flowers/" -> "flowers"."""
    return re.sub(r"[^\w.-]+", "-", Path(source.split(":", 1)[-1].rstrip("/\\") or source).name).strip(".") or "data"


def say(text: str, quiet: bool = False) -> None:
    """A line for the person who waits: on stderr; where nobody reads it, the work goes on without."""
    if not quiet:
        try:
            click.echo(text, err=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def note(text: str, quiet: bool = False) -> None:
    say(f"note: {text}", quiet)


def print_json(value: Any) -> None:
    """JSON that every reader accepts: a number that is not finite becomes null."""
    click.echo(json.dumps(_finite(value), indent=2, ensure_ascii=not _writes_unicode()))


def _writes_unicode() -> bool:
    return (getattr(sys.stdout, "encoding", None) or "ascii").lower().startswith("utf")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say_skipped(skipped: Sequence[str]) -> None:
    """Which pictures were left out; asked to be quiet or not."""
    if skipped:
        more = f" … and {len(skipped) - 20} more" if len(skipped) > 20 else ""
        note(f"{len(skipped)} pictures were left out: {'; '.join(skipped[:20])}{more}", False)


def columns(headings: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[str] = ()) -> str:
    """A plain table: headings, a line, rows; columns named in `right` are set flush right."""
    text = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *text, strict=True)]
    place: list[Callable[[str, int], str]] = [str.rjust if name in right else str.ljust for name in headings]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(put(cell, w) for put, cell, w in zip(place, cells, widths, strict=True)).rstrip()

    return "\n".join([line(headings), "  ".join("-" * w for w in widths), *map(line, text)])


def percent(fraction: float | None) -> str:
    return "-" if fraction is None or math.isnan(fraction) else f"{100 * fraction:.1f}"
