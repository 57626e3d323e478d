"""Pictures kept decoded in memory that forked workers share, so that a small data set is decoded once."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable

import numpy as np
from PIL import Image

LIMIT_BYTES = 2 << 30
_taken = 0  # bytes of all that are kept in this process: train, validation and test share one limit


class Kept:
    """RGB pictures 0 … count - 1, each in a slot of `slot_bytes`; a larger one is made anew each time.

    The memory is taken from the system page by page as slots are filled. What is kept never changes a result: a slot
    holds exactly what `make` gives. Nothing is kept where all slots would need more than `limit_bytes`, or with those of others in
    this process more than LIMIT_BYTES or a quarter of the memory.
    """

    def __init__(self, count: int, slot_bytes: int, limit_bytes: int = LIMIT_BYTES):
        self.count, self.slot, self.limit = count, slot_bytes, min(limit_bytes, memory_bytes() // 4)
        self.sizes: np.ndarray | None = None
        self.bytes = count * (slot_bytes + 8)
        if 0 < self.bytes <= self.limit and _taken + self.bytes <= min(LIMIT_BYTES, memory_bytes() // 4):
            self._take()

    def get(self, i: int, make: Callable[[int], Image.Image]) -> Image.Image:
        """Picture i, from its slot or made."""
        if self.sizes is None:
            return make(i)
        width, height = self.sizes[i].tolist()
        if width:
            start = i * self.slot
            return Image.frombytes("RGB", (width, height), self.pixels[start : start + 3 * width * height])
        picture = make(i)
        pixels = picture.tobytes()
        if len(pixels) <= self.slot:
            start = i * self.slot
            self.pixels[start : start + len(pixels)] = pixels
            self.sizes[i] = picture.size  # last: it says that the slot is full
        return picture

    def _take(self) -> None:
        try:
            sizes, pixels = mmap.mmap(-1, 8 * self.count), mmap.mmap(-1, self.slot * self.count)
        except (OSError, ValueError, OverflowError):  # the system has none to give: decode each time
            return
        self.sizes = np.frombuffer(sizes, dtype=np.int32).reshape(self.count, 2)  # (width, height), 0: empty
        self.pixels = pixels
        _count(self.bytes)
        weakref.finalize(self, _count, -self.bytes)

    def __getstate__(self) -> tuple[int, int, int]:
        return self.count, self.slot, self.limit

    def __setstate__(self, state: tuple[int, int, int]) -> None:  # in a worker that was not forked: its own share
        count, slot, limit = state
        self.__init__(count, slot, limit // 4)  # type: ignore[misc]


def _count(change: int) -> None:
    global _taken
    _taken += change


def memory_bytes() -> int:
    """Memory of this machine, or of the container around us."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return 4 * LIMIT_BYTES
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as f:
            return min(found, int(f.read()))
    except (OSError, ValueError):  # no container, or "max"
        return found
