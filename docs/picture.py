"""Draws the README's picture from the runs of `svp train digits --method svp,linear …`: python docs/picture.py RUNS

RUNS is the folder of that command (its runs lie in RUNS/svp-s0, RUNS/linear-s0, …). Left: scans of the test split on which
the methods disagree; right: test accuracy, the numbers of docs/results/digits.json.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import svp

DOCS = Path(__file__).parent
SHOWN = 12
GREEN, RED, GREY = "#1a7f37", "#cf222e", "#8c959f"


def labels(run: Path) -> dict[str, tuple[str, str]]:
    """{picture: (true class, label given)}"""
    with open(run / "predictions.csv", newline="", encoding="utf-8") as f:
        return {row["picture"]: (row["label"], row["guess1"]) for row in csv.DictReader(f)}


def disagreements(runs: Path) -> list[tuple[str, str, str, str]]:
    """(picture, truth, linear's label, SVP's label), those first that SVP gets right."""
    linear, prompted = labels(runs / "linear-s0"), labels(runs / "svp-s0")
    found = [
        (name, truth, guess, prompted[name][1]) for name, (truth, guess) in linear.items() if guess != prompted[name][1]
    ]
    return sorted(found, key=lambda row: (row[3] != row[1], int(row[0].split("/")[1])))


def draw(runs: Path) -> Figure:
    figure = Figure(figsize=(9.6, 3.5), dpi=110, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.45, 1))
    test = svp.open_data("digits").test
    place = {test.name(i): i for i in range(len(test))}
    differ = disagreements(runs)
    won = sum(row[3] == row[1] for row in differ)
    lost = sum(row[2] == row[1] for row in differ)
    left.suptitle(
        f"{len(differ)} of {len(test)} test scans are labelled differently: {won} right with SVP only, {lost} with linear only",
        fontsize=9,
    )
    axes = left.subplots(2, SHOWN // 2, squeeze=False).flat
    for axis, row in zip(axes, [*differ, *[None] * SHOWN][:SHOWN], strict=True):
        axis.axis("off")
        if row is None:
            continue
        name, truth, before, after = row
        axis.imshow(np.asarray(test.picture(place[name])), interpolation="nearest")
        for height, method, label in ((-0.06, "linear", before), (-0.26, "svp", after)):
            colour = GREEN if label == truth else RED
            axis.text(0.5, height, f"{method}: {label}", transform=axis.transAxes, ha="center", va="top", fontsize=9, color=colour)  # fmt: skip
    axis = right.subplots()
    table = json.loads((DOCS / "results/digits.json").read_text(encoding="utf-8"))["table"]
    low = max(0, 5 * (min(100 * line["mean"] for line in table) // 5) - 5)
    for at, line in enumerate(reversed(table)):
        color = GREEN if line["method"] == "svp" else GREY
        axis.barh(
            at,
            100 * line["mean"],
            xerr=100 * (line["half_width_95"] or 0),
            color=color,
            height=0.6,
            ecolor="black",
            capsize=3,
        )
        axis.text(
            low + 0.5,
            at,
            f"{100 * line['mean']:.1f}",
            va="center",
            ha="left",
            color="white",
            fontsize=10,
            weight="bold",
        )
    axis.set_yticks(range(len(table)), [line["method"].replace(", ", ",\n") for line in reversed(table)])
    axis.set_xlim(low, 100)
    axis.set_xlabel("test accuracy, %", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    target = DOCS / "images/digits.png"
    target.parent.mkdir(exist_ok=True)
    FigureCanvasAgg(draw(Path(sys.argv[1]))).print_png(str(target), metadata={"Software": "svp"})
    print(target)
