"""Time and memory against tokens, with the same number of tokens in every batch: what grows faster than the picture?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svp.errors import SvpError
from svp.studies.bench import products
from svp.studies.bench.measure import Tell, measured
from svp.studies.bench.setting import Setting

SIZES = (224, 320, 448, 640, 896)  # pixels; patches of 16: 197, 401, 785, 1,601 and 3,137 tokens
ROWS = ("ours", "vit")
FORMATS = (".png", ".svg", ".pdf")
COLOURS = {"ours": "tab:blue", "vit": "tab:orange"}


def sweep(
    setting: Setting, img_sizes: Sequence[int], *, seconds: float, with_memory: bool, tell: Tell = lambda text: None
) -> list[dict[str, Any]]:
    """A run as `measured` gives it for every size, as many pictures as hold the tokens of one of the largest.

    Each line has `seconds_per_token` and `memory_bytes_per_token` beside the rest.
    """
    tokens = {size: products.tokens_of(setting.but(img_size=size).shape()) for size in img_sizes}
    most, found = max(tokens.values()), []
    for size, count in sorted(tokens.items()):
        batch = max(1, round(most / count))
        run = measured(
            setting.but(img_size=size, batch_size=batch), ROWS, seconds=seconds, with_memory=with_memory, tell=tell
        )
        key = "cpu_seconds" if run["counts_cpu_time"] else "seconds"
        for line in run["rows"]:
            line["seconds_per_token"] = line[key]["min"] / (batch * count)
            memory = line["memory_bytes"]
            line["memory_bytes_per_token"] = memory / (batch * count) if memory is not None else None
        found.append(run)
    return found


def series(runs: list[dict[str, Any]], row: str, what: str, key: str) -> list[tuple[int, float]]:
    """(tokens, value) of one row over the sizes, those without a value left out."""
    found = []
    for run in runs:
        line = next(line for line in run["rows"] if (line["row"], line["what"]) == (row, what))
        if line[key] is not None:
            found.append((run["tokens"], line[key]))
    return found


def growth(points: list[tuple[int, float]]) -> float | None:
    """The largest value over the smallest."""
    values = [value for _, value in points if value > 0]
    return max(values) / min(values) if values else None


def check_plot(path: str) -> None:
    """Raise SvpError, before minutes of measuring, for a file that could not be written."""
    if Path(path).suffix.lower() not in FORMATS:
        raise SvpError(
            f"--plot is {path}, expected a file that ends with {', '.join(FORMATS)}", "--plot tokens.png", "usage"
        )
    if not Path(path).absolute().parent.is_dir():
        raise SvpError(f"the folder of --plot {path} does not exist", f"mkdir -p {Path(path).parent}", "usage")


def draw(runs: list[dict[str, Any]], path: str) -> None:
    """Time and memory of a training step per token, against the tokens of a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = (("seconds_per_token", 1e6, "microseconds a token"), ("memory_bytes_per_token", 2**-10, "KiB a token"))
    sizes = [run["tokens"] for run in runs]
    for axes, (key, unit, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for row in ROWS:
            points = series(runs, row, "train", key)
            axes.plot([t for t, _ in points], [unit * v for _, v in points], "o-", color=COLOURS[row], label=row)
        axes.set(xscale="log", xlabel="tokens of a picture", ylabel=label, ylim=(0, None))
        axes.set_xticks(sizes, [f"{t:,}" for t in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.suptitle(f"training step, about {runs[0]['tokens'] * runs[0]['batch_size']:,} tokens a batch")
    try:
        figure.savefig(path, dpi=150)
    except OSError as err:
        raise SvpError(f"{path} cannot be written: {err.strerror or err}", "--plot another/file.png", "env") from err
