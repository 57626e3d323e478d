"""scikit-learn's 1,797 scans of handwritten digits, 8 x 8 grey values: real pictures that need no download."""

from __future__ import annotations

import numpy as np

from svp.data.protocols import Protocol
from svp.data.splits import Arrays, Splits

CLASSES = tuple("0123456789")


def open_source(rest: str, source: str, protocol: Protocol, skip: bool, max_pixels: int) -> Splits:
    """Values / 16, white on black kept, three equal channels; stratified 60 / 20 / 20 (1,077 / 360 / 360), fixed seed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans, labels = load_digits(return_X_y=True)
    index = np.arange(len(labels))
    rest_, test = train_test_split(index, test_size=0.2, random_state=0, stratify=labels)
    train, val = train_test_split(rest_, test_size=0.25, random_state=0, stratify=labels[rest_])
    grey = np.round(scans.reshape(-1, 8, 8) / 16 * 255).astype(np.uint8)
    pixels = np.repeat(grey[..., None], 3, axis=3)

    def split(chosen):
        return Arrays(pixels[chosen], labels[chosen], [f"digits/{i}" for i in chosen])

    raw = {
        "train": (scans[train], labels[train]),
        "val": (scans[val], labels[val]),
        "test": (scans[test], labels[test]),
    }
    return Splits(
        source, split(train), split(val), split(test), CLASSES, may_flip=False, protocol=protocol, resize="exact",
        pixels=raw.get,
    )  # fmt: skip
