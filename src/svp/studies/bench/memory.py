"""How much memory a step takes beside the weights: measured in a process of its own, so that no row inherits another's."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from svp.studies.bench.peers import PEERS
from svp.studies.bench.setting import Setting
from svp.training.machine import forget_peak_memory, peak_memory_bytes

CODE = "from svp.studies.bench.memory import main; main()"


def memory_bytes(setting: Setting, row: str) -> dict[str, int | None]:
    """{"infer", "train"}: how far the peak grows over two steps; None where that cannot be told."""
    asked = json.dumps({"setting": setting.as_dict(), "row": row})
    done = subprocess.run([sys.executable, "-c", CODE, asked], capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout.strip().rpartition("\n")[2])
    except ValueError:  # killed, most likely for its memory
        return {"infer": None, "train": None}


def main() -> None:
    asked = json.loads(sys.argv[1])
    setting = Setting(**asked["setting"])
    torch.set_num_threads(setting.threads)
    build, device = PEERS[asked["row"]].build, torch.device(setting.device)
    net: Any = setting.shape()
    build(setting.but(img_size=net.patch_size, batch_size=1, overrides={**setting.overrides, "depth": 1})).train()
    step = build(setting)  # the small one before it has loaded the code that a first step loads
    forget_peak_memory(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else peak_memory_bytes(device)
    # the smaller peak first: not every system forgets one
    print(json.dumps({what: growth(getattr(step, what), before, device) for what in ("infer", "train")}))


def growth(run: Callable[[], object], before: int | None, device: torch.device) -> int | None:
    forget_peak_memory(device)
    for _ in range(2):
        run()
    after = peak_memory_bytes(device)
    return None if before is None or after is None else max(after - before, 0)
