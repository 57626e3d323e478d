"""The one exception a user sees: its words, its exit code, its help for mistyped names."""

import pickle

import pytest

from svp.errors import SvpError, nearest, unknown

METHODS = ["svp", "linear", "full", "lora"]


def test_problem_and_hint_are_two_lines():
    assert str(SvpError("it broke", "mend it")) == "it broke\nhint: mend it"
    assert str(SvpError("it broke")) == "it broke"


@pytest.mark.parametrize("kind,code", [("usage", 2), ("data", 1), ("artefact", 1), ("env", 1), ("run", 1)])
def test_only_wrong_usage_exits_with_two(kind, code):
    assert SvpError("it broke", kind=kind).exit_code == code


def test_it_crosses_processes_whole():
    err = pickle.loads(pickle.dumps(SvpError("it broke", "mend it", "data")))
    assert (err.problem, err.hint, err.kind, str(err)) == ("it broke", "mend it", "data", "it broke\nhint: mend it")


@pytest.mark.parametrize(
    "name,found",
    [
        ("lroa", ["lora"]), ("SVP", ["svp"]), ("liner", ["linear"]), ("xyzzy", []), ("ful", ["full"]),
        ("near", ["linear"]), ("in", ["linear"]),
    ],
)  # fmt: skip
def test_nearest_names(name, found):
    assert nearest(name, METHODS) == found


def test_nearest_gives_the_best_three():
    assert nearest("vim", [f"vim{k}" for k in range(9)] + ["vit"])[0].startswith("vim")
    assert len(nearest("vim", [f"vim{k}" for k in range(9)])) == 3


def test_an_unknown_name_is_answered_with_its_relatives():
    err = unknown("method", "lroa", METHODS, "svp list methods")
    assert err.problem == "there is no method 'lroa'" and err.exit_code == 2
    assert err.hint == "did you mean lora?; `svp list methods` shows all"


def test_a_name_like_no_other_is_answered_with_all_where_they_are_few():
    assert unknown("method", "xyzzy", METHODS).hint == "known: svp, linear, full, lora"
    assert unknown("class", "xyzzy", [f"class{k}" for k in range(100)]).hint == ""
