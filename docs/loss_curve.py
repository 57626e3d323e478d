"""Draws the loss of a shipped backbone's training from docs/results/NAME.json: python docs/loss_curve.py vim_nano"""

import json
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DOCS = Path(__file__).parent


def draw(facts: dict) -> Figure:
    figure = Figure(figsize=(6.4, 2.8), dpi=110, layout="constrained")
    axis = figure.subplots()
    epochs = [line["epoch"] for line in facts["curve"]]
    for key, label in (("train_loss", "training (augmented pictures)"), ("val_loss", "validation")):
        axis.plot(epochs, [line[key] for line in facts["curve"]], label=label)
    axis.set_xlabel("epoch")
    axis.set_ylabel("loss")
    axis.legend()
    axis.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    name = sys.argv[1]
    found = json.loads((DOCS / f"results/{name}.json").read_text(encoding="utf-8"))
    target = DOCS / f"images/{name}.png"
    target.parent.mkdir(exist_ok=True)
    FigureCanvasAgg(draw(found)).print_png(str(target), metadata={"Software": "svp"})
    print(target)
