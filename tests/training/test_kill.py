"""kill -9 at any moment, SIGTERM, Ctrl-C: a real process, resumed to the numbers of an undisturbed one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

VICTIM = Path(__file__).with_name("victim.py")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


def start(out, *words):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen(
        [sys.executable, str(VICTIM), str(out), "0", "svp", *words], env=env, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_steps(out, steps, process):
    """Until so many steps are saved, or the process has ended."""
    import torch

    path = Path(out) / "checkpoint" / "state.pt"
    while process.poll() is None:
        if path.is_file():
            try:
                if torch.load(path, weights_only=True)["progress"]["total_steps"] >= steps:
                    return
            except FileNotFoundError:  # the run has just finished
                continue
        time.sleep(0.005)


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
    process = start(out, "fast")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return outcome(out)


def test_kill_nine_at_random_moments(tmp_path, undisturbed):
    out, chance = tmp_path / "run", random.Random(time.time_ns())
    for steps in (3, 14):
        process = start(out, *(["resume"] if steps > 3 else []))
        wait_for_steps(out, steps, process)
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.communicate(timeout=60)
    process = start(out, "fast", "resume")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert outcome(out) == undisturbed
    assert sorted(os.listdir(out)) == ["config.yaml", "metrics.jsonl", "model", "predictions.csv", "result.json"]


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_after_saving(kind, tmp_path, undisturbed):
    out = tmp_path / "run"
    process = start(out)
    wait_for_steps(out, 5, process)
    process.send_signal(kind)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -kind or (kind == signal.SIGINT and "KeyboardInterrupt" in errors), errors
    process = start(out, "fast", "resume")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert outcome(out) == undisturbed
