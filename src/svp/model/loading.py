"""`load`: a saved adapter on the backbone that it was trained on, or a sentence why not."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svp.backbones.base import Backbone
from svp.backbones.create import create_backbone
from svp.errors import SvpError
from svp.extras import own_version
from svp.model.adapted import FORMAT, AdaptedModel, Prediction
from svp.model.adapting import adapt
from svp.model.folder import CONFIG, TENSORS, read_json
from svp.preprocessing import Preprocessing
from svp.registry import overrides_of

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}


def load(
    folder: str | os.PathLike,
    backbone: Backbone | None = None,
    *,
    weights: str | None = None,
    device: str | None = None,
    kernel: str = "auto",
) -> AdaptedModel:
    """The adapter in `folder` (or the run folder that holds one), on `backbone` or on the one that it names.

    weights, kernel  of the backbone that it names; None: the weights it was trained on
    device           None: where `backbone` is, else the CPU. A given backbone moves along, and with it its other adapters.
    Raises SvpError when files are missing or damaged, sizes disagree, or the backbone is not the one it was trained on.
    """
    folder = _adapter_folder(Path(folder))
    saved = Saved.read(folder)
    if saved.head == "module":
        raise SvpError(
            f"{folder} was saved with a head module of its own",
            "build it with svp.adapt and load_state_dict",
            "artefact",
        )
    if backbone is None:
        backbone = _named_backbone(folder, saved, weights, kernel)
    _same_backbone(folder, saved, backbone)
    head = "linear" if saved.head == "method" else saved.head
    try:
        model = adapt(
            backbone, saved.methods, num_classes=saved.num_classes, head=head, classes=saved.classes, probe=False
        )
    except SvpError as err:
        hint = "the file was changed by hand, or is of a svp that took these options otherwise; copy it again, or train again"
        raise SvpError(f"{folder / CONFIG}: {err.problem}", hint, "artefact") from err
    if (saved.preprocessing.mean, saved.preprocessing.std) != (model.preprocessing.mean, model.preprocessing.std):
        raise SvpError(
            f"{folder} was saved by an earlier svp, whose {model.method_name} took pictures prepared otherwise",
            "train it again", "artefact",
        )  # fmt: skip
    model.preprocessing, model.task = saved.preprocessing, saved.task
    for part in model.modules():
        if hasattr(part, "filled"):  # what it would read when first needed is in the adapter
            part.filled = True  # type: ignore[assignment]
    _fill(model, folder / TENSORS)
    return (model if device is None else model.to(device)).eval()


@dataclass(frozen=True)
class Saved:
    """What adapter_config.json says: of the backbone, of the methods, of head, classes and pictures."""

    backbone: str
    weights: str
    fingerprint: str
    img_size: tuple[int, int]
    overrides: dict[str, Any]
    pos_resize: str
    seed: int
    dtype: torch.dtype
    methods: list[tuple[str, dict[str, Any]]]
    head: str
    num_classes: int
    classes: list[str] | None
    preprocessing: Preprocessing
    task: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Saved:
        """Raises SvpError for a file of another program, of a newer svp, and one that lacks a field."""
        config = read_json(folder / CONFIG)
        if "format" not in config:
            raise SvpError(
                f"{folder} was not written by svp: its {CONFIG} has no 'format'",
                f"svp convert {folder} OUT-FOLDER --backbone NAME --weights FILE, for a LoRA of another program", "artefact",
            )  # fmt: skip
        try:
            if config["format"] > FORMAT:
                problem = f"{folder} was written by svp {config['svp_version']}, this is {own_version()}"
                raise SvpError(problem, "pip install -U svp-vision", "artefact")
            named = config["backbone"]
            (height, width), classes = named["img_size"], config["classes"]
            return cls(
                str(named["name"]), str(named["weights"]), str(named["fingerprint"]), (int(height), int(width)),
                overrides_of(named["overrides"]), str(named.get("pos_resize", "middle")), int(named.get("seed", 0)),
                DTYPES[named.get("dtype", "float32")],
                [(str(m["name"]), dict(m["options"])) for m in config["methods"]], str(config["head"]),
                config["num_classes"], None if classes is None else list(classes),
                Preprocessing.from_dict(config["preprocessing"]), dict(config["task"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as err:
            problem = f"{folder / CONFIG}: the field {err} is missing or wrong"
            raise SvpError(problem, "save the adapter again", "artefact") from err


def _named_backbone(folder: Path, saved: Saved, weights: str | None, kernel: str) -> Backbone:
    """The backbone that an adapter was trained on; random weights are drawn again, which its fingerprint proves."""
    source = weights or saved.weights
    if source == "merged":
        raise SvpError(
            f"{folder} was trained on a backbone with merged weights, which no file holds", "give backbone=", "artefact"
        )
    net = create_backbone(
        saved.backbone, weights=None if source in ("random", "none") else weights or weights_beside(folder, source),
        img_size=saved.img_size, kernel=kernel, pos_resize=saved.pos_resize, seed=saved.seed, **saved.overrides,
    )  # fmt: skip
    return net if saved.dtype == torch.float32 else net.to(saved.dtype)


def _same_backbone(folder: Path, saved: Saved, net: Backbone) -> None:
    """Raises SvpError where a backbone is not the one that an adapter was trained on."""
    found, wanted = net.fingerprint(), saved.fingerprint
    if found != wanted:
        is_lost, dtype = saved.weights in ("random", "merged"), next(net.parameters()).dtype
        hint = f"give the {'backbone' if is_lost else 'weights'} it was trained on with {'backbone' if is_lost else 'weights'}="
        if dtype not in (torch.float32, torch.float64, saved.dtype):
            hint += f"; {str(dtype).removeprefix('torch.')} rounds them: load first, then change the type"
        raise SvpError(
            f"{folder} was trained on {saved.backbone} {wanted[:12]} ({saved.weights}), "
            f"this backbone is {net.name} {found[:12]} ({net.weights_from})", hint, "artefact",
        )  # fmt: skip
    if saved.img_size != net.img_size:
        (h, w), size = saved.img_size, net.img_size
        raise SvpError(
            f"{folder} was trained on pictures of {h} x {w} pixels, this backbone takes {size[0]} x {size[1]}",
            f'create_backbone("{net.name}", img_size=({h}, {w}))', "artefact",
        )  # fmt: skip
    if net.stored_positions is not None and net.pos_resize != saved.pos_resize:
        raise SvpError(
            f'{folder} was trained with positions resized by "{saved.pos_resize}", those of this backbone are by "{net.pos_resize}"',
            f'create_backbone(…, pos_resize="{saved.pos_resize}")', "artefact",
        )  # fmt: skip


def weights_beside(folder: Path, known: str) -> str:
    """The weights that an adapter names, or where they have moved, the file of that name in its folder."""
    if known in ("random", "merged", "none", "default") or known.startswith("hf:") or Path(known).exists():
        return known
    beside = folder / Path(known).name
    if beside.exists():
        return str(beside)
    raise SvpError(
        f"{folder} was trained on the weights {known}, which are not there",
        "give the file: weights=FILE, on the command line --weights FILE", "artefact",
    )  # fmt: skip


def predict(
    model: AdaptedModel | str | os.PathLike, paths: Any, *, batch_size: int = 32, top: int = 5
) -> list[Prediction]:
    """Label pictures (files or folders) with a model, or with the adapter in a folder.

    Raises SvpError with the name of a picture that is missing or damaged, and what `load` raises.
    """
    found = model if isinstance(model, AdaptedModel) else load(model)
    return found.predict(paths, batch_size=batch_size, top=top)


def _fill(model: AdaptedModel, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as err:
        raise SvpError(
            f"{path} cannot be read: {err}", "the file is damaged; save or copy the adapter again", "artefact"
        ) from err
    own = model.state_dict()
    for name in own.keys() ^ tensors.keys():
        where = "lacks" if name in own else "has a tensor that the adapter does not know:"
        raise SvpError(
            f"{path} {where} {name}", "adapter_config.json and the tensors do not belong together", "artefact"
        )
    for name, value in tensors.items():
        if own[name].shape != value.shape:
            raise SvpError(
                f"{path}: {name} is {tuple(value.shape)}, adapter_config.json makes it {tuple(own[name].shape)}",
                "the two files do not belong together; copy the adapter again", "artefact",
            )  # fmt: skip
        if not torch.isfinite(value).all():
            raise SvpError(
                f"{path}: {name} holds numbers that are not finite", "the training diverged; train again", "artefact"
            )
    model.load_state_dict(tensors)


def _adapter_folder(folder: Path) -> Path:
    for candidate in (folder, folder / "model"):
        if (candidate / CONFIG).is_file():
            if not (candidate / TENSORS).is_file():
                raise SvpError(
                    f"{candidate} has no adapter_model.safetensors",
                    "the adapter is incomplete; copy it again",
                    "artefact",
                )
            return candidate
    what = "does not exist" if not folder.exists() else "holds no adapter (adapter_config.json)"
    raise SvpError(f"{folder} {what}", "give a run folder of `svp train`, or what save_pretrained wrote", "artefact")
