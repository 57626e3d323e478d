"""The folder of a saved adapter: what lies in it, and that it is written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from svp.errors import SvpError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    """An adapter folder of these files, in place of an older one; it appears whole, or the older one stays.

    What else lies in the older one, for example the weights of a converted backbone, lies in the new one too.
    Raises SvpError when it holds something else than an adapter, is where this process works, or cannot be written.
    """
    folder = folder.resolve()
    old = folder.with_name(f".{folder.name}-old-{os.getpid()}")
    work = None
    try:
        if Path.cwd().is_relative_to(folder):
            problem = f"{folder} is the working directory, which cannot be replaced"
            raise SvpError(problem, "a folder in it: adapter/", "usage")
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and not (folder / CONFIG).exists() and any(folder.iterdir()):
            raise SvpError(f"{folder} exists and is no adapter folder", "choose another name", kind="artefact")
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        for name, content in files.items():
            write_flushed(work / name, content)
        work.chmod(0o755)
        if folder.exists():
            for path in folder.iterdir():
                if path.name not in files:
                    _beside(path, work / path.name)
            folder.rename(old)
        work.rename(folder)
    except BaseException as err:
        if old.exists() and not folder.exists():
            old.rename(folder)
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        if not isinstance(err, OSError):
            raise
        problem = f"{folder} cannot be written: {err.strerror or err}"
        raise SvpError(problem, "check the folder and the space on its disk", "env") from err
    shutil.rmtree(old, ignore_errors=True)
    return folder


def write_flushed(path: Path, content: bytes) -> None:
    """Bytes into a file, and through the system's buffers onto the disk."""
    with open(path, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def _beside(path: Path, new: Path) -> None:
    """A file or folder under another name, without another copy of the bytes where the file system can do that."""
    if path.is_dir() and not path.is_symlink():
        shutil.copytree(path, new, symlinks=True, copy_function=_link)
    else:
        _link(path, new)


def _link(path: str | Path, new: str | Path, **_: Any) -> None:
    try:
        os.link(path, new, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(path, new, follow_symlinks=False)


def read_json(path: Path, limit: int = 10_000_000) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes; raises SvpError when it is none."""
    try:
        if path.stat().st_size > limit:
            raise SvpError(f"{path} has {path.stat().st_size:,} bytes, at most {limit:,} are read", kind="artefact")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise SvpError(f"{path} is no JSON file: {err}", "the file is damaged; copy it again", "artefact") from err
    if not isinstance(value, dict):
        raise SvpError(
            f"{path} holds {type(value).__name__}, expected an object", "the file is damaged; copy it again", "artefact"
        )
    return value
