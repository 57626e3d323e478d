"""What every source of a user's pictures is checked for before it is used, and what is told about it."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from svp.data.pictures import Look
from svp.data.sources.request import Request
from svp.data.splits import Part, Split, Splits, by_protocol
from svp.errors import SvpError
from svp.preprocessing import Preprocessing

LOOKS = 20_000  # above so many pictures, that many headers are read, evenly spaced
LARGE = 200_000  # above so many pictures, duplicates are not searched
UNFLIPPED = ("gtsrb", "svhn", "dsprites", "clevr", "mnist", "digits", "smallnorb")
UPSCALE = 8  # a picture enlarged more than so many times is worth a word


def finished(splits: Splits, request: Request, by_number: bool = False) -> Splits:
    """Bad pictures found (or left out, when asked), classes checked, validation as the protocol says, notes made.

    Pictures in a folder whose name speaks of data that mean something else when mirrored are not mirrored.
    by_number  classes are the numbers of a published list: train need not show them all
    Raises SvpError (kind "data") for the first picture that is none, a single class, or classes that train lacks.
    """
    forbidden = next((word for word in UNFLIPPED if word in request.folder().resolve().name.lower()), "")
    if forbidden:
        note = f"pictures are not mirrored: the folder's name speaks of {forbidden}"
        splits = splits.but(may_flip=False).noted(note)
    splits = _without_bad(splits, request.whole) if request.skip else splits
    splits = _without_empty(splits).noted(_changes_note(splits)).but(reading=request.reading)
    if request.whole:
        return _as_one(splits)
    splits = _classes_checked(splits, by_number)
    splits = by_protocol(splits, request.seed)
    return splits.noted(*_duplicates(splits))


def _without_empty(splits: Splits) -> Splits:
    if not any(map(len, splits.parts.values())):
        raise SvpError(f"{splits.source} holds no pictures", "add pictures", "data")
    empty = [name for name, part in splits.parts.items() if name != "train" and not len(part)]
    return splits.but(**dict.fromkeys(empty)).noted(*(f"{name} holds no pictures" for name in empty))


def _as_one(splits: Splits) -> Splits:
    """The test split where there is one, else all pictures, in the place of every split."""
    test = splits.test if splits.test is not None else Part(*splits.parts.values())
    return splits.but(train=test, val=test, test=test, whole=True)


def upscale_note(splits: Splits, p: Preprocessing) -> str:
    """A warning when pictures are enlarged more than 8 times to what the network sees, or ""."""
    small = [s for name in splits.parts for s in _looks(splits.parts[name]) if p.shorter_side > UPSCALE * min(s.width, s.height)]  # fmt: skip
    if not small:
        return ""
    least = min(small, key=lambda s: min(s.width, s.height))
    return f"enlarged more than {UPSCALE} times: {len(small)} pictures (the smallest has {least.width} x {least.height} pixels)"


def _looks(part: Split) -> list[Look]:
    return [part.look(i) for i in _spaced(len(part))]


def _spaced(count: int) -> list[int]:
    return list(range(count)) if count <= LOOKS else np.linspace(0, count - 1, LOOKS).astype(int).tolist()


def _changes_note(splits: Splits) -> str:
    """What reading will change, counted; reading the headers also finds files that are no pictures at the door."""
    counts = Counter(words for part in splits.parts.values() for seen in _looks(part) for words in seen.changes)
    told = ", ".join(f"{count} {words}" for words, count in sorted(counts.items()))
    return f"pictures converted to RGB: {told}" if told else ""


def _classes_checked(splits: Splits, by_number: bool) -> Splits:
    present = np.unique(splits.train.labels)
    if len(present) < 2:
        only = f"only '{splits.classes[int(present[0])]}'" if len(present) else "none"
        problem = f"{splits.source} needs at least two classes in train, it has {only}"
        raise SvpError(problem, "add pictures of another class", "data")
    notes = []
    for name, part in splits.parts.items():
        strange = sorted(set(np.unique(part.labels).tolist()) - set(present.tolist()))
        names = ", ".join(f"'{splits.classes[k]}'" for k in strange[:10]) + (" …" if len(strange) > 10 else "")
        if strange and not by_number:
            problem = f"{splits.source}: {name} has classes that train lacks: {names}"
            raise SvpError(problem, "add training pictures of them, or remove them", "data")
        if strange:
            notes.append(f"{name} has classes that train lacks: {names}")
        missing = len(present) - len(np.intersect1d(present, part.labels))
        if missing:
            notes.append(f"{name} lacks {missing} of the {len(present)} training classes")
    return splits.noted(*notes)


def _without_bad(splits: Splits, whole: bool) -> Splits:
    """Every picture decoded once; what cannot be is left out and listed."""
    changes: dict[str, Any] = {}
    skipped = list(splits.skipped)
    for name, part in splits.parts.items():
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            problems = list(pool.map(lambda i, part=part: _problem(part, i), range(len(part))))
        good = np.array([i for i, problem in enumerate(problems) if not problem], dtype=np.int64)
        bad = [problem for problem in problems if problem]
        if bad and not len(good):
            problem = f"none of the {len(part)} {name} pictures of {splits.source} can be read: {'; '.join(bad[:3])}"
            raise SvpError(problem, "check the files", "data")
        lost = set(part.labels.tolist()) - set(part.labels[good].tolist())
        if name == "train" and lost and not whole:
            names = ", ".join(f"'{splits.classes[k]}'" for k in sorted(lost)[:5])
            raise SvpError(f"{splits.source}: no training picture of class {names} can be read: {bad[0]}", "check the files", "data")  # fmt: skip
        skipped += bad
        changes[name] = Part(part, index=good) if bad else part
    return splits.but(**changes, skipped=tuple(skipped))


def _problem(part: Split, i: int) -> str:
    try:
        part.picture(i)
    except SvpError as err:
        return err.problem
    return ""


def _duplicates(splits: Splits) -> list[str]:
    """A note for each split that shows pictures of train again, equal byte for byte."""
    if sum(splits.sizes.values()) > LARGE:
        return [f"identical pictures were not searched: more than {LARGE:,} pictures"]
    found = []
    train_sizes = _sizes(splits.train)
    for name in ("val", "test"):
        part = splits.parts.get(name)
        if part is None or (name == "val" and part is splits.test):
            continue
        sizes = _sizes(part)
        common = np.intersect1d(train_sizes, sizes)  # only what has an equal length is read
        seen = {splits.train.digest(int(i)) for i in np.flatnonzero(np.isin(train_sizes, common))}
        same = [int(i) for i in np.flatnonzero(np.isin(sizes, common)) if part.digest(int(i)) in seen]
        if same:
            names = ", ".join(part.name(i) for i in same[:3]) + (" …" if len(same) > 3 else "")
            found.append(f"identical pictures in train and {name}: {len(same)} of {len(part)} in {name} ({names})")
    return found


def _sizes(part: Split) -> np.ndarray:
    return np.array([part.size_bytes(i) for i in range(len(part))], dtype=np.int64)
