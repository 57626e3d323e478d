"""Small pictures and folders of them, made for each test."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def paint():
    """paint(path, seed=0, size=(w, h), mode="RGB"): a picture of seeded noise, in a folder that is made."""

    def made(path, seed=0, size=(12, 10), mode="RGB"):
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(values).convert(mode).save(path)
        return path

    return made


@pytest.fixture
def tree(tmp_path, paint):
    """tree({"train/cat": 3, "train/dog": 2}): that many different pictures in each folder; returns the root."""

    def made(counts, root=tmp_path / "pets"):
        for folder, count in counts.items():
            for i in range(count):
                seed = sum(folder.encode()) * 1000 + i
                paint(root / folder / f"{i}.png", seed)
        return root

    return made
