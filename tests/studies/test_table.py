"""The table over runs: intervals, seeds in their order, what was measured and what selected it."""

import pytest

from svp.studies.table import Line, as_dict, baseline, binomial_interval, cells, interval, lines


def result(seed, test, val=0.5, selection="val", speed=100.0, memory=2**30, seconds=60.0):
    """What the table reads of a result.json."""
    timing = {"images_per_second": speed, "peak_memory_bytes": memory, "seconds": seconds}
    return {
        "seed": seed, "test_accuracy": test, "val_accuracy": val, "selection": selection, "trainable": {"total": 1234},
        "timing": timing,
    }  # fmt: skip


@pytest.mark.parametrize(
    "values,level,half",
    [
        ((0.5, 0.7), 0.95, 12.706205 * 0.1),  # t(1), and the standard error 0.2 / sqrt(2) / sqrt(2)
        ((0.1, 0.2, 0.3), 0.95, 4.302653 * 0.1 / 3**0.5),
        ((0.1, 0.2, 0.3), 0.9, 2.919986 * 0.1 / 3**0.5),
        ((0.8, 0.8, 0.8), 0.95, 0.0),
        ((0.8,), 0.95, None),
        ((), 0.95, None),
    ],
)
def test_the_interval_of_a_mean_is_students(values, level, half):
    assert interval(values, level) == (half if half is None else pytest.approx(half, rel=1e-6, abs=1e-12))


@pytest.mark.parametrize(
    "right,count,low,high",  # Newcombe 1998, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_of_a_fraction_is_wilsons(right, count, low, high):
    assert binomial_interval(right / count, count) == pytest.approx((low, high), abs=5e-5)
    assert binomial_interval(1 - right / count, count) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_seeds_stand_in_order_and_methods_as_they_came():
    found = lines(
        [("svp", result(2, 0.9, 0.7)), ("linear", result(0, 0.4)), ("svp", result(10, 0.7, 0.9)), ("svp", result(0, 0.8))]
    )  # fmt: skip
    assert [line.label for line in found] == ["svp", "linear"]
    assert found[0].seeds == (0, 2, 10) and found[0].accuracy == (0.8, 0.9, 0.7)
    assert found[0].val_accuracy == (0.5, 0.7, 0.9) and found[0].mean == pytest.approx(0.8)
    assert found[0].half_width == pytest.approx(4.302653 * 0.1 / 3**0.5) and found[1].half_width is None
    assert as_dict(found[0])["seeds"] == [0, 2, 10] and as_dict(found[0])["accuracy"] == [0.8, 0.9, 0.7]


def test_what_was_measured_stands_above_it():
    (tested,) = lines([("svp", result(0, 0.814, 0.5))])
    assert cells(tested) == {
        "method": "svp", "trained": "1,234", "test %": "81.4", "val %": "50.0", "images/s": "100", "memory": "1,024 MiB",
        "time": "60 s",
    }  # fmt: skip
    (chosen,) = lines([("svp", result(0, 0.814, None, "test_best"))])
    assert cells(chosen)["test % (selected on test)"] == "81.4" and cells(chosen)["val %"] == "-"
    assert as_dict(chosen)["selection"] == "test_best" and as_dict(chosen)["split"] == "test"
    (untested,) = lines([("svp", result(0, None, 0.625))])
    assert untested.split == "val" and untested.accuracy == untested.val_accuracy == (0.625,)
    assert cells(untested)["val %"] == "62.5" and "test %" not in cells(untested)


def test_costs_are_means_of_what_is_known():
    (line,) = lines(
        [("svp", result(0, 0.8, speed=100.0, memory=None, seconds=50.0)), ("svp", result(1, 0.6, speed=None, memory=None))]
    )  # fmt: skip
    assert (line.images_per_second, line.memory_bytes, line.seconds) == (100.0, None, 55.0)
    assert cells(line)["memory"] == "-" and cells(line)["test %"] == "70.0 ± 127.1"


def test_a_baseline_is_a_number_alone():
    assert baseline("pixels", 0.25) == Line("pixels", "test", (), (0.25,), ())
    shown = cells(baseline("pixels", 0.25))
    assert shown.pop("method") == "pixels" and shown.pop("test %") == "25.0" and set(shown.values()) == {"-"}
