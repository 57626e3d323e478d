"""Options as frozen dataclasses: one `option()` feeds the flag, the help page, `svp list`, the config file and the message."""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from svp.errors import SvpError, unknown

T = TypeVar("T")


def option(
    default: Any, help: str, *, low: float | None = None, high: float | None = None, above: float | None = None
) -> Any:
    """A dataclass field with its help; low <= value <= high and value > above are checked by `build`."""
    metadata = {"help": help, "low": low, "high": high, "above": above}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def build(cls: type[T], values: Mapping[str, Any], what: str, listing: str = "") -> T:
    """An instance of the options dataclass `cls` from plain values (numbers, or the words a user typed).

    Raises SvpError (kind "usage") for a key that `cls` lacks, naming the nearest, a value of the wrong type or range.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise unknown(f"option of {what} named", key, fields, listing)
    return cls(**{key: _checked(fields[key], hints[key], value, what) for key, value in values.items()})


def changed(instance: T, values: Mapping[str, Any], what: str, listing: str = "") -> T:
    """A copy of `instance` with some fields replaced, checked as `build` does."""
    return build(type(instance), {**dataclasses.asdict(instance), **values}, what, listing)  # type: ignore[call-overload]


@dataclass(frozen=True)
class Row:
    """One option as a table shows it."""

    name: str
    type: str
    default: Any
    help: str


def describe(cls: type) -> list[Row]:
    """All options of the dataclass `cls`, in order."""
    hints = typing.get_type_hints(cls)
    return [
        Row(f.name, type_words(hints[f.name]), default_of(f), f.metadata.get("help", ""))
        for f in dataclasses.fields(cls)
    ]


def default_of(f: dataclasses.Field) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def assignments(texts: typing.Iterable[str], flag: str) -> dict[str, Any]:
    """`["hidden=32", "layers=[0,1]"]` -> {"hidden": 32, "layers": [0, 1]}; the values are read as YAML scalars or lists."""
    import yaml

    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise SvpError(f"{flag} {text!r} is not OPTION=VALUE", f"for example {flag} hidden=32", kind="usage")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError) as err:  # ValueError: the 45th of month 13, 5,000 digits
            raise SvpError(
                f"{flag} {text!r}: the value cannot be read", f"quote it: {flag} '{key}=…'", kind="usage"
            ) from err
    return found


# -- types ------------------------------------------------------------------------------------------------------------


def type_words(hint: Any) -> str:
    """How a person reads a type: "int", "one of none, silu", "list of int or none"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join(type_words(a) for a in args)
    if origin in (tuple, list):
        return f"list of {type_words(args[0])}" if args else "list"
    words = {type(None): "none", bool: "true/false", int: "integer", float: "number", str: "text"}
    return words.get(hint) or str(getattr(hint, "__name__", hint))


def _typed(value: Any) -> str:
    """A value as one types it after `=`."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_typed, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _checked(f: dataclasses.Field, hint: Any, value: Any, what: str) -> Any:
    try:
        value = _converted(hint, value)
    except (TypeError, ValueError, OverflowError) as err:
        problem = f"{f.name} of {what} is {value!r}, expected {type_words(hint)}"
        raise SvpError(problem, f"the default is {_typed(default_of(f))}", kind="usage") from err
    for number in value if isinstance(value, tuple) else (value,):
        _check_range(f, number, what)
    return value


def _check_range(f: dataclasses.Field, number: Any, what: str) -> None:
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return
    low: Any = f.metadata.get("low")
    above: Any = f.metadata.get("above")
    high: Any = f.metadata.get("high")
    tests: list[tuple[Any, Callable[[], bool], str]] = [
        (low, lambda: number >= low, f"at least {low}"),
        (above, lambda: number > above, f"above {above}"),
        (high, lambda: number <= high, f"at most {high}"),
    ]
    asked = [(fits, words) for bound, fits, words in tests if bound is not None]
    is_finite = isinstance(number, int) or math.isfinite(number)  # of a huge integer isfinite makes an OverflowError
    if not is_finite or not all(fits() for fits, _ in asked):
        wanted = " and ".join(["a finite number"] * (not is_finite) + [words for _, words in asked])
        raise SvpError(
            f"{f.name} of {what} is {number}, expected {wanted}",
            f"the default is {_typed(default_of(f))}",
            kind="usage",
        )


def _converted(hint: Any, value: Any) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        return one_of(args, value)
    if origin in (Union, types.UnionType):
        return _first_that_fits(args, value)
    if origin in (tuple, list):
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise TypeError
        return tuple(_converted(args[0], v) for v in value)
    if origin is dict or hint is dict:
        return dict(value)
    return _plain(hint, value)


def one_of(choices: tuple, value: Any) -> Any:
    """The choice that a value from YAML or Python means; raises ValueError where it is none."""
    if isinstance(value, bool) and "off" in choices and not value:  # YAML reads `off` as false
        value = "off"
    if value is None and "none" in choices:
        value = "none"
    if value not in choices:
        raise ValueError
    return value


def _first_that_fits(hints: tuple, value: Any) -> Any:
    for hint in sorted(hints, key=lambda h: h is str):  # text accepts nearly everything: ask it last
        try:
            return _converted(hint, value)
        except (TypeError, ValueError, OverflowError):
            continue
    raise TypeError


def _plain(hint: type, value: Any) -> Any:
    if hint is type(None):
        if value is None or value == "none":
            return None
        raise TypeError
    if hint is bool or isinstance(value, bool):
        if hint is bool and isinstance(value, bool):
            return value
        raise TypeError
    if isinstance(value, numbers.Integral):
        value = int(value)  # numpy's too
    elif isinstance(value, numbers.Real):
        value = float(value)
    if hint is float and isinstance(value, (int, float, str)):
        return float(value)  # YAML reads 1e-3 as text
    if hint is int and isinstance(value, (int, float)) and value == int(value):
        return int(value)
    if hint is str and isinstance(value, (str, int, float)):
        return str(value)
    if isinstance(value, hint):
        return value
    raise TypeError
