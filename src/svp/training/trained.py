"""A trained run read back: what it was trained on, its model, and the labels it gives to new pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svp.data.pictures import read_picture
from svp.data.protocols import DEFAULT, Protocol
from svp.errors import SvpError, nearest
from svp.model import AdaptedModel, Prediction, load, read_json
from svp.model.folder import CONFIG as ADAPTER
from svp.options import build
from svp.training.folder import CONFIG, MODEL, RunFolder


@dataclass(frozen=True)
class Trained:
    """An adapter folder, and the run folder around it where there is one.

    config             the content of adapter_config.json
    settings, result   those of config.yaml and result.json; empty for an adapter without a run
    """

    folder: Path
    run: Path | None
    config: dict[str, Any]
    settings: dict[str, Any]
    result: dict[str, Any]

    @property
    def home(self) -> Path:
        """The folder that a person means: of the run, else of the adapter."""
        return self.run or self.folder

    @property
    def source(self) -> str | None:
        """The source it was trained on, as text for `open_data`."""
        return self.settings.get("source") or (self.config.get("task") or {}).get("source")

    @property
    def protocol(self) -> Protocol | str:
        """The protocol it was trained under, whole from config.yaml, else by its name."""
        whole = self.settings.get("protocol")
        if isinstance(whole, dict):
            return build(Protocol, whole, f"the protocol in {self.home / CONFIG}")
        return whole or (self.config.get("task") or {}).get("protocol") or DEFAULT

    @property
    def batch_size(self) -> int:
        """Pictures of a forward pass when the run was measured."""
        return (self.settings.get("recipe") or {}).get("eval_batch_size") or 64

    def amp(self, device_type: str) -> str:
        """The precision the run was measured in, on the same kind of device; "auto" elsewhere."""
        used = (self.result.get("timing") or {}).get("device", "")
        return self.settings.get("amp", "auto") if used.partition(":")[0] == device_type else "auto"

    def model(self, *, weights: str | None = None, kernel: str = "auto", device: str = "cpu") -> AdaptedModel:
        """The model with the tensors of the selected epoch.

        weights  of the backbone; None: those it was trained on. Random ones are drawn again, which the fingerprint proves.
        Raises SvpError when files are missing or damaged, or the backbone is not the one it was trained on.
        """
        return load(self.folder, weights=weights, kernel=kernel, device=device)


def read_trained(path: str | os.PathLike) -> Trained:
    """What lies in a run folder, in its model/ or in any other adapter folder; no weights are read yet.

    Raises SvpError for what does not exist, holds no adapter, or is a run that has not finished.
    """
    path = Path(path).expanduser()
    folder = path / MODEL if (path / MODEL / ADAPTER).is_file() else path
    if not (folder / ADAPTER).is_file():
        raise _no_run(path)
    home = folder.parent if folder.parent.name else folder.resolve().parent
    run = RunFolder(home) if folder.resolve().name == MODEL and (home / CONFIG).is_file() else None
    return Trained(
        folder, run.path if run else None, read_json(folder / ADAPTER),
        (run.settings() if run else None) or {}, (run.result() if run else None) or {},
    )  # fmt: skip


def _no_run(path: Path) -> SvpError:
    if (path / CONFIG).is_file():
        return SvpError(
            f"{path} holds a run that has not finished",
            f"svp train --config {path / CONFIG} --out {path} --resume", "artefact",
        )  # fmt: skip
    if path.is_dir():
        runs = sorted(p.parent.parent.name for p in path.glob(f"*/{MODEL}/{ADAPTER}"))
        if runs:
            more = f" and {len(runs) - 3} more" if len(runs) > 3 else ""
            return SvpError(f"{path} holds {len(runs)} runs: {', '.join(runs[:3])}{more}", f"{path / runs[0]}", "usage")
        return SvpError(f"{path} holds no trained run ({ADAPTER})", "give a run folder of `svp train`", "artefact")
    if path.exists():
        return SvpError(
            f"{path} is a file, expected the folder of a run", "give a run folder of `svp train`", "artefact"
        )
    parent = path.parent
    siblings = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    close = nearest(path.name, siblings)
    hint = f"did you mean {parent / close[0]}?" if close else "give a run folder of `svp train`"
    return SvpError(f"{path} does not exist", hint, "artefact")


@dataclass(frozen=True)
class Unread:
    """A picture that was left out, and why."""

    path: str
    reason: str


def label(
    model: AdaptedModel, files: Sequence[str | os.PathLike], *, batch_size: int = 32, top: int = 5, skip: bool = False
) -> Iterator[Prediction | Unread]:
    """One label a file, in order, as they are computed; with skip a file that cannot be read is Unread, else an error."""
    for start in range(0, len(files), batch_size):
        batch, bad = files[start : start + batch_size], {}
        try:
            found = model.predict(batch, batch_size, top)
        except SvpError as err:
            bad = _unread(batch) if skip and err.kind == "data" else {}
            if not bad:
                raise
            good = [path for path in batch if str(path) not in bad]
            found = model.predict(good, batch_size, top) if good else []
        labels = iter(found)
        for path in batch:
            yield Unread(str(path), bad[str(path)]) if str(path) in bad else next(labels)


def _unread(batch: Sequence[str | os.PathLike]) -> dict[str, str]:
    bad = {}
    for path in batch:
        try:
            read_picture(path)
        except SvpError as err:
            bad[str(path)] = err.problem
    return bad
