"""Is what a row computes right? On a small picture, against the reference in float64: a wrong answer has no speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from svp.errors import SvpError
from svp.studies.bench.peers import PEERS, ours, vpt
from svp.studies.bench.setting import Setting, Step

DEPTH, GRID, BATCH = 2, 6, 2  # of the small network and its pictures
ENOUGH = {"off": 1e-4, "bf16": 0.15, "fp16": 0.05}  # largest error of a tensor, relative to its largest entry
VITS = ("vit", "vpt")


def check(setting: Setting, rows: Sequence[str]) -> list[dict[str, Any]]:
    """Logits and the gradient of everything that trains, of every row: [{"row", "error", "of"}].

    Raises SvpError for a row whose largest error is more than rounding.
    """
    net: Any = setting.shape()
    side = net.patch_size + (GRID - 1) * net.stride
    overrides = {**setting.overrides, "depth": min(DEPTH, net.depth)}
    small = setting.but(img_size=side, batch_size=BATCH, overrides=overrides)
    found = []
    truth: dict[str, dict[str, Tensor]] = {}
    first: dict[str, Step] = {}
    for row in rows:
        family = "vit" if row in VITS else "vim"
        step = prepared(PEERS[row].build(small))
        if family in first:
            take_over(step.model, first[family].model)
        else:
            first[family], truth[family] = step, true_values(small, family, step)
        found.append(compared(row, numbers(step), truth[family], ENOUGH[setting.amp]))
    return found


def true_values(small: Setting, family: str, step: Step) -> dict[str, Tensor]:
    """The same step in float64: of a Vim through the reference kernel, of a ViT through our own ViT and method vpt."""
    exact = (vpt if family == "vit" else ours)(small.but(kernel="reference", amp="off", device="cpu"))
    prepared(exact)
    if family == "vit":
        take_over(exact.model, step.model)
    exact.model.double()
    exact.images = exact.images.double()
    return numbers(exact)


def prepared(step: Step) -> Step:
    """Seeded noise on what trains, as prompts start at zero, which hides mistakes; no dropout, which two rows draw apart."""
    generator = torch.Generator().manual_seed(1)
    for part in step.model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    with torch.no_grad():
        for p in step.trained.values():
            p.add_(0.05 * torch.randn(p.shape, generator=generator).to(p))
    return step


def take_over(ours: Any, peer: Any) -> None:
    """Give our ViT the tensors of timm's; Vims of one seed, and two that are ours, are equal already."""
    if not hasattr(peer, "net"):
        return
    ours.backbone.load_state_dict(peer.net.state_dict(), strict=False)
    ours.method.prompts.data.copy_(peer.prompts.data)
    ours.head.load_state_dict(peer.head.state_dict())


def numbers(step: Step) -> dict[str, Tensor]:
    """{"logits", "gradient of NAME"}, names without the part that says who holds the tensor."""
    found = {"logits": step.train()}
    for name, p in step.trained.items():
        found[f"the gradient of {name.removeprefix('method.')}"] = (
            p.grad.detach().clone() if p.grad is not None else torch.full_like(p, float("nan"))
        )
    return found


def compared(row: str, got: dict[str, Tensor], want: dict[str, Tensor], enough: float) -> dict[str, Any]:
    errors = {}
    for name, t in want.items():
        error = float((got[name].cpu().double() - t).abs().max() / t.abs().max())
        errors[name] = error if error == error else float("inf")
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= enough:
        raise SvpError(
            f"{row} is wrong: {worst} is off by {errors[worst]:.1e} of its largest entry, {enough:g} is rounding",
            "svp doctor checks the kernels; --only leaves rows out; --kernel reference is right",
        )
    return {"row": row, "error": errors[worst], "of": worst}
