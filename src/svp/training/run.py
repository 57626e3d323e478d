"""What a run gives to others: the handle that a method's phases get, and the finished Run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svp.seams import Seams, Tokens
from svp.training.feed import Batch, Feed, batches_of, evaluation_feed, my_batches, training_feed
from svp.training.machine import Team
from svp.training.recipe import Recipe

if TYPE_CHECKING:
    from svp.data.splits import Splits
    from svp.model import AdaptedModel


class RunHandle:
    """Handed to `Phase.begin` and `Method.start_epoch`: pictures, features and a generator, without training's insides.

    model       the adapted model; run.model(images) are its logits
    generator   torch.Generator, seeded for each phase, kept in checkpoints
    """

    def __init__(self, model: AdaptedModel, data: Splits, recipe: Recipe, seed: int, device: torch.device):
        self.model, self.data, self.recipe, self.seed, self.device = model, data, recipe, seed, device
        self.generator = torch.Generator()
        self._feeds: dict[tuple[str, bool], Feed] = {}

    def size(self, split: str = "train") -> int:
        """How many pictures a split has."""
        return len(self.data.split(split))

    def batches(self, split: str = "train", augment: bool = False, index: Tensor | None = None) -> Iterator[Batch]:
        """(images (b, 3, H, W), labels (b,), index (b,)) of a split, on the device; augment: as in training.

        All pictures in order, or those of `index` in its order; in every process.
        """
        key = split, augment
        if key not in self._feeds:
            if augment and split == "train":
                self._feeds[key] = training_feed(self.data, self.model, self.recipe, self.seed, self.device, 0)
            else:
                self._feeds[key] = evaluation_feed(self.data.split(split), self.model, self.device)
        if index is not None:
            return self._feeds[key](batches_of(index, self.recipe.eval_batch_size))
        return self._feeds[key](my_batches(self.size(split), self.recipe.eval_batch_size, Team()))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """images (b, 3, H, W) -> feature (b, d) of the frozen backbone alone."""
        return self.model.backbone.features(images, Seams())

    @torch.no_grad()
    def block_inputs(self, images: Tensor) -> list[Tokens]:
        """The tokens that enter each block of the frozen backbone, class token and positions included."""
        recorder = _Inputs()
        self.model.backbone.features(images, recorder)
        return recorder.found


class _Inputs(Seams):
    def __init__(self) -> None:
        self.found: list[Tokens] = []

    def block(self, tokens: Tokens, i: int, run: Any) -> Tokens:
        self.found.append(tokens)
        return run(tokens)


@dataclass(frozen=True)
class Run:
    """A finished training: where it lies (None: nowhere) and the numbers of result.json."""

    folder: Path | None
    result: dict[str, Any] = field(repr=False)

    @property
    def test_accuracy(self) -> float | None:
        """On the test split at the selected epoch; None where the source has none."""
        return self.result["test_accuracy"]

    @property
    def val_accuracy(self) -> float | None:
        return self.result["val_accuracy"]

    def table(self) -> str:
        """A line of headings and a line of numbers."""
        r = self.result
        cells = {
            "method": r["method"], "backbone": r["backbone"], "source": r["source"], "seed": str(r["seed"]),
            "trained": f"{r['trainable']['total']:,}", "epoch": f"{r['selected_epoch']}/{r['epochs']}",
            "val": _percent(r["val_accuracy"]),
            "test (selected on test)" if r["selection"] == "test_best" else "test": _percent(r["test_accuracy"]),
            "time": f"{r['timing']['seconds']:.0f} s",
        }  # fmt: skip
        widths = {name: max(len(name), len(text)) for name, text in cells.items()}
        rows = [[name.ljust(w) for name, w in widths.items()], [cells[name].ljust(w) for name, w in widths.items()]]
        return "\n".join("  ".join(row).rstrip() for row in rows)


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f} %"
