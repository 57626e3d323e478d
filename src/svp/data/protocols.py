"""Protocols: how results are made comparable. A row lists what differs from the default."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, replace
from typing import Any, Literal

from svp.errors import SvpError, unknown
from svp.options import changed, option


@dataclass(frozen=True)
class Protocol:
    """Split, evaluation preprocessing and selection rule of a result."""

    name: str = option("default", "the row's name")
    val_fraction: float = option(
        0.2, "cut from train where there is no validation split, stratified; 0: none is cut", low=0.0, high=0.9
    )
    val_seed: int = option(0, "seed of that cut, beside the one given to open_data", low=0)
    select: Literal["val", "test_best"] = option(
        "val", "which split chooses the epoch; test_best repeats a paper's leak"
    )
    train_on_val: bool = option(False, "join the validation split to train; select must then be test_best")
    resize_ratio: float | None = option(
        None, "crop / resized shorter side; none: the backbone's own", above=0.0, high=1.0
    )
    source: str = option("ours", "where the rule is from")

    def but(self, **changes: Any) -> Protocol:
        return replace(self, **changes)

    @property
    def needs_val(self) -> bool:
        """Whether a validation split must exist: it chooses the epoch."""
        return self.select == "val"

    def differences(self) -> dict[str, Any]:
        """The fields in which this row is not the default, for `svp list protocols`."""
        fields = ("val_fraction", "val_seed", "select", "train_on_val", "resize_ratio")
        return {key: getattr(self, key) for key in fields if getattr(self, key) != getattr(DEFAULT, key)}


DEFAULT = Protocol()
RELEASED = "repository zhoujiahuan1991/AAAI2025-SVP"
PROTOCOLS = {
    "default": DEFAULT,
    "svp-paper": DEFAULT.but(
        name="svp-paper", resize_ratio=0.875,
        source="arXiv 2412.08947, section 4; neither transforms nor a selection rule are given there: 224 of 256 px, validation",
    ),
    "svp-released": DEFAULT.but(
        name="svp-released", resize_ratio=0.875, val_fraction=0.0, select="test_best",
        source=f"{RELEASED}, main.py: all of train is trained on, the best test accuracy over the epochs is what counts",
    ),
    "svp-released-vtab": DEFAULT.but(
        name="svp-released-vtab", resize_ratio=0.875, val_fraction=0.0, select="test_best", train_on_val=True,
        source=f"{RELEASED}, the VTAB reader: train800val200 is trained on, the best test accuracy counts",
    ),
}  # fmt: skip


def list_protocols(pattern: str = "*") -> list[str]:
    """The names of the rows that match a wildcard pattern."""
    return fnmatch.filter(PROTOCOLS, pattern)


def protocol_named(name: str | Protocol, **changes: Any) -> Protocol:
    """A row by its name, with fields changed; raises SvpError (kind "usage") for what does not exist or fit together."""
    if isinstance(name, Protocol):
        row = changed(name, changes, "protocol") if changes else name
    elif name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS, "svp list protocols")
    else:
        row = changed(PROTOCOLS[name], changes, f"protocol {name}")
    if row.needs_val and (row.train_on_val or not row.val_fraction):
        what = "trains on the validation split" if row.train_on_val else "cuts no validation split"
        problem = f"protocol {row.name} {what}, but chooses the epoch on it"
        raise SvpError(problem, "select=test_best, or leave validation to be cut", "usage")
    return row
