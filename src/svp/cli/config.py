"""A config file as values of a plan: config.yaml as a run writes it, or any part of it by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from svp.errors import SvpError, nearest
from svp.options import build, one_of
from svp.registry import overrides_of
from svp.training.config import read_yaml
from svp.training.recipe import check_version


def read_config(path: str) -> dict[str, Any]:
    """The settings of a file, flat; raises SvpError (kind "usage") naming the line of what is unknown or of another form."""
    values, lines = read_yaml(path)
    check_version(values.get("svp_version"), path)
    for key in (key for key in values if key not in ROWS):
        close = nearest(key, list(ROWS))
        raise SvpError(
            f"{path}, line {lines.get(key, 1)}: there is no setting '{key}'",
            f"did you mean {close[0]}?" if close else f"settings are {', '.join(ROWS)}", "usage",
        )  # fmt: skip
    found: dict[str, Any] = {}
    for key, row in ROWS.items():
        if values.get(key) is None:
            continue
        try:
            found |= row.read(values[key])
        except SvpError as err:
            raise SvpError(f"{path}, {key} from line {lines.get(key, 1)}: {err.problem}", err.hint, "usage") from err
        except (AttributeError, KeyError, TypeError, ValueError) as err:
            raise SvpError(
                f"{path}, line {lines.get(key, 1)}: {key} is {str(values[key])[:80]!r}, expected {row.expected}",
                "config.yaml of a run shows the form", "usage",
            ) from err  # fmt: skip
    if "recipe" in found:
        found["recipe_line"] = lines.get("recipe", 1)
    return found


class Row(NamedTuple):
    """What a setting must be, and its values for the plan; `read` raises what Python does where the form is another."""

    expected: str
    read: Callable[[Any], dict[str, Any]]


def fits(is_so: bool) -> None:
    if not is_so:
        raise ValueError


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_size(value: Any) -> bool:
    return is_count(value) or (isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_count, value)))


# -- rows --------------------------------------------------------------------------------------------------------------


def text(key: str) -> Row:
    def read(value: Any) -> dict[str, Any]:
        fits(isinstance(value, str))
        return {key: value}

    return Row("text", read)


def choice(key: str, *choices: str) -> Row:
    def read(value: Any) -> dict[str, Any]:
        return {key: one_of(choices, value)}

    return Row(" or ".join(choices), read)


def noted(value: Any) -> dict[str, Any]:
    """Of a setting that a run writes for its reader."""
    return {}


def size(value: Any) -> dict[str, Any]:
    fits(is_size(value))
    return {"img_size": value}


def backbone(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"backbone": value}
    fits(is_size(value["img_size"]))
    overrides = overrides_of(value["overrides"])
    overrides |= {key: value[key] for key in ("pos_resize", "seed") if key in value}
    fits(is_count(overrides.get("seed", 0)))
    return {"backbone": str(value["name"]), "weights": value["weights"], "kernel": value["kernel"],
            "img_size": tuple(value["img_size"]), "overrides": overrides, "fingerprint": value.get("fingerprint")}  # fmt: skip


def methods(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"method": value}
    specs = tuple((part["name"], dict(part["options"])) for part in value)
    fits(all(isinstance(name, str) for name, _ in specs))
    return {"specs": specs}


def recipe(value: Any) -> dict[str, Any]:
    fits(isinstance(value, (str, dict)))
    return {"recipe": value}


def protocol(value: Any) -> dict[str, Any]:
    from svp.data.protocols import Protocol

    fits(isinstance(value, (str, dict)))
    is_name = isinstance(value, str)
    return {"protocol": value if is_name else build(Protocol, value, "the protocol", "svp list protocols")}


def seeds(value: Any) -> dict[str, Any]:
    several = value if isinstance(value, list) else [value]
    fits(bool(several) and all(is_count(seed) and seed < 2**63 for seed in several))
    return {"seeds": tuple(several)}


def reading(value: Any) -> dict[str, Any]:
    fits(value.get("on_bad_image", "error") in ("error", "skip"))
    fits(all(is_count(value.get(key, 1)) for key in ("max_pixels", "seed")))
    return {"reading": value}


def data(value: Any) -> dict[str, Any]:
    return {"hash": value.get("hash")}


def machine(value: Any) -> dict[str, Any]:
    fits(is_count(value.get("workers") or 0))
    return {"machine": value}


A_METHOD = "a name, or a list of {name, options}"
A_SEED = "whole numbers from 0, at least one"
ROWS: dict[str, Row] = {  # a later row has the last word where two speak of one thing
    "svp_version": Row("the version of a run", noted),
    "source": text("source"),
    "protocol": Row("a name, or fields of a protocol", protocol),
    "weights": text("weights"),
    "img_size": Row("a whole number of pixels, or [height, width]", size),
    "backbone": Row("a name, or what config.yaml of a run holds there", backbone),
    "method": Row(A_METHOD, methods),
    "methods": Row(A_METHOD, methods),
    "head": choice("head", "linear", "two_linear", "method"),
    "recipe": Row("a name, or fields of a recipe", recipe),
    "lr_used": Row("the learning rate of a run", noted),
    "seed": Row(A_SEED, seeds),
    "seeds": Row(A_SEED, seeds),
    "amp": choice("amp", "auto", "off", "bf16", "fp16"),
    "data": Row("what config.yaml of a run holds there", data),
    "reading": Row("on_bad_image, error or skip, and max_pixels and seed, whole numbers", reading),
    "machine": Row("device and workers, a whole number from 0", machine),
}
