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
    offset = 0
    for stage in facts["stages"]:
        size, batch = stage["img_size"], stage["recipe"]["batch_size"]
        points = [(offset + p["step"] * batch, p["loss"]) for p in facts["curve"] if p["img_size"] == size]
        axis.plot(*zip(*points, strict=True), label=f"{size} px", marker=".")
        offset = points[-1][0]
    axis.set_xlabel("pictures seen")
    axis.set_ylabel("training loss of one batch")
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
