"""Pictures to tensors: the exact evaluation transform, training augmentation, and a data set that is the same for any worker."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from svp.data.splits import Split
from svp.options import option
from svp.preprocessing import Preprocessing

BICUBIC = Image.Resampling.BICUBIC


@dataclass(frozen=True)
class Augmentation:
    """How training pictures are varied. kind "none": as in evaluation."""

    kind: Literal["crop", "timm", "none"] = option(
        "crop", "crop: random resized crop and flip; timm: its create_transform"
    )
    scale: tuple[float, ...] = option((0.5, 1.0), "share of the picture's area in a random crop", above=0.0, high=1.0)
    ratio: tuple[float, ...] = option((0.75, 4 / 3), "aspect of a random crop", above=0.0)
    flip: float = option(0.5, "probability to mirror, where the task allows it", low=0.0, high=1.0)
    auto_augment: str = option("", "timm's policy, for example rand-m9-mstd0.5-inc1")
    color_jitter: float = option(0.0, "timm's colour jitter; ignored beside a policy", low=0.0)
    erase: float = option(0.0, "probability to erase a box", low=0.0, high=1.0)
    force_flip: bool = option(False, "mirror even where the task forbids it, as released recipes do")

    @property
    def is_random(self) -> bool:
        return self.kind != "none"


class EvalTransform:
    """Picture -> (3, H, W): resize the shorter side, centre crop, minus mean, over std; as timm's evaluation transform."""

    def __init__(self, p: Preprocessing, exact: bool = False):
        self.p, self.exact = p, exact or p.exact
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (p.mean, p.std))

    def __call__(self, picture: Image.Image) -> Tensor:
        h, w = self.p.crop
        if self.exact:
            return self.tensor(picture.resize((w, h), BICUBIC))
        width, height = picture.size
        side = self.p.shorter_side
        if min(width, height) != side:
            if width < height:
                picture = picture.resize((side, int(side * height / width)), BICUBIC)
            else:
                picture = picture.resize((int(side * width / height), side), BICUBIC)
        left, top = round((picture.width - w) / 2.0), round((picture.height - h) / 2.0)
        return self.tensor(picture.crop((left, top, left + w, top + h)))

    def tensor(self, picture: Image.Image) -> Tensor:
        values = torch.from_numpy(np.array(picture, dtype=np.uint8)).permute(2, 0, 1)
        return (values.to(torch.float32) / 255 - self.mean) / self.std


class CropTransform(EvalTransform):
    """Picture -> (3, H, W): a random box resized to the crop, mirrored by chance; draws from Python's generator."""

    def __init__(self, p: Preprocessing, a: Augmentation, flip: float):
        super().__init__(p)
        self.a, self.flip = a, flip

    def __call__(self, picture):
        h, w = self.p.crop
        box = random_box(picture.width, picture.height, self.a.scale, self.a.ratio)
        picture = picture.resize((w, h), BICUBIC, box=box)
        if random.random() < self.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self.tensor(picture)


def random_box(
    width: int, height: int, scale: tuple[float, ...], ratio: tuple[float, ...]
) -> tuple[int, int, int, int]:
    """A box of a random share and aspect inside the picture; ten tries, then the largest centred one of a fitting aspect."""
    low, high = np.log(ratio[0]), np.log(ratio[1])
    for _ in range(10):
        area = width * height * random.uniform(scale[0], scale[1])
        aspect = float(np.exp(random.uniform(low, high)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def eval_transform(p: Preprocessing, exact: bool = False) -> EvalTransform:
    """The evaluation transform; exact: straight to the crop's size without keeping the aspect."""
    return EvalTransform(p, exact)


def train_transform(
    p: Preprocessing, a: Augmentation, may_flip: bool = True, exact: bool = False
) -> Callable[[Image.Image], Tensor]:
    """The training transform of an Augmentation; a task that forbids mirroring wins unless force_flip."""
    flip = a.flip if may_flip or a.force_flip else 0.0
    if a.kind == "none":
        return EvalTransform(p, exact)
    if a.kind == "crop":
        return EvalTransform(p, exact) if exact else CropTransform(p, a, flip)
    from timm.data import create_transform

    made: Any = create_transform(
        (3, *p.crop), is_training=True, scale=tuple(a.scale), ratio=tuple(a.ratio), hflip=flip, interpolation="bicubic",
        color_jitter=a.color_jitter or None, auto_augment=a.auto_augment or None, re_prob=a.erase, re_mode="pixel",
        re_count=1, mean=p.mean, std=p.std,
    )  # fmt: skip
    for step in made.transforms:
        for op in getattr(step, "ops", ()):
            if getattr(op.aug_fn, "__name__", "") == "posterize":
                op.aug_fn = posterize
    return made


def posterize(picture: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's operator where Pillow refuses to keep no bit at all: black, as older releases of both had it."""
    if bits_to_keep >= 8:
        return picture
    keep = 0xFF & ~((1 << (8 - bits_to_keep)) - 1)
    return picture.point([value & keep for value in range(256)] * len(picture.getbands()))


class Pictures(Dataset):
    """(tensor, label, index) of a split. What is random in item i depends on (seed, epoch, i) alone.

    Decoded pictures are kept in memory while they fit `cache_bytes`, so that small sets are decoded once.
    """

    def __init__(
        self, split: Split, transform: Callable, seed: int = 0, random: bool = False, cache_bytes: int = 2 << 30
    ):
        self.split, self.transform, self.seed, self.random = split, transform, seed, random
        self.epoch, self.left = 0, cache_bytes
        self.decoded: dict[int, Image.Image] = {}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.split)

    def picture(self, i: int) -> Image.Image:
        found = self.decoded.get(i)
        if found is None:
            found = self.split.picture(i)
            size = found.width * found.height * 3
            if size <= self.left:
                self.left -= size
                self.decoded[i] = found
        return found

    def __getitem__(self, i: int) -> tuple[Tensor, int, int]:
        picture = self.picture(i)
        if not self.random:
            return self.transform(picture), int(self.split.labels[i]), i
        with seeded(self.seed, self.epoch, i):
            return self.transform(picture), int(self.split.labels[i]), i

    def __getstate__(self):
        return {**self.__dict__, "decoded": {}}


class seeded:
    """Python's, numpy's and torch's generators seeded from numbers inside, and as they were after."""

    def __init__(self, *numbers: int):
        self.seed = int.from_bytes(_mix(numbers), "little")

    def __enter__(self) -> None:
        self.before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        random.seed(self.seed)
        np.random.seed(self.seed % 2**32)
        torch.manual_seed(self.seed)

    def __exit__(self, *_: object) -> None:
        python, numpy, torch_state = self.before
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)


def _mix(numbers: tuple[int, ...]) -> bytes:
    import hashlib

    return hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=7).digest()
