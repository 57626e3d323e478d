"""Published split files beside a folder of pictures: the lists of VTAB-1k, the JSON files of VPT's FGVC sets."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from svp.data.pictures import shown
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
    parts: Parts = {}
    for split, names in VTAB.items():
        path = next((root / name for name in names if (root / name).is_file()), None)
        if path is not None and not (split == "val" and not (root / "train800.txt").is_file()):
            parts[split] = _list(root, path)
    _must_exist(parts, root)
    highest = max(label for _, labels in parts.values() for label in labels)
    return parts, tuple(str(k) for k in range(highest + 1))


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
        paths = [_found(root, name, f"{split}.json") for name in names]
        parts[split] = paths, [index[k] for k in names.values()]
    _must_exist(parts, root)
    return parts, tuple(str(k) for k in ids)


def _list(root: Path, path: Path) -> tuple[list[str], list[int]]:
    paths: list[str] = []
    labels: list[int] = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not name or not re.fullmatch(r"[0-9]{1,6}", label):
            problem = f"{shown(path)} line {number} is {line[:100]!r}, expected 'path label' with a label 0, 1, …"
            raise SvpError(problem, "correct the line", "data")
        paths.append(_inside(root, root / name, f"{shown(path)} line {number}"))
        labels.append(int(label))
    if not paths:
        raise SvpError(f"{shown(path)} lists no pictures", "copy it again", "data")
    return paths, labels


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
    return next((str(root / n) for n in names if (root / n).is_file()), str(root / name))


def _inside(root: Path, path: Path, where: str) -> str:
    if not Path(os.path.normpath(path)).is_relative_to(os.path.normpath(root)):
        raise SvpError(
            f"{where} names {shown(path)}, which lies outside {shown(root)}", "paths must stay inside", "data"
        )
    return str(path)


def _must_exist(parts: Parts, root: Path) -> None:
    for split, (paths, _) in parts.items():
        lost = [path for path in paths if not os.path.isfile(path)]
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            problem = f"{shown(root)}: the {split} list names {shown(lost[0])}{more}, which cannot be found"
            raise SvpError(problem, "put the pictures there", "data")
