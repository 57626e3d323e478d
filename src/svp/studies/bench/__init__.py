"""`svp bench`: our step beside its peers and the floor, measured in turn after a check of every result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from svp.errors import SvpError, unknown
from svp.ops import native
from svp.studies.bench.check import check
from svp.studies.bench.measure import measured
from svp.studies.bench.peers import PEERS
from svp.studies.bench.setting import Setting


def bench(
    setting: Setting,
    *,
    sizes: Sequence[tuple[int, int]],
    threads: Sequence[int],
    seconds: float = 60.0,
    only: Sequence[str] | None = None,
    with_memory: bool = True,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Everything that is measured: {"checks", "left_out", "runs"}.

    setting   network, method, device and precision; its img_size, batch_size and threads are those of `sizes`, `threads`
    sizes     (img_size, batch_size) pairs
    seconds   about how long the fast rows of one size are measured
    Raises SvpError for a row that computes something else than the reference.
    """
    rows, left_out = chosen(setting, only)
    native.keep_freed_memory()
    tell("checking results against the reference in float64")
    checks = check(setting.but(img_size=sizes[0][0]), rows)
    runs = [
        measured(
            setting.but(img_size=size, batch_size=batch, threads=count), rows, seconds=seconds,
            with_memory=with_memory, tell=tell,
        )
        for count in threads for size, batch in sizes
    ]  # fmt: skip
    return {"checks": checks, "left_out": left_out, "runs": runs}


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
