"""kill -9 at any moment, SIGTERM, Ctrl-C: a real process, resumed to the numbers of an undisturbed one."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from training.victim import Victim

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


def wait_for_steps(out, steps, victim):
    """Until so many steps are saved, or the process has ended."""
    path = Path(out) / "checkpoint" / "state.pt"
    while victim.returncode is None:
        if path.is_file():
            try:
                if torch.load(path, weights_only=True)["progress"]["total_steps"] >= steps:
                    return
            except FileNotFoundError:  # the run has just finished
                continue
        time.sleep(0.02)


def outcome(out):
    result = json.loads((out / "result.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    files = [(out / name).read_bytes() for name in ("predictions.csv", "model/adapter_model.safetensors")]
    return (
        {k: v for k, v in result.items() if k not in ("timing", "git")},  # the tree may be committed to meanwhile
        [{k: v for k, v in line.items() if k != "timing"} for line in lines],
        files,
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("kill") / "whole"
    ends_well(Victim(out, "svp", "fast"))
    return outcome(out)


def ends_well(victim):
    _, errors = victim.end()
    assert victim.returncode == 0, errors


def test_kill_nine_at_random_moments(tmp_path, undisturbed):
    out, chance = tmp_path / "run", random.Random(time.time_ns())
    for steps in (3, 14):
        victim = Victim(out, "svp", *(["resume"] if steps > 3 else []))
        wait_for_steps(out, steps, victim)
        time.sleep(chance.uniform(0, 0.1))
        victim.send(signal.SIGKILL)
        victim.end()
        assert victim.returncode == -signal.SIGKILL
    ends_well(Victim(out, "svp", "fast", "resume"))
    assert outcome(out) == undisturbed
    assert sorted(os.listdir(out)) == ["config.yaml", "metrics.jsonl", "model", "predictions.csv", "result.json"]


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_after_saving(kind, tmp_path, undisturbed):
    out = tmp_path / "run"
    victim = Victim(out, "svp")
    wait_for_steps(out, 5, victim)
    victim.send(kind)
    _, errors = victim.end()
    assert victim.returncode == -kind or (kind == signal.SIGINT and "KeyboardInterrupt" in errors), errors
    ends_well(Victim(out, "svp", "fast", "resume"))
    assert outcome(out) == undisturbed
