"""The picture of a confusion matrix: any number of classes, any names."""

import io

import numpy as np
import pytest
from PIL import Image

from svp.training.confusion import confusion_png
from svp.training.evaluate import score


@pytest.mark.parametrize("count", [2, 5, 40, 120])
def test_a_picture_for_any_number_of_classes(count):
    names = ("$x_1$", "日本", "a" * 99, *map(str, range(count)))[:count]  # no formula, no glyph, no room
    generator = np.random.default_rng(0)
    labels = generator.integers(0, count - 1, 50)  # the last class has no picture
    found = score(generator.normal(size=(50, count)).astype(np.float32), labels, names, "test")
    with Image.open(io.BytesIO(confusion_png(found))) as picture:
        assert picture.format == "PNG" and 300 < picture.width < 4000
