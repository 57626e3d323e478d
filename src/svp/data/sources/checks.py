"""What every source of a user's pictures is checked for before it is used."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from svp.data.splits import Part, Split, Splits, with_val
from svp.errors import SvpError


def finished(splits: Splits, skip: bool) -> Splits:
    """Bad pictures left out (when asked), at least two classes, validation cut where there is none, notes made."""
    if skip:
        splits = _without_bad(splits)
    present = np.unique(splits.train.labels)
    if len(present) < 2:
        only = f"'{splits.classes[int(present[0])]}'" if len(present) else "none"
        raise SvpError(
            f"{splits.source} shows one class in training ({only}), at least two are needed",
            "add pictures of another class",
            "data",
        )
    for name, part in (("val", splits.val), ("test", splits.test)):
        strange = sorted(set(np.unique(part.labels)) - set(present)) if part is not None else []
        if strange:
            names = ", ".join(f"'{splits.classes[int(k)]}'" for k in strange[:5])
            raise SvpError(
                f"{splits.source}: {name} has classes that train lacks: {names}",
                "give training pictures of them",
                "data",
            )
        if part is not None and 0 < len(np.unique(part.labels)) < len(present):
            note = f"{name} lacks {len(present) - len(np.unique(part.labels))} of the {len(present)} training classes"
            splits = splits.but(notes=(*splits.notes, note))
    splits = splits if splits.val is not None else with_val(splits)
    if splits.test is None:
        splits = splits.but(notes=(*splits.notes, "there is no test split: validation is what is reported"))
    same = _duplicates(splits)
    return splits.but(notes=(*splits.notes, same)) if same else splits


def _without_bad(splits: Splits) -> Splits:
    """Every picture decoded once; what cannot be is left out and listed."""
    changes: dict[str, Any] = {}
    skipped: list[str] = []
    for name in ("train", "val", "test"):
        part: Split | None = getattr(splits, name)
        if part is None:
            continue
        good = []
        for i in range(len(part)):
            try:
                part.picture(i)
                good.append(i)
            except SvpError as err:
                skipped.append(err.problem)
        if part is not None and len(part) and not good:
            reasons = "; ".join(skipped[:3])
            raise SvpError(
                f"none of the {len(part)} pictures of {splits.source} can be read: {reasons}", "check the files", "data"
            )
        changes[name] = part if len(good) == len(part) else Part(part, np.asarray(good, dtype=np.int64))
    return splits.but(**changes, skipped=tuple(skipped))


def _duplicates(splits: Splits, limit: int = 200_000) -> str:
    """A note when test pictures are in train byte for byte."""
    if splits.test is None or len(splits.train) + len(splits.test) > limit:
        return ""
    seen = {content_hash(splits.train, i) for i in range(len(splits.train))}
    same = [splits.test.name(i) for i in range(len(splits.test)) if content_hash(splits.test, i) in seen]
    if not same:
        return ""
    return f"{len(same)} test pictures are in train too: {', '.join(same[:3])}{' …' if len(same) > 3 else ''}"


def content_hash(split: Split, i: int) -> bytes:
    """sha256 of the encoded picture."""
    while isinstance(split, Part):
        i, split = int(split.index[i]), split.whole
    if hasattr(split, "paths"):
        with open(split.paths[i], "rb") as f:
            return hashlib.sha256(f.read()).digest()
    return split.identity(i)
