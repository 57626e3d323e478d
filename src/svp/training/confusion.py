"""The confusion matrix of an evaluation as a picture."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from svp.training.evaluate import Evaluation

WRITTEN = 25  # up to so many classes each cell shows its count
NAMED = 60  # up to so many each class its name


def confusion_png(found: Evaluation, title: str = "") -> bytes:
    """Rows are the true classes, columns the labels given; colours are shares of a row, numbers are pictures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(found.classes)
    shares = found.confusion / np.maximum(found.confusion.sum(1, keepdims=True), 1)
    side = min(max(4.0, 0.34 * count), 24.0)
    figure = Figure(figsize=(side + 1.8, side + 1.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="share of the true class", fraction=0.046, pad=0.02)
    axes.set_xlabel("label given")
    axes.set_ylabel("true class")
    axes.set_title(
        title or f"{found.split}: {found.accuracy:.1%} of {found.count:,} pictures", fontsize=10, parse_math=False
    )
    _names(axes, found.classes)
    if count <= WRITTEN:
        for i, j in zip(*np.nonzero(found.confusion), strict=True):
            colour = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, f"{found.confusion[i, j]:,}", ha="center", va="center", color=colour, fontsize=7)
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a class name in a script the font lacks: boxes
        FigureCanvasAgg(figure).print_png(out, metadata={"Software": "svp"})
    return out.getvalue()


def _names(axes: Any, classes: tuple[str, ...]) -> None:
    if len(classes) > NAMED:
        return
    places = range(len(classes))
    short = [name if len(name) <= 24 else f"{name[:23]}…" for name in classes]
    size = 8 if len(classes) <= WRITTEN else 6
    axes.set_xticks(places, short, rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(places, short, fontsize=size, parse_math=False)
