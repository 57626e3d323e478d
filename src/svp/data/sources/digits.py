"""scikit-learn's 1,797 scans of handwritten digits, 8 x 8 grey values: real pictures that need no download."""

from __future__ import annotations

import numpy as np

from svp.data.sources.request import Request
from svp.data.splits import Arrays, Splits, by_protocol

CLASSES = tuple("0123456789")


def open_source(request: Request) -> Splits:
    """White on black kept, three equal channels; stratified 60 / 20 / 20 (1,077 / 360 / 360) by a fixed seed, never flipped.

    Values / 16 are stored as 8-bit pictures, so that a digit saved as a PNG is seen as in training.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans, labels = load_digits(return_X_y=True)
    others, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    train, val = train_test_split(others, test_size=0.25, random_state=0, stratify=labels[others])
    index = {"train": train, "val": val, "test": test}
    grey = np.round(scans.reshape(-1, 8, 8) / 16 * 255).astype(np.uint8)
    pixels = np.repeat(grey[..., None], 3, axis=3)
    train_, val_, test_ = (Arrays(pixels[i], labels[i], [f"digits/{k}" for k in i]) for i in index.values())
    raw = {name: (scans[i], labels[i]) for name, i in index.items()}
    splits = Splits(
        request.source, train_, val_, test_, CLASSES, may_flip=False, protocol=request.protocol, resize="exact",
        pixels=raw.get,
    )  # fmt: skip
    return by_protocol(splits, request.seed)
