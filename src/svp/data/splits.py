"""Splits: pictures with labels, in train, val and test; and the stratified cut."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from svp.data.pictures import MAX_PIXELS, Look, look, read_picture, shown
from svp.data.protocols import DEFAULT, Protocol
from svp.errors import SvpError


class Split:
    """Pictures with labels. A subclass gives what is below; labels is (len,) int64. Crosses to worker processes."""

    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, i: int) -> Image.Image:
        """Picture i, upright, RGB; raises SvpError with its name."""
        raise NotImplementedError

    def look(self, i: int) -> Look:
        """Size and kind of picture i, without decoding it."""
        raise NotImplementedError

    def name(self, i: int) -> str:
        """How a message calls picture i."""
        raise NotImplementedError

    def identity(self, i: int) -> bytes:
        """What the data hash says of picture i besides its label."""
        raise NotImplementedError

    def size_bytes(self, i: int) -> int:
        """Length of the encoded picture."""
        raise NotImplementedError

    def digest(self, i: int) -> bytes:
        """sha256 of the encoded picture: equal for identical pictures."""
        raise NotImplementedError


class Files(Split):
    """Pictures in files."""

    def __init__(
        self, paths: Sequence[str], labels: Sequence[int] | np.ndarray, root: str = "", max_pixels: int = MAX_PIXELS
    ):
        self.paths, self.root, self.max_pixels = list(paths), root, max_pixels
        self.labels = np.asarray(labels, dtype=np.int64)

    def picture(self, i):
        return read_picture(self.paths[i], max_pixels=self.max_pixels)

    def look(self, i):
        return look(self.paths[i], max_pixels=self.max_pixels)

    def name(self, i):
        return shown(self.paths[i])

    def identity(self, i):
        path = os.path.relpath(self.paths[i], self.root) if self.root else self.paths[i]
        return os.fsencode(path.replace(os.sep, "/")) + b" %d" % self.size_bytes(i)

    def size_bytes(self, i):
        return os.path.getsize(self.paths[i])

    def digest(self, i):
        with open(self.paths[i], "rb") as f:
            return hashlib.file_digest(f, "sha256").digest()


class Encoded(Split):
    """Pictures as encoded bytes in memory: picture i is blobs[b][start:end] with (b, start, end) = places[i].

    A few large blobs and one table, so that worker processes share the memory instead of copying it.
    """

    def __init__(
        self,
        blobs: Sequence[bytes],
        places: np.ndarray,
        labels: Sequence[int] | np.ndarray,
        names: Sequence[str],
        max_pixels: int = MAX_PIXELS,
    ):
        self.blobs, self.places, self.names, self.max_pixels = list(blobs), places, list(names), max_pixels
        self.labels = np.asarray(labels, dtype=np.int64)

    def content(self, i: int) -> bytes:
        blob, start, end = self.places[i].tolist()
        return self.blobs[blob][start:end]

    def picture(self, i):
        return read_picture(self.content(i), self.names[i], self.max_pixels)

    def look(self, i):
        return look(self.content(i), self.names[i], self.max_pixels)

    def name(self, i):
        return self.names[i]

    def identity(self, i):
        return self.digest(i)

    def size_bytes(self, i):
        _, start, end = self.places[i].tolist()
        return end - start

    def digest(self, i):
        return hashlib.sha256(self.content(i)).digest()


class Arrays(Split):
    """Pictures as a uint8 array (len, H, W, 3)."""

    def __init__(self, pixels: np.ndarray, labels: Sequence[int] | np.ndarray, names: Sequence[str]):
        self.pixels, self.names = pixels, list(names)
        self.labels = np.asarray(labels, dtype=np.int64)

    def picture(self, i):
        return Image.fromarray(self.pixels[i])

    def look(self, i):
        return Look(self.pixels.shape[2], self.pixels.shape[1])

    def name(self, i):
        return self.names[i]

    def identity(self, i):
        return self.digest(i)

    def size_bytes(self, i):
        return self.pixels[i].nbytes

    def digest(self, i):
        return hashlib.sha256(self.pixels[i].tobytes()).digest()


class Part(Split):
    """Some pictures of one split, or of several in a row."""

    def __init__(self, *wholes: Split, index: np.ndarray | None = None):
        labels = np.concatenate([whole.labels for whole in wholes])
        self.wholes = wholes
        self.ends = np.cumsum([len(whole) for whole in wholes])
        self.index = np.arange(len(labels)) if index is None else np.asarray(index, dtype=np.int64)
        self.labels = labels[self.index]

    def _at(self, i: int) -> tuple[Split, int]:
        place = int(self.index[i])
        which = int(np.searchsorted(self.ends, place, side="right"))
        return self.wholes[which], place - (int(self.ends[which - 1]) if which else 0)

    def picture(self, i):
        whole, place = self._at(i)
        return whole.picture(place)

    def look(self, i):
        whole, place = self._at(i)
        return whole.look(place)

    def name(self, i):
        whole, place = self._at(i)
        return whole.name(place)

    def identity(self, i):
        whole, place = self._at(i)
        return whole.identity(place)

    def size_bytes(self, i):
        whole, place = self._at(i)
        return whole.size_bytes(place)

    def digest(self, i):
        whole, place = self._at(i)
        return whole.digest(place)


@dataclass(frozen=True)
class Splits:
    """What `open_data` gives: the splits, the class names in label order, and what was noticed.

    may_flip   whether mirroring a picture keeps its label
    resize     "exact": pictures go to the network's size without a crop; None: as the backbone says
    notes      one-line facts for the user; skipped: "name: reason" of pictures left out
    test       None: there is none, validation is reported
    pixels     split name -> (values (len, features), labels (len,)) for a raw pixel baseline, or None
    reading    how `open_data` was asked to treat bad and large pictures
    whole      all pictures are one split, to be measured: their classes may be a part of a model's
    """

    source: str
    train: Split
    val: Split
    test: Split | None
    classes: tuple[str, ...]
    may_flip: bool = True
    protocol: Protocol = DEFAULT
    resize: str | None = None
    notes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    pixels: Callable[[str], Any] | None = field(default=None, repr=False)
    reading: dict[str, Any] = field(default_factory=dict)
    whole: bool = False

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def split(self, name: str) -> Split:
        """A split by its name; raises SvpError where there is none."""
        found = self.parts.get(name)
        if found is None:
            raise SvpError(f"{self.source} has no {name} split", f"it has {', '.join(self.parts)}", "data")
        return found

    @property
    def parts(self) -> dict[str, Split]:
        """The splits that exist, by name."""
        found = {"train": self.train, "val": self.val, "test": self.test}
        return {name: part for name, part in found.items() if part is not None}

    @property
    def sizes(self) -> dict[str, int]:
        return {"train": 0, "val": 0, "test": 0} | {name: len(part) for name, part in self.parts.items()}

    def hash(self) -> str:
        """sha256 over the splits' labels and contents (of files: path and size), whatever the order of the file system."""
        digest = hashlib.sha256("\n".join(self.classes).encode("utf-8", "surrogateescape"))
        for name, part in self.parts.items():
            lines = sorted(b"%d " % y + part.identity(i) for i, y in enumerate(part.labels.tolist()))
            digest.update(b"\n%s %d\n" % (name.encode(), len(lines)) + b"\n".join(lines))
        return digest.hexdigest()

    def but(self, **changes: Any) -> Splits:
        return replace(self, **changes)

    def noted(self, *notes: str) -> Splits:
        """A copy with more notes; empty ones are left out."""
        return self.but(notes=(*self.notes, *(note for note in notes if note)))


def stratified_cut(
    labels: np.ndarray, fraction: float, seed: int | Sequence[int], classes: Sequence[str], source: str
) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, val) with `fraction` of each class in val, at least one on either side; seeded, sorted.

    Raises SvpError for a class with a single picture.
    """
    generator = np.random.default_rng(seed)
    train, val = [], []
    for k in np.unique(labels):
        index = np.flatnonzero(labels == k)
        if len(index) < 2:
            problem = f"{source} has 1 picture of class '{classes[k]}'; training and validation need one each"
            raise SvpError(problem, f"add pictures of '{classes[k]}', or give a val folder", "data")
        mixed = generator.permutation(index)
        count = min(max(1, round(fraction * len(index))), len(index) - 1)
        val.append(mixed[:count])
        train.append(mixed[count:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(val))


def by_protocol(splits: Splits, seed: int = 0) -> Splits:
    """Validation cut from train, or joined to it, as the protocol says. `splits.val` may be None before.

    Raises SvpError where the protocol chooses the epoch on a split that is not there.
    """
    protocol, val = splits.protocol, splits.parts.get("val")
    if not protocol.needs_val and splits.test is None:
        problem = f"protocol {protocol.name} chooses the epoch on test, and {splits.source} has no test split"
        raise SvpError(problem, "--protocol default", "usage")
    if val is not None and not protocol.train_on_val:
        return splits
    if val is not None:
        note = f"validation: its {len(val)} pictures are trained on ({protocol.name}); test stands in for it"
        return splits.but(train=Part(splits.train, val), val=splits.test).noted(note)
    if not protocol.val_fraction:
        return splits.but(val=splits.test).noted(f"validation: none is cut ({protocol.name}); test stands in for it")
    train, cut = stratified_cut(
        splits.train.labels, protocol.val_fraction, (protocol.val_seed, seed), splits.classes, splits.source
    )
    note = f"validation: {len(cut)} of {len(splits.train)} training pictures, cut stratified (seed {seed})"
    return splits.but(train=Part(splits.train, index=train), val=Part(splits.train, index=cut)).noted(note)


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key: class2 before class10, capitals beside small letters."""
    return [
        (0, int(part), "") if part.isascii() and part.isdigit() else (1, 0, part.casefold())
        for part in re.split(r"([0-9]+)", name)
    ]


def natural_sorted(names: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda name: (natural(name), name))
