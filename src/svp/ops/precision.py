"""How exact a piece of a computation is, whatever its surroundings ask for."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def exactly(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Without autocast inside, on a device that has it."""
    is_known = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if is_known else contextlib.nullcontext()


def wide(x: Tensor) -> Tensor:
    """In float32, or float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()
