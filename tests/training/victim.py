"""A run to be killed, or one process of several: python victim.py OUT SECONDS METHOD [fast]; prints its accuracy."""

import sys
import time

import torch

from svp.training import loop
from svp.training.loop import fit
from training.small import RECIPE, model, splits

OUT, SECONDS, METHOD = sys.argv[1:4]


def slowly(event):
    time.sleep(0.02)


if __name__ == "__main__":
    torch.set_num_threads(1)
    loop.REPORT_SECONDS = 0.0  # an event a step: slow enough to be hit
    run = fit(
        model(METHOD), splits(), recipe=RECIPE.but(epochs=8), out=OUT, resume="resume" in sys.argv, device="cpu",
        checkpoint_seconds=float(SECONDS), report=None if "fast" in sys.argv else slowly,
    )  # fmt: skip
    print(run.test_accuracy)
