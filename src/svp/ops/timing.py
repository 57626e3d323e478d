"""Seconds of several functions, measured in turn in one process: ratios then survive a machine that others use too."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch


@dataclass
class Timing:
    """Every measured call of one function, in order: seconds by the wall clock, and of CPU time over all threads."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, wall: float, cpu: float) -> None:
        self.wall.append(wall)
        self.cpu.append(cpu)

    def chosen(self, alone: bool) -> list[float]:
        """What ratios are made of: CPU time where one thread computes, since others cannot stretch it; else the clock."""
        return self.cpu if alone else self.wall


def spread(seconds: list[float]) -> dict[str, object]:
    """The least, the median and all values."""
    return {"min": min(seconds), "median": statistics.median(seconds), "all": seconds}


def timed(function: Callable[[], object], device: str = "cpu") -> tuple[float, float]:
    """(wall, CPU) seconds of one call; on a GPU until it has finished."""
    kinds = {"cuda": lambda: torch.cuda.synchronize(device), "mps": torch.mps.synchronize}
    wait = kinds.get(device.partition(":")[0], _nothing)
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    wait()
    return time.perf_counter() - wall, time.process_time() - cpu


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    seconds: float = math.inf,
    seldom: Collection[str] = (),
    device: str = "cpu",
) -> dict[str, Timing]:
    """Each function once to warm up, whatever that takes, then one after another in every round.

    Rounds end after `repeats`, or when another one would not fit into `seconds`; there is always one. Those in
    `seldom` sit out in two of three rounds.
    """
    found = {name: Timing() for name in functions}
    for function in functions.values():
        function()
    begin, longest = time.perf_counter(), 0.0
    for round_ in range(repeats):
        start = time.perf_counter()
        if round_ and start - begin + longest > seconds:
            break
        for name, function in functions.items():
            if round_ % 3 == 0 or name not in seldom:
                found[name].add(*timed(function, device))
        longest = time.perf_counter() - start
    return found


def _nothing() -> None:
    pass
