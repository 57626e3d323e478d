"""Runs in processes of their own, to be killed or to share a batch; forked from one that has loaded torch already."""

import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from svp.training import loop
from svp.training.loop import fit
from training.small import RECIPE, model, splits

CONTEXT = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
if sys.platform != "win32":
    CONTEXT.set_forkserver_preload(["training.victim", "torch._dynamo"])


class Victim:
    """A process that trains `method` into the folder `out`; it prints its test accuracy.

    words     "fast": without the pause after each step that gives time to be hit; "resume"
    variables of the environment, as torchrun sets them
    """

    def __init__(self, out, method, *words, seconds=0.0, variables=None):
        self.paths = [Path(tempfile.mkstemp(prefix=f"svp-{name}-")[1]) for name in ("output", "errors")]
        said = [str(path) for path in self.paths]
        self.process = CONTEXT.Process(target=train, args=(said, str(out), method, words, seconds, variables or {}))
        self.process.start()

    @property
    def returncode(self):
        """None while it runs; -9 after SIGKILL."""
        return self.process.exitcode

    def send(self, kind):
        os.kill(self.process.pid, kind)

    def end(self, timeout=120):
        """(what it printed, what it printed as errors), once it has ended."""
        self.process.join(timeout)
        if self.returncode is None:
            self.process.kill()
        said = [path.read_text() for path in self.paths]
        for path in self.paths:
            path.unlink()
        assert self.returncode is not None, f"still running after {timeout} s: {said}"
        return said


def train(said, out, method, words, seconds, variables):
    """The life of a victim."""
    for stream, path in zip((1, 2), said, strict=True):
        os.dup2(os.open(path, os.O_WRONLY), stream)
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
