"""What a model scores on a split: accuracy, per class, confusion, top-5, calibration."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from svp.errors import SvpError
from svp.ops.precision import wide
from svp.training.feed import Batch, chance, evaluation_feed, my_batches, prepared
from svp.training.machine import Amp, Team, autocast, default_workers, device_named, precision

if TYPE_CHECKING:
    from svp.data.splits import Split, Splits
    from svp.model import AdaptedModel

BINS = 15  # of the calibration error


@dataclass(frozen=True)
class Evaluation:
    """Scores of one split; fractions in 0…1. A class without pictures has accuracy nan and is left out of the mean.

    confusion       (C, C) pictures of class i labelled j
    probabilities   (n, C); labels (n,), in the order of the split
    ece             expected calibration error: |accuracy - confidence| over 15 equal bins, weighted by pictures
    """

    split: str
    classes: tuple[str, ...]
    accuracy: float
    top5: float
    mean_class_accuracy: float
    per_class: np.ndarray
    confusion: np.ndarray
    ece: float
    loss: float
    probabilities: np.ndarray = field(repr=False)
    labels: np.ndarray = field(repr=False)

    @property
    def count(self) -> int:
        return len(self.labels)

    def as_dict(self) -> dict[str, Any]:
        """All but the probabilities, in plain values; a class without pictures has accuracy None."""
        shown, right = self.confusion.sum(1).tolist(), np.diag(self.confusion).tolist()
        return {
            "split": self.split, "pictures": self.count, "accuracy": self.accuracy,
            "mean_class_accuracy": self.mean_class_accuracy, "top5": self.top5, "ece": self.ece, "loss": self.loss,
            "classes": [
                {"name": name, "pictures": n, "right": k, "accuracy": k / n if n else None}
                for name, n, k in zip(self.classes, shown, right, strict=True)
            ],
            "confusion": self.confusion.tolist(),
        }  # fmt: skip


def evaluate(
    model: AdaptedModel,
    data: Splits | str | os.PathLike,
    split: str = "test",
    *,
    batch_size: int = 64,
    device: str = "auto",
    amp: Amp = "auto",
    workers: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Measure a model on one split of a source ("train" is shown as in evaluation, too).

    seed: of the draws of a method that draws in evaluation (`vp` with `random_at_eval`).
    Raises SvpError when there is no such split, or its classes are not the model's.
    """
    from svp.data.sources import open_data

    adapted_one(model)
    splits = in_order_of(model, open_data(data) if isinstance(data, (str, os.PathLike)) else data)
    place = device_named(device)
    chosen = splits.split(split)
    model.to(place)
    count = default_workers(place) if workers is None else workers
    feed = evaluation_feed(chosen, model, place, count, prepared(model.preprocessing, splits))
    used = precision(amp, None, place)
    with chance(place, seed):
        logits, labels = predictions(model, feed(my_batches(len(chosen), batch_size, Team())), Team(), place, used)
    return score(logits, labels, splits.classes, split)


def adapted_one(model: Any) -> None:
    """Raise SvpError for what is no AdaptedModel."""
    from svp.model import AdaptedModel

    if not isinstance(model, AdaptedModel):
        said, hint = type(model).__name__, "svp.adapt(backbone, method, num_classes=…)"
        if isinstance(model, (str, os.PathLike)):
            said, hint = f"the path {os.fspath(model)}", f"svp.load('{os.fspath(model)}')"
        raise SvpError(f"model is {said}, expected an adapted model", hint, "usage")


def in_order_of(model: AdaptedModel, data: Splits) -> Splits:
    """The splits with the model's class indices; raises SvpError when the names of the classes differ."""
    names = tuple(model.classes or data.classes)
    fits = set(data.classes) <= set(names) if data.whole else set(names) == set(data.classes)
    if model.num_classes != len(names) or not fits:
        strange = [name for name in data.classes if name not in names][:3]
        more = f", for example {', '.join(strange)}" if strange else ""
        raise SvpError(
            f"the model knows {model.num_classes} classes, {data.source} has {len(data.classes)}{more}",
            "give the source that it was trained on, or train a model for this one", "data",
        )  # fmt: skip
    if names == data.classes:
        return data
    index = np.array([names.index(name) for name in data.classes])

    done: dict[int, Any] = {}  # two splits that are one stay one

    def turned(part: Split | None) -> Any:
        if part is not None and id(part) not in done:
            done[id(part)] = copy.copy(part)
            done[id(part)].labels = index[part.labels]
        return done.get(id(part))

    return data.but(train=turned(data.train), val=turned(data.val), test=turned(data.test), classes=names)


@torch.no_grad()
def predictions(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    team: Team,
    device: torch.device,
    amp: str = "off",
    forward: Callable[[Tensor], Tensor] | None = None,
    between: Callable[[], Any] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Logits (n, C), float32 or wider, and labels (n,) of all processes' batches, ordered by index.

    The model is in evaluation mode inside. forward turns a batch into logits (default: the model); between is called
    before each batch.
    """
    training, rows = model.training, []
    model.eval()
    try:
        for images, labels, index in _until_stopped(batches, between):
            between()
            with autocast(device, amp):
                logits = (forward or model)(images)
            rows.append((index.cpu().numpy(), labels.cpu().numpy(), wide(logits).cpu().numpy()))
    finally:
        model.train(training)
    rows = [row for part in team.gather(rows) for row in part]
    place, truth, found = (np.concatenate(column) for column in zip(*rows, strict=True))
    order = np.argsort(place, kind="stable")
    return found[order], truth[order]


def _until_stopped(batches: Iterable[Batch], between: Callable[[], Any]) -> Iterator[Batch]:
    """The batches; a worker that was told to end before us fails, and what told it is what stops us."""
    try:
        yield from batches
    except RuntimeError:
        between()
        raise


def score(logits: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], split: str) -> Evaluation:
    """All scores from logits (n, C) and labels (n,): sums over pictures, never means of means."""
    wide = torch.from_numpy(logits).double()
    probabilities = wide.softmax(-1).numpy()
    guess = logits.argmax(-1)
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(confusion, (labels, guess), 1)
    shown = confusion.sum(1)
    per_class = np.divide(np.diag(confusion), shown, out=np.full(len(classes), np.nan), where=shown > 0)
    best = np.argsort(-logits, axis=-1, kind="stable")[:, :5]
    return Evaluation(
        split, classes,
        accuracy=float((guess == labels).mean()),
        top5=float((best == labels[:, None]).any(-1).mean()),
        mean_class_accuracy=float(np.nanmean(per_class)),
        per_class=per_class,
        confusion=confusion,
        ece=calibration_error(probabilities.max(-1), guess == labels),
        loss=float(torch.nn.functional.cross_entropy(wide, torch.from_numpy(labels)).item()),
        probabilities=probabilities,
        labels=labels,
    )  # fmt: skip


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """sum over bins of |right - confidence| / n; bin k holds (k / bins, (k + 1) / bins]."""
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(which, right.astype(float) - confidence, bins)
    return float(np.abs(gap).sum() / len(right))


def raw_pixel_baseline(data: Splits, split: str = "test") -> float | None:
    """Accuracy of a plain logistic regression on the raw pixel values, where a source is small enough to have them.

    scikit-learn's LogisticRegression on values scaled by StandardScaler, C = 1, at most 1,000 iterations, fitted on train.
    """
    if data.pixels is None:
        return None
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(*data.pixels("train"))
    return float(fitted.score(*data.pixels(split)))
