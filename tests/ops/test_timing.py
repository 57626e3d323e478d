"""Functions take turns, each as often as asked; the scan's floor is what its formula says."""

import itertools
import time

import pytest

from svp.ops.floor import least, probes, scan_parts
from svp.ops.timing import Timing, interleaved, spread, timed


def test_functions_take_turns_after_a_warm_up():
    said = []
    found = interleaved({name: lambda name=name: said.append(name) for name in "ab"}, 3)
    assert said == ["a", "b"] * 4
    assert all(len(timing.wall) == len(timing.cpu) == 3 for timing in found.values())


def test_seldom_ones_sit_out_in_two_of_three_rounds():
    found = interleaved({"often": int, "slow": int}, 7, seldom=("slow",))
    assert len(found["often"].wall) == 7 and len(found["slow"].wall) == 3


def test_a_round_that_would_not_fit_is_not_begun_but_the_first_always_is():
    clock = itertools.count()
    found = interleaved({"long": lambda: (next(clock), time.sleep(0.05))}, 100, seconds=0.01)
    assert len(found["long"].wall) == 1 and next(clock) == 2  # the warm-up and one round


def test_waiting_takes_time_by_the_clock_and_none_of_the_processor():
    wall, cpu = timed(lambda: time.sleep(0.05))
    assert wall >= 0.05 > 0.04 > cpu
    timing = Timing()
    timing.add(wall, cpu)
    assert timing.chosen(alone=True) == [cpu] and timing.chosen(alone=False) == [wall]


def test_spread_keeps_every_value():
    assert spread([3.0, 1.0, 2.0]) == {"min": 1.0, "median": 2.0, "all": [3.0, 1.0, 2.0]}


def test_the_parts_of_a_scan():
    rates = {"exponentials": 1e9, "multiply-adds": 2e9, "copy": 4e9}
    forward = scan_parts(1e6, 16, False, rates)
    assert forward == {
        "exponentials": pytest.approx(0.019),  # 16 states, softplus' two and the gate
        "multiply-adds": pytest.approx(0.026),
        "bytes": pytest.approx(0.004),
    }
    step = scan_parts(1e6, 16, True, rates)
    assert step["exponentials"] == pytest.approx(2 * forward["exponentials"])  # computed again, not kept
    assert least(step) == pytest.approx(step["exponentials"] + step["multiply-adds"])
    assert least({"exponentials": 1.0, "bytes": 3.0}) == 3.0
    assert "exponentials" not in scan_parts(1e6, 16, False, {"copy": 1e9})


def test_the_machine_shows_its_rates():
    found = probes()
    assert set(found) == {"multiply-adds", "copy", "exponentials"}
    for probe in found.values():
        seconds = timed(probe.call)[0]
        assert probe.work / seconds > 1e6
