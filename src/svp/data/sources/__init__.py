"""SOURCE text to Splits: one kind of source, one file."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from pathlib import Path

from svp.data.pictures import EXTENSIONS, MAX_PIXELS
from svp.data.protocols import Protocol, protocol_named
from svp.data.splits import Splits, natural_sorted
from svp.errors import SvpError, nearest

KINDS = ("folder", "parquet", "digits")


def open_data(
    source: str | os.PathLike,
    *,
    protocol: str | Protocol = "default",
    on_bad_image: str = "error",
    max_pixels: int = MAX_PIXELS,
) -> Splits:
    """The splits of a source: "digits", "folder:DIR", "parquet:DIR", or an existing folder.

    on_bad_image  "error": a broken picture stops the run with its name; "skip": it is left out and listed
    Raises SvpError (kind "data" or "usage") when the source cannot be understood or used.
    """
    source = str(source)
    if on_bad_image not in ("error", "skip"):
        raise SvpError(f"on_bad_image is '{on_bad_image}', expected error or skip", "--on-bad-image skip", "usage")
    row = protocol_named(protocol)
    kind, colon, rest = source.partition(":")
    if source == "digits":
        kind, rest = "digits", ""
    elif not colon or kind not in KINDS:
        kind, rest = _guess(source), source
    elif not rest:
        raise SvpError(f"the source '{source}' names no folder", f"{kind}:path/to/folder", "usage")
    module = importlib.import_module(f"svp.data.sources.{kind}")
    return module.open_source(rest, source, row, on_bad_image == "skip", max_pixels)


def existing(folder: str) -> Path:
    """The folder, or an error with its nearest existing parent."""
    path = Path(folder).expanduser()
    try:
        if path.is_dir():
            return path
        if path.exists():
            raise SvpError(
                f"{folder} is a file, expected a folder of pictures", "folder:DIR with DIR/class/picture.jpg", "data"
            )
    except OSError as err:
        raise SvpError(f"{folder[:200]} cannot be looked at: {err.strerror}", "check the path", "data") from err
    parent = next((p for p in path.parents if p.is_dir()), Path())
    close = nearest(path.name, [p.name for p in parent.iterdir() if p.is_dir()]) if parent == path.parent else []
    hint = f"did you mean {parent / close[0]}?" if close else f"the nearest folder that exists is {parent.resolve()}"
    raise SvpError(f"{folder} does not exist", hint, "data")


def picture_files(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """Files and folders (with all below them) to a list of picture files; raises SvpError for what is neither."""
    found: list[Path] = []
    for text in paths:
        text = str(text)
        if text.split("://")[0] in ("http", "https", "ftp", "s3") and "://" in text:
            raise SvpError(
                f"{text} is an address; addresses are not fetched", "download the picture and give its path", "usage"
            )
        path = Path(text)
        if path.is_dir():
            inside = [
                p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in EXTENSIONS and not _hidden(p, path)
            ]
            if not inside:
                raise SvpError(
                    f"{path} holds no pictures ({' '.join(EXTENSIONS)})", "give a folder with pictures", "data"
                )
            found += [path / name for name in natural_sorted([str(p.relative_to(path)) for p in inside])]
        elif path.is_file():
            found.append(path)
        else:
            raise SvpError(f"{text} does not exist", "give picture files or folders", "data")
    if not found:
        raise SvpError("no pictures were given", "svp predict RUN picture.jpg", "usage")
    return found


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _guess(source: str) -> str:
    """A bare existing folder is `parquet:` when it holds Parquet files, else `folder:`."""
    path = Path(source).expanduser()
    if path.is_dir():
        return "parquet" if any(path.glob("*.parquet")) else "folder"
    looks_like_path = os.sep in source or path.exists() or path.suffix
    if not looks_like_path:
        kind = source.partition(":")[0]
        close = nearest(kind, KINDS)
        hint = f"did you mean {close[0]}?" if close else "digits, folder:DIR or parquet:DIR"
        raise SvpError(f"there is no source or folder '{source}'", hint, "data")
    existing(source)
    return "folder"
