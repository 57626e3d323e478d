"""Checkpoints: .pth, .pt, .bin and .safetensors to a dictionary of tensors and into a backbone; every key is reported."""

from __future__ import annotations

import argparse
import json
import pathlib
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svp.backbones.base import Backbone, tensor_digest
from svp.backbones.positions import resize_positions
from svp.errors import SvpError

PATHS = (pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath, pathlib.PureWindowsPath)
SAFE = [
    argparse.Namespace,
    *((kind, f"{room}.{kind.__name__}") for kind in PATHS for room in ("pathlib", "pathlib._local")),
]
CONTAINERS = ("model", "state_dict", "model_state_dict", "module")  # where training programs keep the weights
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")
UNUSED = ("rope.",)  # tables of the first Vim release that no published model reads
WHERE_FROM = "published Vim weights: https://huggingface.co/hustvl"


@dataclass
class Checkpoint:
    """Tensors by name, and how they were found in the file."""

    path: str
    tensors: dict[str, Tensor]
    args: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What became of every key of a file."""

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        parts = [("loaded", self.loaded), ("resized", self.resized), ("left out", self.left_out)]
        return [*self.notes, *(f"{what}: {len(keys)} ({shortened(keys)})" for what, keys in parts if keys)]


# -- reading -----------------------------------------------------------------------------------------------------------


def read_checkpoint(path: str | Path, *, trust_pickle: bool = False, ema: bool = False) -> Checkpoint:
    """The tensors of a file, whatever program wrote it; only tensors and plain values are ever unpickled.

    ema  take the averaged weights (`model_ema`) of a training checkpoint instead of `model`
    Raises SvpError for a file that is none, saying what it is, and for tensors that are not finite.
    """
    path = Path(path)
    _refuse_foreign(path)
    if ema and _is_safetensors(path):
        raise SvpError(
            f"{path} has one set of weights and no averaged ones beside it", "load it without ema", "artefact"
        )
    found = _read_safetensors(path) if _is_safetensors(path) else _read_pickle(path, trust_pickle, ema)
    found.tensors = _without_prefix(found)
    for name, t in found.tensors.items():
        if t.is_floating_point() and not torch.isfinite(t).all():
            raise SvpError(
                f"{path}: {name} holds numbers that are not finite",
                "the file is damaged, or its training diverged",
                "artefact",
            )
    return found


def _refuse_foreign(path: Path) -> None:
    if not path.exists():
        raise SvpError(f"the checkpoint {path} does not exist", WHERE_FROM, "artefact")
    if path.is_dir():
        raise SvpError(
            f"{path} is a folder, expected a .pth or .safetensors file",
            f"for example {path}/model.safetensors",
            "artefact",
        )
    try:
        with path.open("rb") as f:
            head = f.read(512)
    except OSError as err:
        raise SvpError(f"{path} cannot be read: {err.strerror}", "check its permissions", "artefact") from err
    if not head:
        raise SvpError(f"{path} is empty", "download it again", "artefact")
    if head.startswith(b"version https://git-lfs"):
        raise SvpError(
            f"{path} is a Git LFS pointer, not the file itself", "git lfs pull, or download the file", "artefact"
        )
    if head.lstrip()[:1] == b"<":
        raise SvpError(
            f"{path} is a web page, not a checkpoint", "download the file itself, not the page about it", "artefact"
        )
    if head.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise SvpError(f"{path} is truncated", "download it again", "artefact")


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as f:
        start = f.read(9)
    return path.suffix == ".safetensors" or (len(start) == 9 and start[8:9] == b"{")


def _read_safetensors(path: Path) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as f:
            return Checkpoint(str(path), {name: f.get_tensor(name) for name in f.keys()}, metadata=f.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as err:
        raise SvpError(
            f"{path} is no safetensors file: {err}", "the file is truncated or of another kind", "artefact"
        ) from err


def _read_pickle(path: Path, trust_pickle: bool, ema: bool) -> Checkpoint:
    import pickle

    try:
        with torch.serialization.safe_globals(SAFE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what cannot be read raises
            content = torch.load(path, map_location="cpu", weights_only=not trust_pickle)
    except pickle.UnpicklingError as err:
        names = _unsafe_globals(path)
        if names:
            hint = f"only if you trust where it comes from: svp convert {path} OUT --trust-pickle"
            raise SvpError(f"{path} holds code, not only tensors: {shortened(names)}", hint, "artefact") from err
        raise SvpError(f"{path} is no PyTorch checkpoint", "expected what torch.save wrote", "artefact") from err
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, ImportError) as err:
        first = str(err).split("\n")[0]
        raise SvpError(f"{path} is no PyTorch checkpoint: {first}", "download it again", "artefact") from err
    return _unwrapped(path, content, ema)


def _unsafe_globals(path: Path) -> list[str]:
    try:
        with torch.serialization.safe_globals(SAFE):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not a zip of torch.save: there is nothing to list
        return []


def _unwrapped(path: Path, content: Any, ema: bool) -> Checkpoint:
    """The dictionary of tensors inside a training checkpoint."""
    if not isinstance(content, dict):
        raise SvpError(
            f"{path} holds {type(content).__name__}, expected a dictionary of tensors", WHERE_FROM, "artefact"
        )
    args = content.get("args")
    found = Checkpoint(str(path), {}, args=dict(vars(args)) if isinstance(args, argparse.Namespace) else {})
    order = ("model_ema", "state_dict_ema") if ema else CONTAINERS
    key = next((k for k in order if isinstance(content.get(k), dict)), None)
    if ema and key is None:
        raise SvpError(f"{path} has no averaged weights (model_ema)", "load it without ema", "artefact")
    inner = content if key is None else content[key]
    tensors = {str(name): t for name, t in inner.items() if isinstance(t, Tensor)}
    if not tensors:
        raise SvpError(f"{path} holds no tensors; its keys: {shortened(map(str, content))}", WHERE_FROM, "artefact")
    if key is not None:
        others = sorted(str(k) for k in content if k != key)
        found.notes.append(
            f"taken: '{key}' of the file" + (f"; left in the file: {shortened(others)}" if others else "")
        )
    found.tensors = tensors
    return found


def _without_prefix(found: Checkpoint) -> dict[str, Tensor]:
    tensors = found.tensors
    while True:
        prefix = next((p for p in PREFIXES if tensors and all(k.startswith(p) for k in tensors)), None)
        prefix = prefix or next((p for p in PREFIXES if any(k.startswith(f"{p}layers.") for k in tensors)), None)
        if prefix is None:
            return tensors
        found.notes.append(f"prefix '{prefix}' removed from the names")
        tensors = {k.removeprefix(prefix): t for k, t in tensors.items()}


# -- filling a backbone -------------------------------------------------------------------------------------------------


def load_into(net: Backbone, found: Checkpoint, pos_resize: str = "middle") -> Report:
    """Fill a backbone from a file's tensors, strictly: a missing or strange key is an error, never skipped.

    pos_resize  "middle" or "repo": see `resize_positions`
    """
    report = Report(notes=list(found.notes))
    if any(name.startswith(UNUSED) for name in found.tensors) and getattr(net, "cls_kind", "") == "middle":
        raise SvpError(
            f"{found.path} is of the first Vim release (it holds rope tables), whose class token stands first; in {net.name} it "
            "stands in the middle", 'create_backbone(…, cls_token="head")', "artefact",
        )  # fmt: skip
    own = dict(net.named_parameters())
    taken: dict[str, Tensor] = {}
    for name in net.site_slots() & found.tensors.keys():  # a bias that a merged method has filled
        owner, _, leaf = name.rpartition(".")
        own[name] = torch.nn.Parameter(torch.empty_like(found.tensors[name], dtype=torch.float32))
        setattr(net.get_submodule(owner), leaf, own[name])
    for name, t in found.tensors.items():
        if name.startswith(UNUSED):
            report.left_out.append(f"{name}: unused table of the first release")
        elif name in own:
            taken[name] = t
        elif name.startswith("head."):
            report.left_out.append(f"{name}: a head of another form")
        elif name.startswith("prompt_"):
            raise SvpError(
                f"{found.path} is an adapter trained with the authors' code, not a backbone",
                f"svp convert {found.path} OUT-FOLDER makes it an adapter of this package", "artefact",
            )  # fmt: skip
        else:
            raise SvpError(
                f"{found.path} has a tensor that {net.name} does not know: {name}", "svp list backbones", "artefact"
            )
    net.stored_positions = None
    positions = taken.get("pos_embed")
    if (
        positions is not None
        and positions.shape != own["pos_embed"].shape
        and positions.shape[2] == own["pos_embed"].shape[2]
    ):
        net.stored_positions = tensor_digest(positions)
        taken["pos_embed"] = resize_positions(positions.float(), net.grid, net.position_rows, mode=pos_resize)  # type: ignore[attr-defined]
        report.resized.append(f"pos_embed {positions.shape[1]} -> {own['pos_embed'].shape[1]} rows")
    for name, p in own.items():
        if name not in taken:
            if name.startswith("head."):
                report.notes.append(f"{name}: not in the file, random")
                continue
            raise SvpError(f"{found.path} lacks {name}", f"the file does not fit {net.name}", "artefact")
        if taken[name].shape != p.shape:
            if name.startswith("head."):
                report.left_out.append(f"{name}: {tuple(taken[name].shape)}, this head is {tuple(p.shape)} and random")
                continue
            raise SvpError(
                f"{found.path}: {name} is {tuple(taken[name].shape)}, {net.name} needs {tuple(p.shape)}",
                f"the file does not fit; `svp list backbones {net.name}` shows the sizes", "artefact",
            )  # fmt: skip
        if not taken[name].is_floating_point():
            dtype = str(taken[name].dtype).removeprefix("torch.")
            raise SvpError(
                f"{found.path}: {name} is {dtype}, expected floating point",
                "the file was quantised or damaged; give the original weights", "artefact",
            )  # fmt: skip
        with torch.no_grad():
            p.copy_(taken[name])
        report.loaded.append(name)
    return report


# -- writing ------------------------------------------------------------------------------------------------------------


def save_tensors(tensors: dict[str, Tensor], target: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Tensors to a safetensors file that appears whole or not at all."""
    from safetensors.torch import save  # save_file makes files that only their owner may read

    plain = {name: t.detach().to("cpu").contiguous().clone() for name, t in tensors.items()}
    atomically(Path(target), lambda path: path.write_bytes(save(plain, {"format": "pt", **(metadata or {})})))


def save_backbone(net: Backbone, target: str | Path, dtype: torch.dtype = torch.float32, **facts: Any) -> None:
    """A backbone's tensors as a file that `create_backbone(weights=…)` reads; `facts` go into its metadata as JSON."""
    tensors = {name: t.to(dtype) for name, t in net.state_dict().items()}
    save_tensors(tensors, target, {"backbone": net.name, "facts": json.dumps(facts)})


def atomically(target: Path, write: Any) -> None:
    """`write(path)` to a path beside `target`, which then takes its place."""
    work = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(work)
        work.replace(target)
    except OSError as err:
        raise SvpError(
            f"{target} cannot be written: {err.strerror or err}", "check the folder and the space on its disk", "env"
        ) from err
    finally:
        work.unlink(missing_ok=True)


def shortened(names: Iterable[str], limit: int = 6) -> str:
    """a, b, c … and 12 more"""
    names = list(names)
    more = f" … and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
