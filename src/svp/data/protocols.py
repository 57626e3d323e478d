"""Protocols: how results are made comparable. A row lists what differs from the default."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from svp.errors import unknown
from svp.options import changed, option


@dataclass(frozen=True)
class Protocol:
    """Split, evaluation preprocessing and selection rule of a result."""

    name: str = option("default", "the row's name")
    val_fraction: float = option(
        0.2, "cut from train where there is no validation split, stratified", above=0.0, high=0.9
    )
    val_seed: int = option(0, "seed of that cut", low=0)
    select: Literal["val", "test_best"] = option(
        "val", "which split chooses the epoch; test_best repeats a paper's leak"
    )
    train_on_val: bool = option(False, "join the validation split to train (selection must then be test_best)")
    resize_ratio: float | None = option(
        None, "crop / resized shorter side; none: the backbone's own", above=0.0, high=1.0
    )
    source: str = option("ours", "where the rule is from")

    def but(self, **changes: Any) -> Protocol:
        return replace(self, **changes)


DEFAULT = Protocol()
PROTOCOLS = {
    "default": DEFAULT,
    "svp-paper": DEFAULT.but(
        name="svp-paper", resize_ratio=0.875, source="arXiv 2412.08947, section 4; the selection rule is not given there: validation"
    ),
    "svp-released": DEFAULT.but(
        name="svp-released", resize_ratio=0.875, select="test_best",
        source="repository zhoujiahuan1991/AAAI2025-SVP, main.py: the best test accuracy over the epochs is what counts",
    ),
}  # fmt: skip


def protocol_named(name: str | Protocol, **changes: Any) -> Protocol:
    """A row by its name, with fields changed."""
    if isinstance(name, Protocol):
        return changed(name, changes, "protocol") if changes else name
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS, "svp list protocols")
    return changed(PROTOCOLS[name], changes, f"protocol {name}")
