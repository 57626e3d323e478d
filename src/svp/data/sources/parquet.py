"""Hugging Face's image layout in Parquet: train-*.parquet, validation-*, test-*; columns image {bytes, path} and label."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from svp.data.protocols import Protocol
from svp.data.sources import existing
from svp.data.sources.checks import finished
from svp.data.splits import Encoded, Splits
from svp.errors import SvpError

NAMES = {"train": ("train",), "val": ("validation", "valid", "val"), "test": ("test",)}
UNFLIPPED = ("gtsrb", "svhn", "dsprites", "clevr", "mnist", "digits")  # mirrored, these pictures mean something else


def open_source(rest: str, source: str, protocol: Protocol, skip: bool, max_pixels: int) -> Splits:
    """A folder of Parquet files -> splits; class names from the files' metadata, else the numbers."""
    folder = existing(rest)
    files = {split: _files(folder, names) for split, names in NAMES.items()}
    if not files["train"]:
        seen = ", ".join(sorted(p.name for p in folder.glob("*.parquet"))[:3]) or "no Parquet files"
        raise SvpError(
            f"{folder} has no train-*.parquet ({seen})", "name the files train-*.parquet, validation-*, test-*", "data"
        )
    parts: dict[str, Any] = {}
    classes: tuple[str, ...] = ()
    for split, paths in files.items():
        if paths:
            parts[split], named = _read(paths, max_pixels)
            classes = classes or named
    highest = max(int(part.labels.max(initial=-1)) for part in parts.values())
    classes = classes or tuple(str(k) for k in range(highest + 1))
    for split, part in parts.items():
        wrong = np.flatnonzero((part.labels < 0) | (part.labels >= len(classes)))
        if len(wrong):
            i = int(wrong[0])
            raise SvpError(
                f"{part.name(i)} has label {part.labels[i]}, expected 0…{len(classes) - 1}",
                f"check the {split} files",
                "data",
            )
    flips = not any(word in folder.name.lower() for word in UNFLIPPED)
    opened = Splits(
        source, parts["train"], parts.get("val"), parts.get("test"), classes, may_flip=flips, protocol=protocol
    )
    return finished(opened, skip)


def _files(folder: Path, names: tuple[str, ...]) -> list[Path]:
    found = {p for name in names for pattern in (f"{name}-*.parquet", f"{name}.parquet") for p in folder.glob(pattern)}
    return sorted(found)


def _read(paths: list[Path], max_pixels: int) -> tuple[Encoded, tuple[str, ...]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    contents: list[bytes] = []
    labels: list[int] = []
    names: list[str] = []
    classes: tuple[str, ...] = ()
    for path in paths:
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as err:
            raise SvpError(f"{path} is no Parquet file: {str(err).splitlines()[0]}", "copy it again", "data") from err
        for column in ("image", "label"):
            if column not in table.column_names:
                raise SvpError(f"{path} has no column '{column}'; its columns: {', '.join(table.column_names)}",
                               "columns image {bytes, path} and label are read", "data")  # fmt: skip
        if not pa.types.is_struct(table.schema.field("image").type) or not pa.types.is_integer(
            table.schema.field("label").type
        ):
            raise SvpError(f"{path}: image is {table.schema.field('image').type}, label {table.schema.field('label').type}; "
                           "expected a struct {bytes, path} and integers", "write it as Hugging Face's datasets do", "data")  # fmt: skip
        images = table.column("image").combine_chunks()
        images = images if isinstance(images, pa.StructArray) else images.chunk(0)
        stems = images.field("path").to_pylist() if images.type.get_field_index("path") >= 0 else [None] * len(images)
        contents += [content or b"" for content in images.field("bytes").to_pylist()]
        labels += [-1 if y is None else y for y in table.column("label").to_pylist()]
        names += [f"{path}:{stem or row}" for row, stem in enumerate(stems)]
        classes = classes or _class_names(table.schema.metadata or {})
    return Encoded(contents, labels, names, max_pixels), classes


def _class_names(metadata: dict[bytes, bytes]) -> tuple[str, ...]:
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
        return tuple(str(name) for name in names)
    except (KeyError, ValueError, TypeError):
        return ()
