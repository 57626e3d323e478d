"""Do the pictures arrive in time? Decoding, augmentation and mixup beside the step; and what keeping features saves."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from svp.data.sources import open_data
from svp.data.splits import Splits
from svp.data.transforms import LIMIT_BYTES, Pictures, train_transform
from svp.model import adapt
from svp.ops.timing import Timing, interleaved, spread, timed
from svp.studies.bench.measure import Tell
from svp.studies.bench.setting import CLASSES, Setting
from svp.training.feed import Feed, chance, prepared
from svp.training.losses import Mixer
from svp.training.machine import cpus, device_named
from svp.training.recipe import recipe_named

PICTURES, WIDTH, HEIGHT, QUALITY = 64, 500, 375, 90  # as large as a picture of ImageNet, in the mean
MOST = 256  # of a source that was given
EPOCHS = 10  # over which the saving of kept features is told
MIXED = dict(mixup=0.8, cutmix=1.0)


@contextmanager
def pictures(given: Splits | None) -> Iterator[Splits]:
    """The given ones, or pictures drawn for the occasion in a folder that goes away."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="svp-bench-") as folder:
        draw_pictures(Path(folder))
        yield open_data(f"folder:{folder}")


def draw_pictures(folder: Path) -> None:
    """JPEG files of two classes: coarse shapes under fine noise, so that decoding costs what it does for photographs."""
    rng = np.random.default_rng(0)
    for i in range(PICTURES):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            (WIDTH, HEIGHT), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse, dtype=np.int16) + rng.integers(-12, 13, (HEIGHT, WIDTH, 3), dtype=np.int16)
        path = folder / "train" / ("even", "odd")[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=QUALITY)


def feeding(
    setting: Setting, given: Splits | None, step_rate: float | None, tell: Tell = lambda text: None
) -> dict[str, Any]:
    """Pictures a second that reach a step of this size: {"rows": [{"workers", "decoded", "pictures_per_second", …}]}.

    decoded    "each time", or "once": kept in memory, as small data sets are
    step_rate  images a second of the step; `step_waits`: the share of time that it would wait for pictures
    """
    rows = []
    with pictures(given) as data:
        for workers in dict.fromkeys((0, min(cpus(), 4))):
            for decoded, cache in (("each time", 0), ("once", LIMIT_BYTES)):
                tell(f"{setting.img_size} px: pictures with {workers} workers, decoded {decoded}")
                timing = Timing()
                count = passes(setting, data, workers, cache, timing)
                rate = count / min(timing.wall)
                rows.append({
                    "workers": workers, "decoded": decoded, "pictures": count, "seconds": spread(timing.wall),
                    "pictures_per_second": rate, **beside(rate, step_rate, workers),
                })  # fmt: skip
    return {
        "img_size": setting.img_size, "batch_size": setting.batch_size, "step_images_per_second": step_rate,
        "source": "drawn here" if given is None else "given",
        "recipe": {"augment": "crop", **MIXED}, "rows": rows,
    }  # fmt: skip


def passes(setting: Setting, data: Splits, workers: int, cache: int, timing: Timing, repeats: int = 3) -> int:
    """How many pictures a pass has; a first one starts the workers and fills what is kept, the others are timed."""
    recipe = recipe_named("default").but(batch_size=setting.batch_size, **MIXED)
    p = prepared(setting.shape().preprocessing, data)
    transform = train_transform(p, recipe.augmentation(), data.may_flip)
    device = device_named(setting.device)
    feed = Feed(Pictures(data.train, transform, 0, cache_bytes=cache), device, workers)
    mixer = Mixer(recipe, max(data.num_classes, 2))
    count = min(len(data.train), MOST)
    batches = list(torch.arange(count).split(setting.batch_size))

    def whole(epoch: int) -> None:
        with chance(device, epoch):
            for images, labels, _ in feed(batches, epoch):
                mixer(images, labels)

    whole(0)
    for epoch in range(1, repeats + 1):
        timing.add(*timed(lambda epoch=epoch: whole(epoch), setting.device))  # type: ignore[misc]
    return count


def beside(rate: float, step_rate: float | None, workers: int) -> dict[str, Any]:
    """The share of a run's time that goes to waiting for pictures. Without workers step and pictures take turns."""
    if step_rate is None:
        return {"step_waits": None}
    if workers == 0:
        return {"step_waits": (1 / rate) / (1 / rate + 1 / step_rate)}
    return {"step_waits": max(0.0, 1 - rate / step_rate)}


def probe(setting: Setting, seconds: float) -> dict[str, Any]:
    """A linear probe whose frozen features are computed at every step, and one that keeps them (what `svp train` does)."""
    model = adapt(setting.network(), "linear", num_classes=CLASSES, probe=False).to(setting.device)
    images, labels = setting.pictures()
    with torch.no_grad():
        kept = model.features(images)

    def head_step(features: torch.Tensor) -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model.head(features), labels).backward()

    def whole_step() -> None:
        head_step(model.features(images))

    rounds = interleaved(
        {"computed": whole_step, "kept": lambda: head_step(kept)}, 5, seconds=seconds, device=setting.device
    )
    clock = {name: timing.chosen(setting.uses_cpu_time) for name, timing in rounds.items()}
    computed, served = min(clock["computed"]), min(clock["kept"])
    return {
        "img_size": setting.img_size, "batch_size": setting.batch_size, "epochs": EPOCHS,
        "computed": {"seconds": spread(clock["computed"]), "images_per_second": setting.batch_size / computed},
        "kept": {"seconds": spread(clock["kept"]), "images_per_second": setting.batch_size / served},
        "times_faster": EPOCHS * computed / (computed + EPOCHS * served),
    }  # fmt: skip
