"""`svp bench`: our step beside its peers and the floor, measured in turn after a check of every result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from svp.data.sources import open_data
from svp.errors import SvpError, unknown
from svp.ops import native
from svp.studies.bench.check import check
from svp.studies.bench.feeding import feeding, probe
from svp.studies.bench.measure import measured
from svp.studies.bench.peers import PEERS
from svp.studies.bench.setting import Setting
from svp.studies.bench.sweep import ROWS, sweep


def bench(
    setting: Setting,
    *,
    sizes: Sequence[tuple[int, int]],
    threads: Sequence[int],
    seconds: float = 60.0,
    only: Sequence[str] | None = None,
    with_memory: bool = True,
    sweep_sizes: Sequence[int] = (),
    with_data: bool = True,
    source: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Everything that is measured: {"checks", "left_out", "runs", "sweep", "data", "probe"}.

    setting      network, method, device and precision; its img_size, batch_size and threads are those of `sizes`, `threads`
    sizes        (img_size, batch_size) pairs
    seconds      about how long the fast rows of one size are measured
    sweep_sizes  picture sizes at a constant number of tokens in the batch; (): no sweep
    source       of the pictures that are decoded; None: they are drawn here
    Raises SvpError for a row that computes something else than the reference.
    """
    for size in {*(size for size, _ in sizes), *sweep_sizes}:  # what cannot be measured is said before anything is
        setting.but(img_size=size).shape()
    data = open_data(source) if source is not None and with_data else None
    rows, left_out = chosen(setting, only)
    native.keep_freed_memory()
    tell("checking results against the reference in float64")
    checks = check(setting, list(dict.fromkeys([*rows, *(ROWS if sweep_sizes else ())])))
    budget: dict[str, Any] = dict(seconds=seconds, with_memory=with_memory, tell=tell)
    runs = [
        measured(setting.but(img_size=size, batch_size=batch, threads=count), rows, **budget)
        for count in threads for size, batch in sizes
    ]  # fmt: skip
    last = setting.but(threads=threads[-1])
    swept = sweep(last, sweep_sizes, **budget) if sweep_sizes else []
    fed, probes = [], []
    if with_data:
        for size, batch in sizes:
            here = last.but(img_size=size, batch_size=batch)
            fed.append(feeding(here, data, step_rate(runs, here), tell))
            tell(f"{size} px: a linear probe")
            probes.append(probe(here, seconds))
    return {"checks": checks, "left_out": left_out, "runs": runs, "sweep": swept, "data": fed, "probe": probes}


def step_rate(runs: list[dict[str, Any]], setting: Setting) -> float | None:
    """Images a second of our training step at a size, by the wall clock."""
    for run in runs:
        if (run["img_size"], run["batch_size"], run["threads"]) == (
            setting.img_size,
            setting.batch_size,
            setting.threads,
        ):
            for line in run["rows"]:
                if (line["row"], line["what"]) == ("ours", "train"):
                    return setting.batch_size / line["seconds"]["min"]
    return None


def chosen(setting: Setting, only: Sequence[str] | None) -> tuple[list[str], list[dict[str, str]]]:
    """The rows to measure, and those that cannot be, with the reason; a row asked for by name must be there."""
    rows, left_out = [], []
    for row in only or ():
        if row not in PEERS:
            raise unknown("row", row, PEERS, "svp bench --help")
    for row, peer in PEERS.items():
        if row not in only if only else not peer.by_default:
            continue
        reason = peer.missing(setting)
        if reason is None:
            rows.append(row)
        elif only:
            raise SvpError(f"the row {row} cannot be measured: {reason}", "leave it out of --only", "env")
        else:
            left_out.append({"row": row, "reason": reason})
    return rows, left_out
