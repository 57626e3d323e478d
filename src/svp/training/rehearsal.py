"""One step of a run on trial: what would be trained, how fast, with how much memory; nothing is kept."""

from __future__ import annotations

import copy
import os
import time
from typing import Any

import torch

from svp.data.sources import open_data
from svp.data.splits import Splits
from svp.model import AdaptedModel
from svp.options import changed
from svp.training import machine
from svp.training.evaluate import in_order_of
from svp.training.facts import check, check_memory, default_lr, settings_of
from svp.training.feed import as_made, chance, prepared, training_feed, training_order
from svp.training.losses import Criterion, Mixer
from svp.training.machine import Amp, autocast
from svp.training.recipe import Recipe, recipe_from, resolve


def rehearse(
    model: AdaptedModel,
    data: Splits | str | os.PathLike,
    *,
    recipe: Recipe | str | None = None,
    seed: int = 0,
    device: str = "auto",
    amp: Amp = "auto",
) -> dict[str, Any]:
    """Resolve everything as `fit` does and run the first batch forward and backward: the settings, and a few numbers.

    The model is left as it was. Raises what `fit` would raise at its door. `epochs` may be 0 here.
    """
    splits = in_order_of(model, open_data(data) if isinstance(data, (str, os.PathLike)) else data)
    chosen = changed(
        recipe if isinstance(recipe, Recipe) else recipe_from(recipe or "default").recipe, {}, "the recipe"
    )
    epochs = chosen.epochs
    chosen = resolve(chosen.but(epochs=max(epochs, 1)), default_lr(model.method))
    check(splits, chosen)
    check_memory(model.backbone, len(splits.train), chosen)
    place = machine.device_named(device)
    used = machine.precision(amp, chosen.amp, place)
    preprocessing, training, before = model.preprocessing, model.training, next(model.backbone.parameters()).device
    model.preprocessing = prepared(as_made(model), splits)
    model.to(place)
    phases = model.method.phases(chosen)
    steps = training_order(len(splits.train), chosen, seed, 0, 0)
    try:
        model.train()
        model.drop_path = chosen.drop_path
        feed = training_feed(splits, model, chosen, seed, place, 0)
        images, labels, _ = next(feed(steps[0][:1]))
        with chance(place, seed):
            mixed = Mixer(chosen, model.num_classes)(images, labels) if chosen.mixes else (images, labels)
            start = time.monotonic()
            with autocast(place, used):
                loss = model.method.loss(model, *mixed, Criterion(chosen.label_smoothing))
            loss.backward()
            value = loss.item()
        seconds = time.monotonic() - start
        settings = settings_of(model, splits, chosen, seed, used)
    finally:
        model.preprocessing, model.drop_path = preprocessing, 0.0
        model.train(training).to(before)
        for p in model.parameters():
            p.grad = None
    settings["recipe"]["epochs"] = epochs
    return {
        **copy.deepcopy(settings), "device": str(place), "loss": value, "seconds_per_batch": seconds,
        "steps_per_epoch": len(steps), "steps": len(steps) * sum(phase.recipe.epochs for phase in phases) if epochs else 0, "threads": torch.get_num_threads(),
        "peak_memory_bytes": machine.peak_memory_bytes(place),
    }  # fmt: skip
