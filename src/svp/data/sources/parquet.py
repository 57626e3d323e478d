"""Hugging Face's image layout in Parquet: train-*.parquet, validation-*, test-*; columns image {bytes, path} and label."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from svp.data.pictures import shown
from svp.data.sources.checks import finished
from svp.data.sources.request import COUNTED, Request
from svp.data.splits import Encoded, Splits
from svp.errors import SvpError

NAMES = {"train": ("train",), "val": ("validation", "valid", "val"), "test": ("test",)}
LAYOUT = "columns image {bytes, path} and label are read, as Hugging Face's datasets write them"
ROWS = 1024  # read at a time


def open_source(request: Request) -> Splits:
    """A folder of Parquet files -> splits; class names from the files' metadata, else the numbers.

    The encoded pictures are read into memory and decoded when they are asked for.
    """
    folder = request.folder()
    below = folder / "data" if not any(folder.glob("*.parquet")) and (folder / "data").is_dir() else folder
    files = {split: _files(below, names) for split, names in NAMES.items()}
    if not files["train"] and not (request.whole and files["test"]):
        seen = sorted(p.name for p in below.glob("*.parquet"))[:3]
        what = f"it has {', '.join(map(shown, seen))}" if seen else "it has no Parquet files"
        hint = (
            "name the files train-*.parquet, validation-*, test-*"
            if seen
            else f"folder:{shown(folder)} reads picture files"
        )
        raise SvpError(f"{shown(folder)} has no train-*.parquet; {what}", hint, "data")
    read = {split: [_read(path) for path in paths] for split, paths in files.items() if paths}
    classes = _common_classes([file for shards in read.values() for file in shards])
    parts: dict[str, Any] = {split: _joined(shards, request.max_pixels) for split, shards in read.items()}
    for split, part in parts.items():
        wrong = np.flatnonzero((part.labels < 0) | (part.labels >= len(classes)))
        if len(wrong):
            problem = f"{part.name(wrong[0])} has label {part.labels[wrong[0]]}, expected 0…{len(classes) - 1}"
            more = f" (and {len(wrong) - 1} more rows)" if len(wrong) > 1 else ""
            raise SvpError(problem + more, f"check the labels of {split}", "data")
    opened = Splits(
        request.source, parts.get("train", parts.get("test")), parts.get("val"), parts.get("test"), classes,  # type: ignore[arg-type]
        protocol=request.protocol,
    )  # fmt: skip
    return finished(opened, request)


@dataclass
class _File:
    """What one file holds; places are (row group, start, end) into the blobs."""

    path: Path
    classes: tuple[str, ...]
    blobs: list[bytes] = field(default_factory=list)
    places: list[np.ndarray] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


def _files(folder: Path, names: tuple[str, ...]) -> list[Path]:
    found = {p for name in names for pattern in (f"{name}-*.parquet", f"{name}.parquet") for p in folder.glob(pattern)}
    return sorted(found)


def _read(path: Path) -> _File:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            _check_columns(path, schema)
            found = _File(path, _class_names(schema.metadata or {}))
            for batch in file.iter_batches(ROWS, columns=["image", "label"]):
                _take(found, batch)
    except PermissionError as err:
        raise SvpError(f"{shown(path)} cannot be read: no permission", f"chmod u+r {shown(path)}", "data") from err
    except (pa.ArrowException, OSError) as err:
        reason = (str(err).splitlines() or [type(err).__name__])[0]
        raise SvpError(f"{shown(path)} is no whole Parquet file: {reason}", "copy it again", "data") from err
    return found


def _check_columns(path: Path, schema: Any) -> None:
    import pyarrow as pa

    for column in ("image", "label"):
        if column not in schema.names:
            raise SvpError(
                f"{shown(path)} has no column '{column}'; its columns: {', '.join(schema.names)}", LAYOUT, "data"
            )
    image, label = schema.field("image").type, schema.field("label").type
    if not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
        raise SvpError(f"{shown(path)}: column image is {image}, expected {{bytes, path}}", LAYOUT, "data")
    if not pa.types.is_integer(label):
        raise SvpError(f"{shown(path)}: column label is {label}, expected whole numbers", LAYOUT, "data")


def _take(found: _File, batch: Any) -> None:
    image, label = batch.column("image"), batch.column("label")
    rows = len(found.names)
    stems = image.field("path").to_pylist() if image.type.get_field_index("path") >= 0 else [None] * len(image)
    contents = [content or b"" for content in image.field("bytes").to_pylist()]  # no bytes: told when it is looked at
    ends = np.cumsum([len(content) for content in contents], dtype=np.int64)
    starts = ends - [len(content) for content in contents]
    found.places.append(np.stack([np.full_like(ends, len(found.blobs)), starts, ends], axis=1))
    found.blobs.append(b"".join(contents))
    found.labels.append(np.asarray(label.fill_null(-1).to_numpy(zero_copy_only=False), dtype=np.int64))
    found.names += [
        f"{shown(found.path)} row {rows + i}" + (f" ({shown(s)})" if s else "") for i, s in enumerate(stems)
    ]


def _joined(files: list[_File], max_pixels: int) -> Encoded:
    blobs: list[bytes] = []
    places = [np.zeros((0, 3), dtype=np.int64)]
    for file in files:
        places += [place + np.array([len(blobs), 0, 0]) for place in file.places]
        blobs += file.blobs
    labels = np.concatenate([np.zeros(0, dtype=np.int64), *(labels for file in files for labels in file.labels)])
    names = [name for file in files for name in file.names]
    return Encoded(blobs, np.concatenate(places), labels, names, max_pixels)


def _common_classes(files: list[_File]) -> tuple[str, ...]:
    """The class names of all files, or the numbers up to the highest label where no file names classes."""
    named = [file for file in files if file.classes]
    for file in named:
        if file.classes != named[0].classes:
            problem = f"{shown(file.path)} and {shown(named[0].path)} name different classes"
            raise SvpError(problem, "write all files with the same class names", "data")
    return named[0].classes if named else tuple(str(k) for k in range(_highest(files) + 1))


def _highest(files: list[_File]) -> int:
    """The highest label, which cannot be far above the number of pictures: classes are counted from 0."""
    limit = max(COUNTED, sum(len(file.names) for file in files))
    for file in files:
        labels = np.concatenate([np.zeros(0, dtype=np.int64), *file.labels])
        wrong = np.flatnonzero(labels >= limit)
        if len(wrong):
            problem = f"{file.names[wrong[0]]} has label {labels[wrong[0]]}, expected 0, 1, … without large gaps"
            raise SvpError(problem, "number the labels from 0, or write class names into the metadata", "data")
    return max((int(labels.max(initial=-1)) for file in files for labels in file.labels), default=-1)


def _class_names(metadata: dict[bytes, bytes]) -> tuple[str, ...]:
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
        return tuple(str(name) for name in names)
    except (KeyError, ValueError, TypeError):
        return ()
