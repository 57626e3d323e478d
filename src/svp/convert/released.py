"""Adapters trained with other people's code into adapters of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from svp.backbones.base import Backbone
from svp.backbones.checkpoints import Checkpoint, Report, read_checkpoint, save_backbone
from svp.backbones.create import create_backbone
from svp.backbones.vim import recognise
from svp.errors import SvpError
from svp.methods.svp import from_published
from svp.model import AdaptedModel, adapt
from svp.registry import BACKBONES


def is_published_adapter(found: Checkpoint) -> bool:
    """Whether a file was written by the released SVP code."""
    return "prompt_scale" in found.tensors


def load_published(
    path: str | Path, backbone: Backbone | None = None, *, trust_pickle: bool = False, ema: bool = False
) -> tuple[AdaptedModel, Report]:
    """An adapter trained with the authors' code (checkpoint.pth, best_checkpoint.pth) as an AdaptedModel.

    backbone  the base network; None: made from the file itself, which holds all of it
    ema       take the averaged weights of the file
    Raises SvpError when the file is no such adapter, or its frozen tensors are not the backbone's.
    Source: repository zhoujiahuan1991/AAAI2025-SVP, svp/model/models_mamba.py.
    """
    found = read_checkpoint(path, trust_pickle=trust_pickle, ema=ema)
    if not is_published_adapter(found):
        raise SvpError(
            f"{path} holds no prompts of the released SVP code (prompt_scale)",
            "svp convert reads backbones too",
            "artefact",
        )
    report = Report(notes=list(found.notes))
    sizes = recognise(found.tensors)
    if sizes is None:
        raise SvpError(
            f"{path} holds prompts but no Vision Mamba", "the released code saves both in one file", "artefact"
        )
    depth = sizes["depth"]
    frozen = {k: t for k, t in found.tensors.items() if not k.startswith(("prompt_", "head."))}
    backbone = backbone or _own_backbone(sizes, frozen)
    if ema:  # an average of equal numbers is rounded
        frozen = {k: t for k, t in read_checkpoint(path, trust_pickle=trust_pickle).tensors.items() if k in frozen}
    _compare(path, backbone, frozen, report)

    options = _options(found, depth, report)
    two = "head.0.weight" in found.tensors
    last = found.tensors.get("head.1.weight" if two else "head.weight")
    if last is None:
        raise SvpError(f"{path} holds prompts but no head", "the released code saves both in one file", "artefact")
    model = adapt(
        backbone, "svp", num_classes=last.shape[0], head="two_linear" if two else "linear", probe=False, **options
    )
    adapter = {f"method.{k}": t for k, t in from_published(found.tensors, depth).items()}
    adapter |= {k: t for k, t in found.tensors.items() if k.startswith("head.")}
    model.load_state_dict(adapter)
    report.loaded = sorted(k for k in found.tensors if k not in frozen)
    return model, report


def convert_adapter(
    source: str | Path, folder: str | Path, *, backbone: Backbone | None = None, trust_pickle: bool = False,
    ema: bool = False,
) -> Report:  # fmt: skip
    """Write an adapter trained with the authors' code as a folder that `svp.load` reads; every key is reported.

    Without `backbone` the frozen network of the file is written beside the adapter as backbone.safetensors.
    """
    model, report = load_published(source, backbone, trust_pickle=trust_pickle, ema=ema)
    folder = Path(folder)
    if backbone is None:
        model.backbone.weights_from = str(folder / "backbone.safetensors")
        model.save_pretrained(folder)
        save_backbone(model.backbone, folder / "backbone.safetensors")
        report.notes.append(f"the frozen network was written to {model.backbone.weights_from}")
    else:
        model.save_pretrained(folder)
    return report


def _own_backbone(sizes: dict[str, Any], frozen: dict[str, torch.Tensor]) -> Backbone:
    module = BACKBONES.get("vim_small").load()
    keywords = {k: v for k, v in sizes.items() if k not in ("tokens", "num_classes", "stride")}
    fit = [
        name
        for name, row in module.VARIANTS.items()
        if row == {"embed_dim": sizes["embed_dim"]} and sizes["depth"] == 24
    ]
    patch, rows = sizes["patch_size"], frozen["pos_embed"].shape[1] - 1
    side = round(rows**0.5) * patch
    net = create_backbone(fit[0] if fit else "vim_tiny", img_size=side, **({} if fit else keywords), num_classes=0)
    net.load_state_dict(frozen)
    return net


def _compare(path: str | Path, backbone: Backbone, frozen: dict[str, torch.Tensor], report: Report) -> None:
    own = {k: t for k, t in backbone.state_dict().items() if not k.startswith("head.")}
    for name in own.keys() ^ frozen.keys():
        raise SvpError(
            f"{path} and {backbone.name} do not both have {name}",
            "give the backbone the adapter was trained on",
            "artefact",
        )
    differ = [
        k for k, t in frozen.items() if t.shape != own[k].shape or not torch.equal(t.to(own[k].dtype), own[k].cpu())
    ]
    if differ:
        raise SvpError(
            f"{path} was trained on another {backbone.name}: {len(differ)} of {len(own)} frozen tensors differ, first {differ[0]}",
            "give the weights it was trained on with --weights", "artefact",
        )  # fmt: skip
    report.notes.append(f"all {len(own)} frozen tensors equal those of {backbone.name}")


def _options(found: Checkpoint, depth: int, report: Report) -> dict[str, Any]:
    groups = found.tensors["prompt_shared_scale"].shape[0]
    shared = int(found.args.get("shared_layers") or depth // groups)
    if not found.args:
        report.notes.append(
            "the file names no settings (args): input_filter is taken as none; check it if SimAM was used"
        )
    return dict(
        preset="published",
        hidden=found.tensors["prompt_generator.0.0.weight"].shape[0],
        shared_layers=shared,
        input_filter="simam" if found.args.get("input_relu") else "none",
    )
