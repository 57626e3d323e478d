"""SOURCE text to Splits: one kind of source, one file."""

from __future__ import annotations

import fnmatch
import importlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from svp.data.pictures import EXTENSIONS, MAX_PIXELS, shown
from svp.data.protocols import Protocol, protocol_named
from svp.data.sources.request import Request
from svp.data.splits import Splits
from svp.errors import SvpError, nearest

NOT_YET = r"hf:|(hta|vtab|fewshot)/"
KINDS = ("folder", "parquet", "digits")
TASKS = {"digits": "scikit-learn's 1,797 scans of handwritten digits, 10 classes; 1,077 / 360 / 360, never flipped"}
URL = r"[a-zA-Z][a-zA-Z0-9+.-]+://"
KNOWN = "digits, folder:DIR, parquet:DIR, or an existing folder"


def open_data(
    source: str | os.PathLike,
    *,
    protocol: str | Protocol = "default",
    seed: int = 0,
    on_bad_image: str = "error",
    max_pixels: int = MAX_PIXELS,
) -> Splits:
    """The splits of a source: "digits", "folder:DIR", "parquet:DIR", or an existing folder.

    seed          of the validation cut, where the source has no validation split
    on_bad_image  "error": a broken picture stops the run with its name; "skip": it is left out and listed
    max_pixels    a picture whose header claims more is refused before it is decoded
    Raises SvpError (kind "data" or "usage") when the source cannot be understood or used.
    """
    return _opened(source, protocol, seed, on_bad_image, max_pixels)


def open_whole(
    source: str | os.PathLike,
    *,
    protocol: str | Protocol = "default",
    on_bad_image: str = "error",
    max_pixels: int = MAX_PIXELS,
) -> Splits:
    """The pictures of a source to be measured with a model: its test split where there is one, else all of them.

    Nothing is cut off, a folder may hold test/ alone, one class or one picture of a class is enough.
    Raises SvpError as `open_data` does.
    """
    return _opened(source, protocol, 0, on_bad_image, max_pixels, whole=True)


def _opened(
    source: str | os.PathLike,
    protocol: str | Protocol,
    seed: int,
    on_bad_image: str,
    max_pixels: int,
    whole: bool = False,
) -> Splits:
    if on_bad_image not in ("error", "skip"):
        raise SvpError(f"on_bad_image is '{on_bad_image}', expected error or skip", "--on-bad-image skip", "usage")
    kind, rest = _kind(os.fspath(source))
    request = Request(
        os.fspath(source), rest, protocol_named(protocol), seed, on_bad_image == "skip", max_pixels, whole
    )
    return importlib.import_module(f"svp.data.sources.{kind}").open_source(request)


def list_tasks(pattern: str = "*") -> list[str]:
    """The names of the built-in data sets that match a wildcard pattern: sources that need no folder."""
    return fnmatch.filter(TASKS, pattern)


def picture_files(paths: Iterable[str | os.PathLike], bad: dict[str, str] | None = None) -> list[Path]:
    """Files and folders (with all below them, in natural order) to a list of picture files.

    bad: what lies in a folder and is no file, as a broken link, gets its reason here instead of being an error.
    Raises SvpError for an address, what does not exist, and a folder without pictures.
    """
    from svp.data.sources.walk import Walk

    found: list[Path] = []
    for given in paths:
        text = str(given)
        if re.match(URL, text):
            raise SvpError(f"{text} is a URL; URLs are not fetched", "download the picture and give its path", "usage")
        path = Path(text)
        if os.path.isdir(path):
            walk = Walk(skip=bad is not None)
            inside = walk.pictures(path)
            if bad is not None:
                bad |= walk.bad
            if not inside:
                raise SvpError(
                    f"{shown(path)} holds no pictures ({' '.join(EXTENSIONS)})", "give a folder of pictures", "data"
                )
            found += map(Path, inside)
        elif os.path.exists(path):
            found.append(path)
        else:
            raise SvpError(f"{shown(path)[:300]} does not exist", "give picture files or folders", "data")
    if not found:
        raise SvpError("no pictures were given", "svp predict RUN picture.jpg", "usage")
    return found


def _kind(source: str) -> tuple[str, str]:
    """(kind, path) of a source text; a bare existing folder is `parquet:` when it holds Parquet files, else `folder:`."""
    if re.match(URL, source):
        raise SvpError(f"{shown(source)} is a URL; URLs are not fetched", "download it and give the folder", "usage")
    kind, colon, rest = source.partition(":")
    if source == "digits":
        return "digits", ""
    if colon and kind in KINDS and kind != "digits":
        if not rest:
            raise SvpError(f"the source '{source}' names no folder", f"{kind}:path/to/folder", "usage")
        return kind, rest
    path = os.path.expanduser(source)
    if source and os.path.isdir(path):
        is_parquet = any(next(Path(path).glob(form), None) for form in ("*.parquet", "data/*.parquet"))
        return "parquet" if is_parquet else "folder", source
    if re.match(NOT_YET, source):
        raise SvpError(
            f"{shown(source)}: sources of this kind are not offered yet",
            f"download the pictures; sources are {KNOWN}",
            "usage",
        )
    if not source or (re.fullmatch(r"[\w-]{2,100}(:.*)?", source, re.DOTALL) and not os.path.exists(path)):
        close = nearest(kind, KINDS) if kind else []
        meant = f"did you mean {source.replace(kind, close[0], 1)}?" if close else f"sources are {KNOWN}"
        problem = f"there is no kind of source, and no folder, named '{shown(source)}'"
        raise SvpError(problem, f"{meant}; the nearest folder that exists is {shown(os.getcwd())}", "data")
    return "folder", source
