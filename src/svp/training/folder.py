"""The run folder: the only file that knows its names. Every write is whole or not there."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from svp.errors import SvpError
from svp.model.folder import TENSORS, write_flushed
from svp.training.config import differences, plain, read_yaml, to_yaml

CONFIG, METRICS, RESULT, PREDICTIONS = "config.yaml", "metrics.jsonl", "result.json", "predictions.csv"
MODEL, CHECKPOINT, STATE, EVAL, LOCK = "model", "checkpoint", "state.pt", "eval", ".lock"
OURS = (RESULT, PREDICTIONS, METRICS, MODEL, CHECKPOINT, EVAL, CONFIG)  # in the order in which they are removed
SIGNATURE = {"svp_version", "source", "recipe"}  # what config.yaml of a run holds, and no other program's
MAY_CHANGE = ("svp_version", "reading")  # between a run and its resumption: the data's hash says what was read
OF_MACHINE = ("device", "workers")


class RunFolder:
    """One run on disk. `opened` locks it and decides between a new run, a resumed one and a finished one."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).expanduser()

    # -- opening -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def opened(self, settings: dict[str, Any], resume: bool = False, overwrite: bool = False) -> Iterator[RunFolder]:
        """Lock the folder and write config.yaml; afterwards `result()` and `snapshot_file()` say how far it is.

        Raises SvpError for foreign content, other settings in the same folder, a half run without `resume`, a second
        process at work, and what the system refuses.
        """
        with self._made(), self._locked():
            if overwrite:
                self.clear()
            held = self.settings()
            if held is None:
                if resume and not overwrite:
                    raise SvpError(f"{self.path} holds no run to resume", "leave --resume out", "artefact")
                self.write(CONFIG, to_yaml(settings))
            else:
                self._compare(held, settings)
                if self.result() is None and not resume:
                    raise SvpError(
                        f"{self.path} holds an unfinished run",
                        "--resume continues it, --overwrite starts again",
                        "usage",
                    )
            try:
                yield self
            except Exception:
                if held is None and self.snapshot_file() is None and self.result() is None:
                    self.clear()  # nothing to resume: the next attempt may have other settings
                raise

    @contextlib.contextmanager
    def _made(self) -> Iterator[None]:
        """The folder made where it is missing; what was made and is still empty in the end is removed."""
        made = [path for path in (self.path, *self.path.parents) if not os.path.exists(path)]
        with self.guarded("made"):
            self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._refuse_foreign()
            yield
        finally:
            with contextlib.suppress(OSError):
                for path in made:
                    path.rmdir()

    def _refuse_foreign(self) -> None:
        with self.guarded("read"):
            names = sorted(p.name for p in self.path.iterdir() if not p.name.startswith("."))
        if names and not self._is_run():  # a folder of the user's may hold config.yaml, model/ and eval/ too
            found = CONFIG if CONFIG in names else names[0]
            raise SvpError(
                f"{self.path} holds other things ({found}) and is no run folder",
                "give a new folder with --out", "usage",
            )  # fmt: skip

    def _is_run(self) -> bool:
        try:
            return (self.settings() or {}).keys() >= SIGNATURE
        except SvpError:
            return False

    def _compare(self, held: dict[str, Any], settings: dict[str, Any]) -> None:
        old, new = (_lasting(plain(s)) for s in (held, settings))
        found = differences(old, new)
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise SvpError(
                f"{self.path} holds a run with other settings ({'; '.join(found[:3])}{more})",
                "only device and workers may change; another run needs another --out, or --overwrite; "
                "for more epochs start a new run", "usage",
            )  # fmt: skip

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        path = self.path / LOCK
        handle = -1
        with self.guarded("locked"):
            while handle < 0:
                handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
                if not _try_lock(handle):
                    who = _owner(handle)
                    os.close(handle)
                    raise SvpError(
                        f"{self.path} is in use by another process{who}", "wait for it, or give another --out", "run"
                    )
                if not _same_file(handle, path):  # its last owner has just removed it
                    os.close(handle)
                    handle = -1
        try:
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()} on {socket.gethostname()}\n".encode())
            yield
        finally:
            with contextlib.suppress(OSError):  # while the lock is held, so that nobody else can hold this file
                path.unlink()
            os.close(handle)

    def clear(self) -> None:
        """Remove what a run writes, and nothing else."""
        with self.guarded("emptied"):
            for name in OURS:
                target = self.path / name
                if target.is_dir():
                    shutil.rmtree(target)
                else:
                    target.unlink(missing_ok=True)

    # -- reading -------------------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any] | None:
        return read_yaml(self.path / CONFIG)[0] if os.path.isfile(self.path / CONFIG) else None

    def result(self) -> dict[str, Any] | None:
        """The numbers of a finished run; its presence means finished."""
        path = self.path / RESULT
        if not os.path.isfile(path):
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as err:
            raise SvpError(f"{path} is damaged: {err}", "start again with --overwrite", "artefact") from err

    def model_tensors(self) -> dict[str, Any]:
        """The saved tensors of the selected epoch."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.path / MODEL / TENSORS
        try:
            return load_file(path)
        except (OSError, SafetensorError) as err:
            raise SvpError(f"{path} cannot be read: {err}", "start again with --overwrite", "artefact") from err

    def snapshot_file(self) -> Path | None:
        path = self.path / CHECKPOINT / STATE
        return path if os.path.isfile(path) else None

    def best_file(self, epoch: int) -> Path:
        return self.path / CHECKPOINT / f"best-{epoch}.pt"

    # -- writing -------------------------------------------------------------------------------------------------------

    def save_snapshot(self, state: bytes, best: bytes | None, best_epoch: int) -> None:
        """The best epoch's tensors first (None: they lie there already), then the state that names them."""
        with self.guarded("written"):
            (self.path / CHECKPOINT).mkdir(exist_ok=True)
        if best is not None:
            self.write(self.best_file(best_epoch).relative_to(self.path), best)
        self.write(f"{CHECKPOINT}/{STATE}", state)
        for old in (self.path / CHECKPOINT).glob("best-*.pt"):
            if old != self.best_file(best_epoch):
                old.unlink(missing_ok=True)

    def log(self, line: dict[str, Any]) -> int:
        """Append a line to metrics.jsonl; returns the file's size, which a snapshot remembers."""
        path = self.path / METRICS
        with self.guarded("written", path), open(path, "ab") as f:
            f.write((to_json(line) + "\n").encode())
            return f.tell()

    def cut_log(self, size: int) -> None:
        """Forget the lines that were written after a snapshot."""
        path = self.path / METRICS
        if path.exists():
            with self.guarded("written", path):
                os.truncate(path, min(size, path.stat().st_size))

    def write_predictions(
        self, names: list[str], labels: np.ndarray, probabilities: np.ndarray, classes: tuple[str, ...]
    ) -> None:
        """One line a test picture: name, label, and the five best guesses with their probabilities."""
        text = io.StringIO()
        out = csv.writer(text, lineterminator="\n")
        top = min(5, len(classes))
        out.writerow(["picture", "label", *(f"{w}{k + 1}" for k in range(top) for w in ("guess", "probability"))])
        best = np.argsort(-probabilities, axis=-1, kind="stable")[:, :top]
        for name, label, row, order in zip(names, labels, probabilities, best, strict=True):
            out.writerow([name, classes[label], *(x for k in order for x in (classes[k], f"{row[k]:.6f}"))])
        self.write(PREDICTIONS, text.getvalue())

    def save_model(self, model: Any, card: str) -> None:
        with self.guarded("written", self.path / MODEL):
            model.save_pretrained(self.path / MODEL, card)

    def finish(self, result: dict[str, Any]) -> None:
        """Write result.json, the last file of a run, then drop the checkpoint."""
        self.write(RESULT, to_json(result, indent=2) + "\n")
        shutil.rmtree(self.path / CHECKPOINT, ignore_errors=True)

    def write(self, name: str | Path, content: str | bytes) -> None:
        """A file with this content, or the former one: written beside it, flushed to the disk, then renamed."""
        path = self.path / name
        temporary = path.with_name(f".{path.name}.new")
        with self.guarded("written", path):
            try:
                data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
                write_flushed(temporary, data)
                os.replace(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise

    @contextlib.contextmanager
    def guarded(self, done: str, path: Path | None = None) -> Iterator[None]:
        """What the system refuses, as one sentence with the path and the cause."""
        try:
            yield
        except OSError as err:
            hint = "free some space; --resume continues from the last checkpoint" if err.errno == 28 else "--out FOLDER"
            raise SvpError(f"{_short(path or self.path)} cannot be {done}: {err.strerror or err}", hint, "env") from err


def _lasting(settings: dict[str, Any]) -> dict[str, Any]:
    """Those that a run keeps to its end."""
    machine = {k: v for k, v in (settings.get("machine") or {}).items() if k not in OF_MACHINE}
    return {**{k: v for k, v in settings.items() if k not in MAY_CHANGE}, "machine": machine}


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader accepts: a number that is not finite becomes null and is named under "not_finite"."""
    strange: list[str] = []
    clean = _finite(plain(value), "", strange)
    if strange:
        clean["not_finite"] = strange
    text = json.dumps(clean, indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode()  # bytes of a name that are no text, as JSON's own escapes


def _finite(value: Any, where: str, strange: list[str]) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v, f"{where}.{k}".lstrip("."), strange) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v, f"{where}.{i}", strange) for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        strange.append(where)
        return None
    return value


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:150]}…{text[-40:]}"


def _owner(handle: int) -> str:
    with contextlib.suppress(OSError):
        text = os.read(handle, 200).decode("utf-8", "replace").strip()
        return f" ({text})" if text else ""
    return ""


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False


def _try_lock(handle: int) -> bool:
    """An exclusive lock that ends with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
