"""Options: one field is flag, help, check and config key."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svp.errors import SvpError
from svp.options import Row, assignments, build, changed, describe, option, type_words


@dataclass(frozen=True)
class Opt:
    hidden: int | Literal["relative"] = option(64, "width", low=1)
    rank: int = option(4, "rank", low=1, high=8)
    scale: float = option(1.0, "factor", above=0.0)
    act: Literal["none", "off", "silu"] = option("silu", "activation")
    layers: tuple[int, ...] | None = option(None, "which blocks")
    names: tuple[str, ...] = option(("X",), "where")
    table: dict = option({"a": 1}, "anything")
    bias: bool = option(True, "biases")
    text: str = option("", "free text")
    whatever: Any = option(None, "unchecked")


def made(**values):
    return build(Opt, values, "method toy", "svp list methods toy")


GOOD = [
    ("hidden", 32, 32), ("hidden", 32.0, 32), ("hidden", "relative", "relative"),
    ("scale", "1e-3", 1e-3), ("scale", 2, 2.0), ("act", "silu", "silu"), ("act", None, "none"), ("act", False, "off"),
    ("layers", [0, 2], (0, 2)), ("layers", (), ()), ("layers", None, None), ("layers", "none", None),
    ("names", ["X", "Z"], ("X", "Z")), ("names", [1], ("1",)), ("table", {"b": 2}, {"b": 2}), ("bias", False, False),
    ("text", 5, "5"), ("text", 0.5, "0.5"), ("whatever", object, object), ("rank", 8, 8), ("rank", 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("key,value,want", GOOD)
def test_what_is_meant_is_taken(key, value, want):
    got = getattr(made(**{key: value}), key)
    assert got == want and type(got) is type(want)


BAD = [
    ("hidden", 0, "hidden of method toy is 0, expected at least 1"),
    ("hidden", "32", "expected integer or one of relative"),
    ("hidden", 2.5, "expected integer or one of relative"),
    ("hidden", True, "expected integer or one of relative"),
    ("hidden", float("inf"), "expected integer or one of relative"),
    ("rank", 9, "rank of method toy is 9, expected at least 1 and at most 8"),
    ("rank", 10**400, "expected at least 1 and at most 8"),
    ("rank", "four", "rank of method toy is 'four', expected integer"),
    ("rank", float("inf"), "expected integer"),
    ("rank", None, "expected integer"),
    ("scale", 0.0, "scale of method toy is 0.0, expected above 0.0"),
    ("scale", float("nan"), "expected a finite number and above 0.0"),
    ("scale", float("-inf"), "a finite number"),
    ("scale", "wide", "expected number"),
    ("scale", [1.0], "expected number"),
    ("scale", 10**400, "expected number"),
    ("act", "tanh", "act of method toy is 'tanh', expected one of none, off, silu"),
    ("act", True, "expected one of"),
    ("act", ["silu"], "expected one of"),
    ("layers", "0,2", "expected list of integer or none"),
    ("layers", [0, "x"], "expected list of integer or none"),
    ("layers", 3, "expected list of integer or none"),
    ("names", "X", "expected list of text"),
    ("table", 3, "table of method toy is 3"),
    ("bias", "yes", "bias of method toy is 'yes', expected true/false"),
    ("bias", 1, "expected true/false"),
    ("text", None, "expected text"),
    ("text", True, "expected text"),
]


@pytest.mark.parametrize("key,value,problem", BAD, ids=lambda x: str(x)[:20])
def test_what_is_not_gets_a_sentence(key, value, problem):
    with pytest.raises(SvpError) as err:
        made(**{key: value})
    assert problem in err.value.problem and "\n" not in err.value.problem
    assert err.value.exit_code == 2 and err.value.hint.startswith("the default is")


def test_an_unknown_key_names_its_nearest():
    with pytest.raises(SvpError) as err:
        made(hiden=3)
    assert err.value.problem == "there is no option of method toy named 'hiden'"
    assert err.value.hint == "did you mean hidden?; `svp list methods toy` shows all"


@given(
    key=st.sampled_from([f for f in Opt.__dataclass_fields__ if f != "whatever"]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), st.lists, max_leaves=4
    ),
)
def test_any_value_is_taken_or_gets_one_sentence(key, value):
    try:
        made(**{key: value})
    except SvpError as err:
        assert err.kind == "usage" and key in err.problem


def test_a_copy_is_checked_and_the_original_stays():
    first = made(rank=2)
    assert changed(first, {"rank": 3}, "method toy") == made(rank=3) and first.rank == 2
    with pytest.raises(SvpError, match="at most 8"):
        changed(first, {"rank": 100}, "method toy")


def test_defaults_that_can_be_changed_are_not_shared():
    assert made().table is not made().table


def test_all_options_are_described_in_order():
    rows = describe(Opt)
    assert rows[0] == Row("hidden", "integer or one of relative", 64, "width")
    assert [row.name for row in rows] == list(Opt.__dataclass_fields__)
    assert rows[5] == Row("names", "list of text", ("X",), "where")


def test_types_in_words():
    assert [type_words(t) for t in (int, float, str, bool, list, dict)] == [
        "integer", "number", "text", "true/false", "list", "dict",
    ]  # fmt: skip


def test_assignments_are_read_as_yaml():
    words = ["hidden=32", "layers=[0, 1]", "act = none", "scale=1e-3", "x=a=b", "empty="]
    found = assignments(words, "-s")
    assert found == {"hidden": 32, "layers": [0, 1], "act": "none", "scale": "1e-3", "x": "a=b", "empty": None}
    assert made(scale=found["scale"]).scale == 1e-3


@pytest.mark.parametrize("text,problem", [("hidden", "is not OPTION=VALUE"), ("=3", "is not OPTION=VALUE"),
                                          ("layers=[0,", "cannot be read"), ("a=!!python/object:x", "cannot be read"),
                                          ("a=2024-13-45", "cannot be read"), ("a=" + "[" * 5000, "cannot be read"),
                                          ("a=" + "9" * 5000, "cannot be read")], ids=lambda x: x[:20])  # fmt: skip
def test_an_assignment_that_is_none_gets_a_sentence(text, problem):
    with pytest.raises(SvpError, match=problem) as err:
        assignments([text], "-s")
    assert err.value.exit_code == 2 and text in err.value.problem


def test_nothing_of_yaml_is_executed():
    with pytest.raises(SvpError):
        assignments(["a=!!python/object/apply:os.getcwd []"], "-s")
