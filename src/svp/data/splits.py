"""Splits: pictures with labels, in train, val and test; and the stratified cut."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from svp.data.pictures import MAX_PIXELS, read_picture
from svp.data.protocols import DEFAULT, Protocol
from svp.errors import SvpError


class Split:
    """Pictures with labels. A subclass gives `picture` and `name`; labels is (len,) int64. Crosses to worker processes."""

    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, i: int) -> Image.Image:
        """Picture i, upright, RGB."""
        raise NotImplementedError

    def name(self, i: int) -> str:
        """How a message calls picture i."""
        raise NotImplementedError

    def identity(self, i: int) -> bytes:
        """What the data hash says of picture i besides name and label."""
        return b""


class Files(Split):
    """Pictures in files."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int], root: str = "", max_pixels: int = MAX_PIXELS):
        self.paths, self.root, self.max_pixels = list(paths), root, max_pixels
        self.labels = np.asarray(labels, dtype=np.int64)

    def picture(self, i):
        return read_picture(self.paths[i], max_pixels=self.max_pixels)

    def name(self, i):
        return self.paths[i]

    def identity(self, i):
        import os

        return f"{os.path.relpath(self.paths[i], self.root or None)} {os.path.getsize(self.paths[i])}".encode(
            "utf-8", "surrogateescape"
        )


class Encoded(Split):
    """Pictures as encoded bytes in memory."""

    def __init__(
        self, contents: Sequence[bytes], labels: Sequence[int], names: Sequence[str], max_pixels: int = MAX_PIXELS
    ):
        self.contents, self.names, self.max_pixels = list(contents), list(names), max_pixels
        self.labels = np.asarray(labels, dtype=np.int64)

    def picture(self, i):
        return read_picture(self.contents[i], self.names[i], self.max_pixels)

    def name(self, i):
        return self.names[i]

    def identity(self, i):
        return hashlib.sha256(self.contents[i]).digest()


class Arrays(Split):
    """Pictures as a uint8 array (len, H, W, 3)."""

    def __init__(self, pixels: np.ndarray, labels: Sequence[int], names: Sequence[str]):
        self.pixels, self.names = pixels, list(names)
        self.labels = np.asarray(labels, dtype=np.int64)

    def picture(self, i):
        return Image.fromarray(self.pixels[i])

    def name(self, i):
        return self.names[i]

    def identity(self, i):
        return hashlib.sha256(self.pixels[i].tobytes()).digest()


class Part(Split):
    """Some pictures of another split."""

    def __init__(self, whole: Split, index: np.ndarray):
        self.whole, self.index = whole, np.asarray(index)
        self.labels = whole.labels[self.index]

    def picture(self, i):
        return self.whole.picture(int(self.index[i]))

    def name(self, i):
        return self.whole.name(int(self.index[i]))

    def identity(self, i):
        return self.whole.identity(int(self.index[i]))


@dataclass(frozen=True)
class Splits:
    """What `open_data` gives: the splits, the class names in label order, and what was noticed.

    may_flip   whether mirroring a picture keeps its label
    resize     "exact": pictures go to the network's size without a crop; None: as the backbone says
    notes      one-line facts for the user; skipped: "name: reason" of pictures left out
    test       None: there is none, validation is reported
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

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def split(self, name: str) -> Split:
        found = {"train": self.train, "val": self.val, "test": self.test}.get(name)
        if found is None:
            raise SvpError(f"{self.source} has no {name} split", "train, val or test", "data")
        return found

    @property
    def sizes(self) -> dict[str, int]:
        return {"train": len(self.train), "val": len(self.val), "test": 0 if self.test is None else len(self.test)}

    def hash(self) -> str:
        """sha256 over the splits' labels and contents, whatever the order of the file system."""
        digest = hashlib.sha256(" ".join(self.classes).encode("utf-8", "surrogateescape"))
        for name in ("train", "val", "test"):
            part = {"train": self.train, "val": self.val, "test": self.test}[name]
            if part is not None:
                lines = sorted(str(int(y)).encode() + b" " + part.identity(i) for i, y in enumerate(part.labels))
                digest.update(name.encode() + b"".join(lines))
        return digest.hexdigest()

    def but(self, **changes: Any) -> Splits:
        return replace(self, **changes)


def stratified_cut(
    labels: np.ndarray, fraction: float, seed: int, classes: Sequence[str], source: str
) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, val) with `fraction` of each class in val, at least one on either side; seeded, sorted.

    Raises SvpError for a class with a single picture.
    """
    generator = np.random.default_rng(seed)
    train, val = [], []
    for k in np.unique(labels):
        index = np.flatnonzero(labels == k)
        if len(index) < 2:
            raise SvpError(
                f"{source} has {len(index)} picture of class '{classes[k]}'; training and validation need one each",
                f"add pictures of '{classes[k]}', or give a val folder", "data",
            )  # fmt: skip
        mixed = generator.permutation(index)
        count = min(max(1, round(fraction * len(index))), len(index) - 1)
        val.append(mixed[:count])
        train.append(mixed[count:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(val))


def with_val(splits: Splits) -> Splits:
    """Cut validation from train as the protocol says."""
    protocol = splits.protocol
    train, val = stratified_cut(
        splits.train.labels, protocol.val_fraction, protocol.val_seed, splits.classes, splits.source
    )
    note = f"validation: {len(val)} of {len(splits.train)} training pictures, cut stratified (seed {protocol.val_seed})"
    return splits.but(train=Part(splits.train, train), val=Part(splits.train, val), notes=(*splits.notes, note))


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key: class2 before class10, capitals beside small letters."""
    return [
        (0, int(part), "") if part.isdigit() and part.isascii() else (1, 0, part.casefold())
        for part in re.split(r"(\d+)", name)
    ]


def natural_sorted(names: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda name: (natural(name), name))
