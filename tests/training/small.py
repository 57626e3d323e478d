"""Generated pictures and a tiny model: a whole run in a fraction of a second."""

from contextlib import contextmanager

import numpy as np
import pytest

from svp.backbones.create import create_backbone
from svp.data.splits import Arrays, Splits
from svp.model import adapt
from svp.training import loop
from svp.training.recipe import Recipe

CLASSES = ("blue", "green", "red")
RECIPE = Recipe(epochs=3, batch_size=8, lr=1e-2)


def pictures(count, seed, size=20, classes=CLASSES):
    """Noise with one channel brighter: an easy task."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % len(classes)
    pixels = generator.integers(0, 160, (count, size, size, 3))
    pixels[np.arange(count), :, :, labels % 3] += 90
    return Arrays(pixels.astype(np.uint8), labels, [f"picture{seed}/{i}" for i in range(count)])


def splits(train=30, val=12, test=12, **changes):
    """Splits of three classes; an odd last batch of 30 pictures by 8."""
    parts = [pictures(n, seed) if n else None for seed, n in enumerate((train, val, test))]
    return Splits("generated", *parts, CLASSES, **changes)


def model(method="svp", *, seed=0, probe=False, head="linear", **options):
    """`method` on a Vim of two blocks, 16 wide, for 16 x 16 pixels."""
    net = create_backbone(
        "vim_tiny", depth=2, embed_dim=16, d_state=4, patch_size=8, img_size=16, num_classes=0, seed=seed
    )
    if method == "svp":
        options = {"hidden": 4, **options}
    return adapt(net, method, num_classes=3, seed=seed, probe=probe, head=head, **options)


class Crash(BaseException):
    """A kill, as far as one process can play it: nothing that handles errors sees it."""


@contextmanager
def at_step(last, act):
    """What trains inside does act(run) after so many steps, before their checkpoint."""
    told = loop.Training.tell_step

    def tell_step(self, *args):
        told(self, *args)
        if self.progress.total_steps == last:
            act(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Training, "tell_step", tell_step)
        yield


@contextmanager
def crash_at(last):
    """What trains inside is killed after so many steps, before their checkpoint."""

    def crash(run):
        raise Crash

    with pytest.raises(Crash), at_step(last, crash):
        yield
