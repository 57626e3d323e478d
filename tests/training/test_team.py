"""Two processes that share every batch give the numbers of one."""

import json
import os
import signal
import socket
import time

import pytest
import torch
from safetensors.torch import load_file

from svp.training.feed import my_batches
from svp.training.machine import Team
from training.victim import Victim


def start(out, method, processes, *words, seconds=1000.0):
    """One run, in processes as torchrun would start them."""
    if processes == 1:
        return [Victim(out, method, *words, seconds=seconds)]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    team = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        Victim(out, method, *words, seconds=seconds, variables=team | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]


def run(*how, **more):
    """What the processes printed, once all have ended well."""
    started = start(*how, **more)
    ends = [victim.end() for victim in started]
    assert all(victim.returncode == 0 for victim in started), ends
    return [text for text, _ in ends]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize("method", ["svp", "linear"])
def test_two_processes_are_one(method, tmp_path):
    alone, together = run(tmp_path / "one", method, 1, "fast"), run(tmp_path / "two", method, 2, "fast")
    assert together == alone * 2
    one, two = (load_file(tmp_path / n / "model" / "adapter_model.safetensors") for n in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=2e-4, msg=name)
    logs = [(tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("one", "two")]
    for a, b in zip(*logs, strict=True):
        a, b = json.loads(a), json.loads(b)
        assert a["step"] == b["step"] and a["lr"] == b["lr"]
        assert a.get("train_loss", 0) == pytest.approx(b.get("train_loss", 0), rel=1e-4)
    results = [json.loads((tmp_path / n / "result.json").read_text()) for n in ("one", "two")]
    assert results[0]["test_accuracy"] == results[1]["test_accuracy"]
    assert results[1]["timing"]["processes"] == 2


@pytest.mark.skipif(os.name == "nt" or not torch.distributed.is_available(), reason="signals of POSIX, gloo")
def test_a_signal_to_one_stops_both_at_the_same_step(tmp_path):
    run(tmp_path / "whole", "svp", 2, "fast")
    first, second = started = start(tmp_path / "half", "svp", 2, seconds=0.0)
    state = tmp_path / "half" / "checkpoint" / "state.pt"
    while not state.is_file() and first.returncode is None:
        time.sleep(0.01)
    second.send(signal.SIGTERM)
    for victim in started:
        victim.end()
    assert second.returncode == -signal.SIGTERM and first.returncode in (-signal.SIGTERM, 143)
    assert state.is_file() and not (tmp_path / "half" / "result.json").exists()
    run(tmp_path / "half", "svp", 2, "fast", "resume")
    whole, half = (json.loads((tmp_path / n / "result.json").read_text()) for n in ("whole", "half"))
    assert all(whole[key] == half[key] for key in whole if key not in ("timing", "git"))


def test_shares_cover_a_batch():
    for count in (1, 2, 5, 8):
        for size in (1, 2, 3):
            parts = [Team(rank, size).share(list(range(count))) for rank in range(size)]
            assert [i for part in parts for i in part] == list(range(count))
    batches = [my_batches(10, 3, Team(rank, 2)) for rank in range(2)]
    assert sorted(int(i) for part in batches for batch in part for i in batch) == list(range(10))
