"""What a run states about itself: before it, all that decides its numbers; after it, the numbers."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import Any

import torch

from svp.backbones.base import Backbone
from svp.data import kept
from svp.data.pictures import shown
from svp.data.splits import Splits
from svp.errors import SvpError
from svp.methods.base import Method, parts_of
from svp.model import AdaptedModel
from svp.training import machine
from svp.training.checkpoint import Progress
from svp.training.config import plain
from svp.training.evaluate import Evaluation
from svp.training.recipe import Recipe


def default_lr(method: Method) -> float:
    """The learning rate of our own recipe for this method; of several that act together the smallest."""
    return min(type(part).default_lr for part in parts_of(method))


def check(data: Splits, recipe: Recipe) -> None:
    """Raise SvpError for what cannot be trained, before anything is written."""
    if data.protocol.select == "test_best" and data.test is None:
        raise SvpError(
            f"protocol {data.protocol.name} selects the epoch on test, {data.source} has no test split",
            "--protocol default", "usage",
        )  # fmt: skip
    count = len(data.train)
    if recipe.drop_last and count < recipe.step_size:
        raise SvpError(
            f"{data.source} has {count} training pictures, a step takes {recipe.step_size} and drop_last leaves none",
            f"--batch-size {max(count // recipe.accumulate // 2 * 2, 1)}, or -r drop_last=false", "usage",
        )  # fmt: skip
    if recipe.mixes and count < 2:
        raise SvpError("mixup and cutmix pair pictures, there is one", "-r mixup=0 -r cutmix=0", "usage")


def notes_of(data: Splits) -> list[str]:
    """What was noticed about the data, and what a run makes of it; of splits made in Python too."""
    told = ["there is no test split: validation is what is reported"] if data.test is None else []
    return [*data.notes, *told]


def check_memory(net: Backbone, count: int, recipe: Recipe) -> None:
    """Raise SvpError when one layer's values of a batch alone, at two bytes each, do not fit into the machine's memory."""
    site = net.site()
    tokens, wide = site.grid[0] * site.grid[1], max((2 * block.e or block.width) for block in site.blocks)
    n = min(recipe.batch_size, count)
    need, have = 2 * n * tokens * wide, kept.memory_bytes()
    if need > have:
        size = " x ".join(map(str, net.img_size))
        raise SvpError(
            f"img_size {size} with batches of {n} needs more than {need / 2**30:,.1f} GiB for one layer, "
            f"this machine has {have / 2**30:,.1f} GiB",
            f"a smaller --img-size, or --batch-size {max(n * have // need // 8, 1)}", "usage",
        )  # fmt: skip


def settings_of(model: AdaptedModel, data: Splits, recipe: Recipe, seed: int, amp: str) -> dict[str, Any]:
    """All that decides the numbers of a run, every default resolved."""
    net = model.backbone
    return {
        "svp_version": machine.versions()["svp"],
        "source": data.source,
        "protocol": dataclasses.asdict(data.protocol),
        "backbone": {
            "name": net.name, "weights": net.weights_from, "img_size": list(net.img_size),
            "overrides": dict(net.overrides), "kernel": net.kernel, "fingerprint": net.fingerprint(),
            **({"pos_resize": net.pos_resize} if net.pos_resize != "middle" else {}),
            **({"seed": net.seed} if net.seed else {}),
        },
        "methods": [
            {"name": name, "options": dataclasses.asdict(part.given)}
            for (name, _), part in zip(model.specs, parts_of(model.method), strict=True)
        ],
        "head": model.head_name,
        "recipe": dataclasses.asdict(recipe),
        "lr_used": recipe.base_lr,
        "seed": seed,
        "amp": amp,
        "data": {"hash": data.hash(), "sizes": data.sizes},
        **({"reading": dict(data.reading)} if data.reading else {}),
    }  # fmt: skip


def result_of(
    model: AdaptedModel, data: Splits, facts: dict[str, Any], p: Progress, epochs: int, test: Evaluation | None,
    device: torch.device, cached: bool,
) -> dict[str, Any]:  # fmt: skip
    """The content of result.json; what may differ between two equal runs lies under `timing`."""
    total, method = model.num_trainable(head=True), model.num_trainable()
    found = {
        "method": model.method_name,
        "label": "+".join(model.labels),
        "options": {name: opt for name, opt in model.specs},
        "head": model.head_name,
        "backbone": model.backbone.name,
        "weights": model.backbone.weights_from,
        "fingerprint": facts["backbone"]["fingerprint"],
        "img_size": list(model.backbone.img_size),
        "source": data.source,
        "protocol": data.protocol.name,
        "selection": data.protocol.select,
        "recipe": facts["recipe"],
        "lr_used": facts["lr_used"],
        "amp": facts["amp"],
        "seed": facts["seed"],
        "classes": model.num_classes,
        "epochs": epochs,
        "selected_epoch": p.best_epoch,
        "val_accuracy": p.best_val,
        "test_accuracy": test.accuracy if test else None,
        "test_mean_class_accuracy": test.mean_class_accuracy if test else None,
        "test_top5": test.top5 if test else None,
        "test_ece": test.ece if test else None,
        "last_val_accuracy": p.last_val,
        "trainable": {"total": total, "method": method, "head": total - method},
        "backbone_parameters": sum(
            t.numel() for name, t in model.backbone.named_parameters() if not name.startswith("head.")
        ),
        "data": {
            "hash": facts["data"]["hash"], "sizes": data.sizes, "skipped": list(data.skipped),
            "notes": notes_of(data),
        },
        "features_cached": cached,
        "versions": machine.versions(),
        "git": machine.git_revision(),
        "kernel": machine.kernel_name(model.backbone, device),
        "timing": {
            "seconds": p.seconds, "train_seconds": p.train_seconds,
            "images_per_second": p.images / p.train_seconds if p.train_seconds else None,
            "peak_memory_bytes": machine.peak_memory_bytes(device),
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "threads": torch.get_num_threads(),
            **facts["machine"],
        },
    }  # fmt: skip
    return plain(found)


def card_of(result: dict[str, Any]) -> str:
    """The lines of the model card that only a run knows."""
    rows = [("trained on", shown(result["source"])), ("protocol", result["protocol"]), ("seed", result["seed"])]
    for name in ("val_accuracy", "test_accuracy"):
        if result[name] is not None:
            chosen = ", of the epoch that is best on test" if result["selection"] == "test_best" else ""
            rows.append((name.replace("_", " "), f"{100 * result[name]:.1f} %{chosen}"))
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)
