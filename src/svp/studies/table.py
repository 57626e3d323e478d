"""A table over runs: one line a method, means and 95 % intervals over seeds, read from result.json's content alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Line:
    """The runs of one method that differ only in their seed.

    select         the protocol's rule: "val", or "test_best" where the epoch was chosen on test
    accuracy       one fraction a seed, on test (on validation where `split` says so)
    trained        numbers that train, head included;  images_per_second, memory_bytes, seconds: means over seeds
    """

    label: str
    split: str
    seeds: tuple[int, ...]
    accuracy: tuple[float, ...]
    val_accuracy: tuple[float, ...]
    select: str = "val"
    trained: int | None = None
    images_per_second: float | None = None
    memory_bytes: float | None = None
    seconds: float | None = None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracy)

    @property
    def half_width(self) -> float | None:
        """Half the 95 % confidence interval of the mean over seeds (Student's t); None for fewer than two."""
        return interval(self.accuracy)


def interval(values: Sequence[float], level: float = 0.95) -> float | None:
    """Half the width of the confidence interval of the mean: t(n - 1) times the standard error; None for n < 2."""
    n = len(values)
    if n < 2:
        return None
    from scipy.stats import t

    return float(t.ppf((1 + level) / 2, n - 1)) * statistics.stdev(values) / math.sqrt(n)


def binomial_interval(right: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a fraction `right` of `count` pictures (Wilson)."""
    centre = (right + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(right * (1 - right) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def lines(results: Sequence[tuple[str, dict[str, Any]]]) -> list[Line]:
    """(label, content of result.json) of runs, in any order of seeds -> one line a label, in order of appearance."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for label, result in results:
        groups.setdefault(label, []).append(result)
    return [_line(label, found) for label, found in groups.items()]


def baseline(label: str, accuracy: float, split: str = "test") -> Line:
    """A line for something that is no run, for example raw pixels."""
    return Line(label, split, (), (accuracy,), ())


def cells(line: Line) -> dict[str, str]:
    """What the table shows of a line, by column."""
    half = line.half_width
    val = {"val %": f"{100 * statistics.fmean(line.val_accuracy):.1f}" if line.val_accuracy else "-"}
    return {
        "method": line.label,
        "trained": "-" if line.trained is None else f"{line.trained:,}",
        f"{line.split} %{' (selected on test)' if line.select == 'test_best' else ''}": f"{100 * line.mean:.1f}"
        + (f" ± {100 * half:.1f}" if half is not None else ""),
        **(val if line.split != "val" else {}),
        "images/s": "-" if line.images_per_second is None else f"{line.images_per_second:,.0f}",
        "memory": "-" if line.memory_bytes is None else f"{line.memory_bytes / 2**20:,.0f} MiB",
        "time": "-" if line.seconds is None else f"{line.seconds:,.0f} s",
    }


def as_dict(line: Line) -> dict[str, Any]:
    """A line for programs: fractions, counts, bytes, seconds."""
    return {
        "method": line.label, "split": line.split, "seeds": list(line.seeds), "accuracy": list(line.accuracy),
        "selection": line.select, "mean": line.mean, "half_width_95": line.half_width, "val_accuracy": list(line.val_accuracy),
        "trained": line.trained, "images_per_second": line.images_per_second, "memory_bytes": line.memory_bytes,
        "seconds": line.seconds,
    }  # fmt: skip


def _line(label: str, found: list[dict[str, Any]]) -> Line:
    found = sorted(found, key=lambda r: r["seed"])
    split = "val" if found[0]["test_accuracy"] is None else "test"
    timing = [r["timing"] for r in found]
    return Line(
        label, split, tuple(r["seed"] for r in found), tuple(r[f"{split}_accuracy"] for r in found),
        tuple(r["val_accuracy"] for r in found if r["val_accuracy"] is not None), found[0].get("selection", "val"),
        found[0]["trainable"]["total"],
        _mean(t["images_per_second"] for t in timing), _mean(t["peak_memory_bytes"] for t in timing),
        _mean(t["seconds"] for t in timing),
    )  # fmt: skip


def _mean(values: Any) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None
