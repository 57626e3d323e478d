"""Runs in processes of their own, to be killed or to share a batch; forked from one that has loaded torch already."""

import os
import time

import torch

from process import Forked, redirect
from svp.training import loop
from svp.training.loop import fit
from training.small import RECIPE, model, splits


class Victim(Forked):
    """A process that trains `method` into the folder `out`; it prints its test accuracy.

    words     "fast": without the pause after each step that gives time to be hit; "resume"
    variables of the environment, as torchrun sets them
    """

    def __init__(self, out, method, *words, seconds=0.0, variables=None):
        super().__init__(train, str(out), method, words, seconds, variables or {})


def train(said, out, method, words, seconds, variables):
    """The life of a victim."""
    redirect(said)
    os.environ |= variables
    torch.set_num_threads(1)
    loop.REPORT_SECONDS = 0.0  # an event a step: slow enough to be hit
    run = fit(
        model(method), splits(), recipe=RECIPE.but(epochs=8), out=out, resume="resume" in words, device="cpu",
        checkpoint_seconds=seconds, report=None if "fast" in words else slowly,
    )  # fmt: skip
    print(run.test_accuracy, flush=True)


def slowly(event):
    time.sleep(0.02)
