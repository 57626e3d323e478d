"""Published split files beside a folder of pictures: the lists of VTAB-1k, the JSON files of VPT's FGVC sets."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from svp.data.pictures import shown
from svp.data.sources.request import COUNTED
from svp.errors import SvpError

Parts = dict[str, tuple[list[str], list[int]]]  # split -> (paths, labels)
VTAB = {"train": ("train800.txt", "train800val200.txt"), "val": ("val200.txt",), "test": ("test.txt",)}


def is_vtab(root: Path) -> bool:
    return any((root / name).is_file() for name in VTAB["train"])


def is_fgvc(root: Path) -> bool:
    return (root / "train.json").is_file()


def vtab(root: Path) -> tuple[Parts, tuple[str, ...]]:
    """Lines "relative/path label" in train800.txt, val200.txt, test.txt (VTAB-1k as SSF's authors pack it).

    Without train800.txt, train800val200.txt is the training split and validation is not read: it lies inside.
    """
    lists: dict[str, list[tuple[str, str, int]]] = {}
    for split, names in VTAB.items():
        path = next((root / name for name in names if (root / name).is_file()), None)
        if path is not None and not (split == "val" and not (root / "train800.txt").is_file()):
            lists[split] = _list(root, path)
    every = [row for rows in lists.values() for row in rows]
    limit = max(COUNTED, len(every))
    for where, _, label in every:
        if label >= limit:
            raise SvpError(f"{where} has label {label}, expected 0, 1, … without large gaps", "number the labels from 0", "data")  # fmt: skip
    classes = tuple(str(k) for k in range(max(label for _, _, label in every) + 1))
    return {split: ([path for _, path, _ in rows], [k for _, _, k in rows]) for split, rows in lists.items()}, classes


def fgvc(root: Path) -> tuple[Parts, tuple[str, ...]]:
    """train.json, val.json, test.json: one object {relative path: class id}; the classes are the ids of train, sorted.

    Stanford Cars lists its validation pictures in train too; they are taken out of train.
    """
    rows = {
        name: _object(root / f"{name}.json") for name in ("train", "val", "test") if (root / f"{name}.json").is_file()
    }
    inside = rows["train"].keys() & rows.get("val", {}).keys()
    rows["train"] = {name: k for name, k in rows["train"].items() if name not in inside}
    ids = sorted(set(rows["train"].values()), key=lambda k: (str(type(k)), k))
    index = {k: i for i, k in enumerate(ids)}
    parts: Parts = {}
    for split, names in rows.items():
        strange = next(((name, k) for name, k in names.items() if k not in index), None)
        if strange:
            problem = f"{shown(root / split)}.json: {strange[0]} has class {strange[1]!r}, which train.json lacks"
            raise SvpError(problem, "check the files", "data")
        where = f"{shown(root / split)}.json"
        paths = [_found(root, name, where) for name in names]
        _must_exist([(where, path) for path in paths])
        parts[split] = paths, [index[k] for k in names.values()]
    return parts, tuple(str(k) for k in ids)


def _list(root: Path, path: Path) -> list[tuple[str, str, int]]:
    """(where, picture, label) of each line; `where` names file and line for messages."""
    rows: list[tuple[str, str, int]] = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        where = f"{shown(path)} line {number}"
        if not name or not re.fullmatch(r"[0-9]{1,6}", label):
            problem = f"{where} is {line[:100]!r}, expected 'path label' with a label 0, 1, …"
            raise SvpError(problem, "correct the line", "data")
        rows.append((where, _inside(root, root / name, where), int(label)))
    if not rows:
        raise SvpError(f"{shown(path)} lists no pictures", "copy it again", "data")
    _must_exist([(where, picture) for where, picture, _ in rows])
    return rows


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path))
    except ValueError as err:
        raise SvpError(f"{shown(path)} is no JSON: {err}", "copy it again", "data") from err
    if not isinstance(found, dict) or not found:
        raise SvpError(f"{shown(path)} is no JSON object of path: class id", "copy it again", "data")
    wrong = next((name for name, k in found.items() if isinstance(k, bool) or not isinstance(k, (int, str))), None)
    if wrong is not None:
        problem = f"{shown(path)}: {wrong} has class {found[wrong]!r}, expected a number or a text"
        raise SvpError(problem, "correct the file", "data")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as err:
        raise SvpError(f"{shown(path)} is no UTF-8 text", "copy it again", "data") from err
    except OSError as err:
        raise SvpError(f"{shown(path)} cannot be read: {err.strerror or err}", "check the file", "data") from err


def _found(root: Path, name: str, where: str) -> str:
    """The file a key of a JSON file means: below images/, below the folder itself, or Stanford Cars' other spellings."""
    _inside(root, root / name, where)
    bare = name.removeprefix("car_ims/")
    digits = re.sub(r"\b0(\d{5}\.jpg)$", r"\1", bare)  # 015678.jpg lies as 15678.jpg in some copies
    names = [f"{top}{key}" for key in dict.fromkeys((name, bare, digits)) for top in ("images/", "Images/", "")]
    names += [f"car_ims/{digits}"] if bare != name else []
    paths = [_inside(root, root / n, where) for n in names]
    return next((path for path in paths if os.path.isfile(path)), str(root / name))


def _inside(root: Path, path: Path, where: str) -> str:
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root)):
        raise SvpError(
            f"{where} names {shown(path)}, which lies outside {shown(root)}", "paths must stay inside", "data"
        )
    return str(path)


def _must_exist(named: list[tuple[str, str]]) -> None:
    """Raise SvpError for the first (where, path) whose path is no file, with how many there are."""
    lost = [row for row in named if not os.path.isfile(row[1])]
    if lost:
        where, path = lost[0]
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise SvpError(f"{where} names {shown(path)}{more}, which cannot be found", "put the pictures there", "data")
