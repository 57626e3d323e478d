"""The state of a half run: all that a resumed one needs to give the numbers of an undisturbed one."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svp.errors import SvpError

FORMAT = 1
State = dict[str, Tensor]


@dataclass
class Progress:
    """Where a run stands, in plain numbers. What is random in a step depends on (seed, phase, epoch, step) alone."""

    phase: int = 0
    epoch: int = 0  # of the phase, from 0
    step: int = 0  # optimiser steps done in this epoch
    total_steps: int = 0
    past_epochs: int = 0  # of earlier phases
    loss: float = 0.0  # sums over this epoch's pictures so far
    correct: int = 0
    seen: int = 0
    best: float = -1.0
    best_epoch: int = 0  # over all phases, from 1; 0: none yet
    best_val: float | None = None
    last_val: float | None = None
    seconds: float = 0.0
    images: int = 0  # trained on, over the whole run
    train_seconds: float = 0.0
    metrics_bytes: int = 0


@dataclass
class Snapshot:
    """A checkpoint: progress, what trains, the optimiser's memory and what phases have changed."""

    progress: Progress
    model: State
    optimizer: dict[str, Any]
    scaler: dict[str, Any] = field(default_factory=dict)
    average: State = field(default_factory=dict)
    generator: Tensor | None = None  # of run.generator, which methods may draw from
    entries: dict[int, State] = field(default_factory=dict)  # what `begin` of each phase so far was given


def to_bytes(snapshot: Snapshot) -> bytes:
    """The snapshot as torch writes it, from tensors on the CPU and plain values alone."""
    values = {f.name: getattr(snapshot, f.name) for f in fields(snapshot)}
    return state_bytes({"format": FORMAT, **values, "progress": asdict(snapshot.progress)})


def from_file(path: Path) -> Snapshot:
    """Raises SvpError (kind "artefact") when the file is damaged or of a newer svp."""
    values = load_state(path)
    try:
        if values.pop("format") > FORMAT:
            raise SvpError(f"{path} was written by a newer svp", "pip install -U svp-vision", "artefact")
        values.pop("options", None)  # of earlier versions, which never read it
        return Snapshot(**{**values, "progress": Progress(**values["progress"])})
    except (KeyError, TypeError) as err:
        raise SvpError(f"{path} is no checkpoint of a run: {err}", "start again with --overwrite", "artefact") from err


def state_bytes(values: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(_to_cpu(values), buffer)
    return buffer.getvalue()


def load_state(path: Path) -> dict[str, Any]:
    """A file of tensors and plain values; nothing in it is executed."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as err:
        raise SvpError(f"{path} cannot be read: {err.strerror or err}", "check its permissions", "env") from err
    except MemoryError:
        raise
    except Exception as err:  # torch raises many kinds for damaged files
        raise SvpError(f"{path} cannot be read: it is damaged", "start again with --overwrite", "artefact") from err


def clone(state: State) -> State:
    return {name: t.detach().clone() for name, t in state.items()}


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _to_cpu(v) for key, v in value.items()}
    return type(value)(_to_cpu(v) for v in value) if isinstance(value, (list, tuple)) else value
