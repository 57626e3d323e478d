"""Which pictures a model is shown, in which order and batches; the same for any number of workers and processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from svp.data.splits import Split, Splits
from svp.data.transforms import EvalTransform, Pictures, eval_transform, mixed_seed, seeded, train_transform
from svp.preprocessing import Preprocessing
from svp.training.machine import Team, cpus
from svp.training.recipe import Recipe

if TYPE_CHECKING:
    from svp.model import AdaptedModel

Batch = tuple[Tensor, Tensor, Tensor]  # images (b, 3, H, W), labels (b,), index in the split (b,)


def prepared(p: Preprocessing, data: Splits) -> Preprocessing:
    """A model's preprocessing as this source and its protocol want it; saved with the model, so that predict agrees."""
    if data.resize == "exact":
        return p.but(exact=True)
    ratio = data.protocol.resize_ratio
    return p if ratio is None else p.but(resize=int(max(p.crop) / ratio))


def as_made(model: AdaptedModel) -> Preprocessing:
    """A model's preprocessing without what the source of an earlier training has asked for."""
    own = model.method.preprocessing(model.backbone.preprocessing)
    return model.preprocessing.but(exact=own.exact, resize=own.resize)


def batches_of(order: Tensor, size: int, drop_last: bool = False) -> list[Tensor]:
    """Indices (n,) in consecutive batches of `size`."""
    found = list(order.split(size))
    return found[:-1] if drop_last and found and len(found[-1]) < size else found


def training_order(count: int, recipe: Recipe, *seeds: int) -> list[list[Tensor]]:
    """The steps of an epoch, each a list of forward batches of indices. Depends on the seeds alone."""
    generator = torch.Generator().manual_seed(mixed_seed(*seeds))
    order = torch.randperm(count, generator=generator)
    steps = batches_of(order, recipe.step_size, recipe.drop_last)
    return [batches_of(step, recipe.batch_size) for step in steps]


@contextlib.contextmanager
def chance(device: torch.device, *numbers: int) -> Iterator[None]:
    """Every random generator follows from the numbers inside; afterwards they are as they were."""
    number = mixed_seed(*numbers)
    with seeded(number), contextlib.ExitStack() as stack:
        for generator in generators_of(device):
            stack.callback(generator.set_state, generator.get_state())
            generator.manual_seed(number)
        yield


def generators_of(device: torch.device) -> list[torch.Generator]:
    """Those of an accelerator that the global functions draw from."""
    if device.type == "cuda":
        torch.cuda.init()
        return [torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]]
    return [torch.mps._get_default_mps_generator()] if device.type == "mps" else []


class Feed:
    """Batches of one split through one transform. Workers are kept for the next epoch.

    Pictures come from workers in bytes, a quarter of the numbers, and whole batches are normalised on the device.
    """

    def __init__(self, pictures: Pictures, device: torch.device, workers: int = 0, dtype: torch.dtype = torch.float32):
        self.transform = pictures.transform
        pictures.in_bytes = isinstance(self.transform, EvalTransform)
        self.device, self.dtype, self.order = device, dtype, _Order()
        self.workers = min(workers, len(pictures), cpus())
        self.loader: DataLoader = DataLoader(
            _Dated(pictures), batch_sampler=self.order, num_workers=self.workers, persistent_workers=self.workers > 0,
            pin_memory=device.type == "cuda", generator=torch.Generator().manual_seed(0),
        )  # fmt: skip

    def __call__(self, batches: Sequence[Tensor], epoch: int = 0) -> Iterator[Batch]:
        """The batches with these indices, in this order, on the device."""
        self.order.items = [[(epoch, int(i)) for i in batch] for batch in batches]
        for batch in self.loader:
            images, labels, index = (part.to(self.device, non_blocking=True) for part in batch)
            images = self.transform.normalised(images) if images.dtype == torch.uint8 else images
            yield images.to(self.dtype), labels, index


class FeatureFeed:
    """The same for a frozen network: its features are computed once, then served instead of pictures."""

    def __init__(self, features: Tensor, labels: Tensor):
        self.features, self.labels = features, labels

    def __call__(self, batches: Sequence[Tensor], epoch: int = 0) -> Iterator[Batch]:
        for batch in batches:
            index = batch.to(self.features.device)
            yield self.features[index], self.labels[index], index


def training_feed(
    data: Splits, model: AdaptedModel, recipe: Recipe, seed: int, device: torch.device, workers: int
) -> Feed:
    """The training split as a model takes it, augmented as the recipe says."""
    transform = train_transform(model.preprocessing, recipe.augmentation(), data.may_flip)
    return Feed(Pictures(data.train, transform, seed), device, workers, model.dtype)


def evaluation_feed(
    split: Split, model: AdaptedModel, device: torch.device, workers: int = 0, p: Preprocessing | None = None
) -> Feed:
    """A split as a model takes it; p: prepared otherwise than the model says."""
    return Feed(Pictures(split, eval_transform(p or model.preprocessing)), device, workers, model.dtype)


def is_random(data: Splits, p: Preprocessing, recipe: Recipe) -> bool:
    """Whether chance touches the training pictures before they are batched."""
    transform = train_transform(p, recipe.augmentation(), data.may_flip)
    return getattr(transform, "is_random", True)


def my_batches(count: int, size: int, team: Team) -> list[Tensor]:
    """All of a split in order, this process's batches of it."""
    return batches_of(torch.arange(count), size)[team.rank :: team.size]


class _Order:
    """A batch sampler whose batches are set anew before each pass."""

    items: Sequence[Any] = ()

    def __iter__(self):
        return iter(self.items)

    def __len__(self):
        return len(self.items)


class _Dated(torch.utils.data.Dataset):
    """Pictures asked for by (epoch, index), so that workers kept from the last epoch know the new one."""

    def __init__(self, pictures: Pictures):
        self.pictures = pictures

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, key):
        epoch, index = key
        self.pictures.set_epoch(epoch)
        return self.pictures[index]
