"""Weights of a backbone from one kind of file to another."""

from __future__ import annotations

from pathlib import Path

import torch

from svp.backbones.checkpoints import Report, atomically, read_checkpoint, save_tensors
from svp.backbones.create import looks_like
from svp.errors import SvpError


def convert_checkpoint(
    source: str | Path, target: str | Path, *, trust_pickle: bool = False, ema: bool = False
) -> Report:
    """Write the weights of `source` to `target`, .safetensors or .pth by its name; every key is reported."""
    source, target = Path(source), Path(target)
    found = read_checkpoint(source, trust_pickle=trust_pickle, ema=ema)
    report = Report(loaded=list(found.tensors), notes=[*found.notes, f"{source.name}: {looks_like(found.tensors)}"])
    if target.suffix == ".safetensors":
        save_tensors(found.tensors, target, found.metadata)
    elif target.suffix in (".pth", ".pt", ".bin"):
        atomically(target, lambda path: torch.save({"model": found.tensors}, path))
    else:
        raise SvpError(
            f"{target} ends in '{target.suffix}', expected .safetensors or .pth", f"{target}.safetensors", "usage"
        )
    return report
