"""A folder of pictures: DIR/class/*.jpg, or DIR/{train,val,test}/class/*.jpg; lists of VTAB-1k and FGVC split files too."""

from __future__ import annotations

import json
import os
from pathlib import Path

from svp.data.pictures import EXTENSIONS, FOREIGN_EXTENSIONS
from svp.data.protocols import Protocol
from svp.data.sources import existing
from svp.data.sources.checks import finished
from svp.data.splits import Files, Splits, natural_sorted
from svp.errors import SvpError

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}
IGNORED = ("__macosx", "thumbs.db", "desktop.ini")
TREE = "the tree is DIR/class/picture.jpg, or DIR/train/class/picture.jpg with val and test beside train"


def open_source(rest: str, source: str, protocol: Protocol, skip: bool, max_pixels: int) -> Splits:
    """A folder -> splits; classes in natural order of the training folder's names; nothing is written into it."""
    root = existing(rest)
    seen = Seen(skip)
    if (root / "train800.txt").is_file() or (root / "train800val200.txt").is_file():
        parts, classes = _vtab(root), ()
    elif (root / "train.json").is_file():
        parts, classes = _fgvc(root)
    else:
        parts, classes = _folders(root, seen)
    top = max((max(labels, default=-1) for _, labels in parts.values()), default=-1)
    classes = classes or tuple(str(k) for k in range(top + 1))
    files = {name: Files(paths, labels, str(root), max_pixels) for name, (paths, labels) in parts.items()}
    opened = Splits(source, files["train"], files.get("val"), files.get("test"), classes, protocol=protocol, notes=seen.notes(),
                    skipped=tuple(seen.bad))  # fmt: skip
    return finished(opened, skip)


class Seen:
    """What was passed over on the way, and why."""

    def __init__(self, skip: bool):
        self.skip, self.hidden, self.other, self.bad = skip, 0, 0, list[str]()

    def refuse(self, problem: str, hint: str) -> None:
        """A picture that cannot be used: an error, or with skip a line in the list."""
        if not self.skip:
            raise SvpError(problem, hint, "data")
        self.bad.append(problem)

    def notes(self) -> tuple[str, ...]:
        kinds = (
            (self.hidden, "hidden files and folders were ignored"),
            (self.other, "files that are no pictures were ignored"),
        )
        return tuple(f"{count} {what}" for count, what in kinds if count)


def _folders(root: Path, seen: Seen):
    entries = _listed(root, seen)
    folders = {p.name: p for p in entries if p.is_dir()}
    named = {
        split: next((folders[n] for low in names for n in folders if n.lower() == low), None)
        for split, names in SPLITS.items()
    }
    if named["train"] is None and (named["val"] or named["test"]) and len(folders) <= 2:
        raise SvpError(f"{root} has {' and '.join(sorted(folders))} but no train folder", TREE, "data")
    tops = {split: path for split, path in named.items() if path} if named["train"] else {"train": root}
    classes = tuple(natural_sorted([p.name for p in _listed(tops["train"], seen) if p.is_dir()]))
    if not classes:
        loose = [p for p in entries if p.suffix.lower() in EXTENSIONS]
        if loose:
            raise SvpError(
                f"{root} holds {len(loose)} pictures but no class folders",
                f"{TREE}; to label pictures: svp predict RUN {root}",
                "data",
            )
        raise SvpError(f"{root} holds no pictures ({' '.join(EXTENSIONS)})", TREE, "data")
    index = {name: k for k, name in enumerate(classes)}
    parts = {}
    for split, top in tops.items():
        paths, labels = [], []
        for folder in natural_sorted([p.name for p in _listed(top, seen) if p.is_dir()]):
            if folder not in index:
                inside = _pictures(top / folder, seen)
                if inside:
                    raise SvpError(
                        f"{top} has the class '{folder}', which train lacks",
                        f"train has {', '.join(classes[:10])}",
                        "data",
                    )
                continue
            found = _pictures(top / folder, seen)
            if split == "train" and not found:
                raise SvpError(
                    f"the class folder {top / folder} holds no pictures", "add pictures, or remove the folder", "data"
                )
            paths += found
            labels += [index[folder]] * len(found)
        if paths:
            parts[split] = paths, labels
    return parts, classes


def _pictures(folder: Path, seen: Seen) -> list[str]:
    """All pictures in a class folder and below, in natural order; symbolic links are followed once."""
    found: list[str] = []
    visited: set[tuple[int, int]] = set()

    def walk(path: Path) -> None:
        status = path.stat()
        if (status.st_dev, status.st_ino) in visited:
            raise SvpError(f"{path} is a symbolic link that leads back into itself", "remove the link", "data")
        visited.add((status.st_dev, status.st_ino))
        for entry in _listed(path, seen):
            if entry.is_symlink() and not entry.exists():
                seen.refuse(f"{entry} is a broken symbolic link", "remove it")
            elif entry.is_dir():
                walk(entry)
            elif entry.suffix.lower() in EXTENSIONS or (not entry.suffix and _is_picture(entry)):
                if os.access(entry, os.R_OK):
                    found.append(str(entry))
                else:
                    seen.refuse(f"{entry} cannot be read: no permission", f"chmod u+r {entry}")
            elif entry.suffix.lower() in FOREIGN_EXTENSIONS:
                kind = FOREIGN_EXTENSIONS[entry.suffix.lower()]
                seen.refuse(f"{entry} is a {kind} file, which is not read here", "convert it to PNG or JPEG")
            else:
                seen.other += 1

    walk(folder)
    order = natural_sorted([os.path.relpath(path, folder) for path in found])
    return [str(folder / name) for name in order]


def _is_picture(path: Path) -> bool:
    with path.open("rb") as f:
        start = f.read(12)
    return start.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*", b"MM\x00*")) or start[8:12] == b"WEBP"


def _listed(folder: Path, seen: Seen) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
    except PermissionError as err:
        raise SvpError(f"the folder {folder} cannot be read: no permission", f"chmod u+rx {folder}", "data") from err
    except OSError as err:
        raise SvpError(
            f"the folder {folder} cannot be read: {err.strerror}", "check for symbolic links that form a loop", "data"
        ) from err
    plain = [p for p in entries if not p.name.startswith(".") and p.name.lower() not in IGNORED]
    seen.hidden += len(entries) - len(plain)
    return plain


def _vtab(root: Path):
    """Lines "relative/path label" in train800.txt, val200.txt, test.txt (VTAB-1k as SSF's authors pack it)."""
    names = {"train": ("train800.txt", "train800val200.txt"), "val": ("val200.txt",), "test": ("test.txt",)}
    parts = {}
    for split, files in names.items():
        path = next((root / name for name in files if (root / name).is_file()), None)
        if path is None or (split == "val" and not (root / "train800.txt").is_file()):
            continue
        paths, labels = [], []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            name, _, label = line.rpartition(" ")
            if not name or not label.isdigit():
                raise SvpError(
                    f"{path} line {number} is {line!r}, expected 'path label' with a label 0, 1, …",
                    "correct the line",
                    "data",
                )
            paths.append(_inside(root, root / name, f"{path} line {number}"))
            labels.append(int(label))
        parts[split] = paths, labels
    _must_exist(parts, root)
    return parts


def _fgvc(root: Path):
    """train.json, val.json, test.json: one object {relative path: class id}; ids are mapped by the training ids."""
    raw = {}
    for split in SPLITS:
        path = root / f"{split}.json"
        if path.is_file():
            try:
                raw[split] = json.loads(path.read_text(encoding="utf-8"))
                assert isinstance(raw[split], dict)
            except (ValueError, AssertionError) as err:
                raise SvpError(f"{path} is no JSON object of path: class id", "copy it again", "data") from err
    ids = sorted(set(raw["train"].values()), key=lambda k: (str(type(k)), k))
    index = {k: i for i, k in enumerate(ids)}
    below = next((root / name for name in ("images", "Images") if (root / name).is_dir()), root)
    parts = {}
    for split, rows in raw.items():
        for name, k in rows.items():
            if k not in index:
                raise SvpError(
                    f"{root / split}.json: {name} has class {k!r}, which train.json lacks", "check the files", "data"
                )
        paths = [_inside(root, (below if (below / n).exists() else root) / n, f"{split}.json") for n in rows]
        parts[split] = paths, [index[k] for k in rows.values()]
    _must_exist(parts, root)
    return parts, tuple(str(k) for k in ids)


def _inside(root: Path, path: Path, where: str) -> str:
    if not Path(os.path.normpath(path)).is_relative_to(os.path.normpath(root)):
        raise SvpError(f"{where} names {path}, which lies outside {root}", "paths must stay inside the folder", "data")
    return str(path)


def _must_exist(parts, root: Path) -> None:
    for split, (paths, _) in parts.items():
        lost = [p for p in paths if not os.path.exists(p)]
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise SvpError(
                f"{root}: the {split} list names {lost[0]}{more}, which does not exist",
                "put the pictures there",
                "data",
            )
