"""A folder of pictures: DIR/class/*.jpg, or DIR/{train,val,test}/class/*.jpg; lists of VTAB-1k and FGVC split files too."""

from __future__ import annotations

from pathlib import Path

from svp.data.pictures import EXTENSIONS, shown
from svp.data.sources.checks import finished
from svp.data.sources.lists import fgvc, is_fgvc, is_vtab, vtab
from svp.data.sources.request import Request
from svp.data.sources.walk import Walk
from svp.data.splits import Files, Splits
from svp.errors import SvpError

Parts = dict[str, tuple[list[str], list[int]]]  # split -> (paths, labels)
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}
TREE = "the tree is DIR/class/picture.jpg, or DIR/train/class/picture.jpg with val and test beside train"


def open_source(request: Request) -> Splits:
    """A folder -> splits; classes in natural order of the training folder's names. Nothing is written into it."""
    root, walk = request.folder(), Walk(request.skip)
    by_number = is_vtab(root)
    if by_number:
        parts, classes, found = *vtab(root), "lists of VTAB-1k"
    elif is_fgvc(root):
        parts, classes, found = *fgvc(root), "split files of FGVC (train.json)"
    else:
        parts, classes, found = _folders(root, walk, request.whole)
    if "train" not in parts:
        raise SvpError(f"{shown(root)} holds no pictures in its class folders", "add pictures", "data")
    files = {name: Files(paths, labels, str(root), request.max_pixels) for name, (paths, labels) in parts.items()}
    opened = Splits(
        request.source, files["train"], files.get("val"), files.get("test"), classes, protocol=request.protocol,  # type: ignore[arg-type]
        skipped=tuple(walk.bad.values()),
    ).noted(f"layout: {found}", *walk.notes())  # fmt: skip
    return finished(opened, request, by_number)


def _folders(root: Path, walk: Walk, whole: bool) -> tuple[Parts, tuple[str, ...], str]:
    tops = _tops(root, walk, whole)
    classes = tuple(walk.folders(tops["train"]))
    if not classes:
        raise _nothing(root, tops["train"], walk)
    if len(classes) == 1 and not whole and len(walk.folders(root / classes[0])) > 1 and tops["train"] == root:
        problem = f"{shown(root)} needs at least two classes, it has only '{shown(classes[0])}'"
        raise SvpError(problem, f"did you mean folder:{shown(root / classes[0])}?", "data")
    found = {split: _by_class(top, walk) for split, top in tops.items()}
    empty = next((name for name, paths in found["train"].items() if not paths), None)
    if empty is not None and not whole:
        problem = f"the class folder {shown(tops['train'] / empty)} holds no pictures"
        raise SvpError(problem, "add pictures, or remove the folder", "data")
    parts: Parts = {}
    for split, pictures in found.items():
        strange = [shown(name) for name, paths in pictures.items() if paths and name not in classes]
        if strange:
            problem = f"{shown(tops[split])} has classes that train lacks: {', '.join(strange[:10])}"
            raise SvpError(problem, f"train has {', '.join(map(shown, classes[:10]))}", "data")
        rows = [(path, k) for k, name in enumerate(classes) for path in pictures.get(name, ())]
        if rows:
            parts[split] = [path for path, _ in rows], [k for _, k in rows]
        else:
            walk.told.append(f"{shown(tops[split])} holds no pictures")
    return parts, classes, "class/picture" if tops["train"] == root else "train/class/picture"


def _by_class(top: Path, walk: Walk) -> dict[str, list[str]]:
    """The pictures of each class folder; those beside the class folders are counted."""
    for entry in walk.listed(top, count=True):
        if not entry.is_dir():
            walk.count_file(entry)
    return {name: walk.pictures(top / name) for name in walk.folders(top)}


def _tops(root: Path, walk: Walk, whole: bool) -> dict[str, Path]:
    """Where the class folders of each split are: root/{train,val,test}, or root itself for train.

    What is only measured is all called train: root/test where there is one.
    """
    folders = walk.folders(root)
    found = {split: [name for name in folders if name.lower() in names] for split, names in SPLITS.items()}
    if whole and len(found["test"]) == 1 and walk.folders(root / found["test"][0]):
        return {"train": root / found["test"][0]}
    if not found["train"] or not walk.folders(root / found["train"][0]):  # a class may be called "train", of trains
        others = [name for split in ("val", "test") for name in found[split]]
        if others and len(folders) == len(others):
            raise SvpError(f"{shown(root)} has {' and '.join(others)} but no train folder", TREE, "data")
        if found["train"] and others and len(folders) == len(others) + len(found["train"]):
            raise _nothing(root, root / found["train"][0], walk)  # splits without classes, not classes of such names
        return {"train": root}
    for split, names in found.items():
        if len(names) > 1:
            raise SvpError(
                f"{shown(root)} has {' and '.join(names)}, which are one split", f"keep one {split} folder", "data"
            )
    walk.listed(root, count=True)
    used = {split: names[0] for split, names in found.items() if names}
    unused = [shown(name) for name in folders if name not in used.values()]
    walk.told += [f"ignored: the folders {', '.join(unused)} beside train"] if unused else []
    return {split: root / name for split, name in used.items()}


def _nothing(root: Path, top: Path, walk: Walk) -> SvpError:
    """The error for a folder without class folders."""
    loose = walk.loose(top)
    if loose:
        problem = f"{shown(top)} holds {len(loose)} pictures but no class folders"
        return SvpError(problem, f"{TREE}; to label them: svp predict RUN {shown(top)}", "data")
    if any(root.glob("*.parquet")):
        return SvpError(f"{shown(root)} holds Parquet files, no pictures", f"parquet:{shown(root)}", "data")
    return SvpError(f"{shown(root)} holds no pictures ({' '.join(EXTENSIONS)})", TREE, "data")
