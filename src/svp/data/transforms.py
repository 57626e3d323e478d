"""Pictures to tensors: the exact evaluation transform, training augmentation, and a data set that is the same for any worker."""

from __future__ import annotations

import hashlib
import json
import random as chance
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from svp.data.kept import LIMIT_BYTES, Kept
from svp.data.splits import Split
from svp.errors import SvpError
from svp.options import option
from svp.preprocessing import Preprocessing

LOOKS = 32  # pictures whose headers are read to learn how large the others are


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

    is_random = False

    def __init__(self, p: Preprocessing):
        self.p = p
        self.filter = Image.Resampling[p.interpolation.upper()]
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (p.mean, p.std))

    def __call__(self, picture: Image.Image) -> Tensor:
        return self.normalised(self.drawn(picture))

    def drawn(self, picture: Image.Image, generator: Any = chance) -> Tensor:
        """All but the last step: (3, H, W), uint8."""
        return self.pixels(self.cropped(picture))

    def cropped(self, picture: Image.Image) -> Image.Image:
        """The pixels that the network will see, (H, W), 8 bits."""
        h, w = self.p.crop
        if self.p.exact:
            return picture.resize((w, h), self.filter)
        width, height = picture.size
        side = self.p.shorter_side
        if min(width, height) != side:
            longer = int(side * max(width, height) / min(width, height))
            size = (side, longer) if width <= height else (longer, side)
            picture = picture.resize(size, self.filter)
        left, top = round((picture.width - w) / 2.0), round((picture.height - h) / 2.0)
        return picture.crop((left, top, left + w, top + h))

    def pixels(self, picture: Image.Image) -> Tensor:
        """(3, H, W), uint8."""
        return torch.from_numpy(np.array(picture, dtype=np.uint8)).permute(2, 0, 1).contiguous()

    def normalised(self, pixels: Tensor) -> Tensor:
        """(…, 3, H, W) uint8 -> float32, on its own device: the same bits for one picture and for a batch."""
        mean, std = (t.to(pixels.device) for t in (self.mean, self.std))
        return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)


class CropTransform(EvalTransform):
    """Picture -> (3, H, W): a random box resized to the crop, mirrored by chance."""

    is_random = True

    def __init__(self, p: Preprocessing, a: Augmentation, flip: float):
        super().__init__(p)
        self.a, self.flip = a, flip

    def drawn(self, picture: Image.Image, generator: Any = chance) -> Tensor:
        h, w = self.p.crop
        box = random_box(picture.width, picture.height, self.a.scale, self.a.ratio, generator)
        picture = picture.resize((w, h), self.filter, box=box)
        if generator.random() < self.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self.pixels(picture)


def random_box(
    width: int, height: int, scale: tuple[float, ...], ratio: tuple[float, ...], generator: Any = chance
) -> tuple[int, int, int, int]:
    """A box of a random share and aspect inside the picture; ten tries, then the largest centred one of a fitting aspect."""
    low, high = np.log(ratio[0]), np.log(ratio[1])
    for _ in range(10):
        area = width * height * generator.uniform(scale[0], scale[1])
        aspect = float(np.exp(generator.uniform(low, high)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = generator.randint(0, width - w), generator.randint(0, height - h)
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def eval_transform(p: Preprocessing) -> EvalTransform:
    """The evaluation transform; p.exact: straight to the crop's size without keeping the aspect."""
    return EvalTransform(p)


def train_transform(p: Preprocessing, a: Augmentation, may_flip: bool = True) -> Callable[[Image.Image], Tensor]:
    """The training transform of an Augmentation; a task that forbids mirroring wins unless force_flip.

    kind "timm" is what published recipes name, with the operators of timm 1.x: those of 0.4.12 by the same policy text.
    """
    flip = a.flip if may_flip or a.force_flip else 0.0
    if a.kind == "none" or (a.kind == "crop" and p.exact):
        return EvalTransform(p)
    if a.kind == "crop":
        return CropTransform(p, a, flip)
    from timm.data import create_transform

    jitter: Any = a.color_jitter or None
    try:
        made: Any = create_transform(
            (3, *p.crop), is_training=True, scale=(a.scale[0], a.scale[1]), ratio=(a.ratio[0], a.ratio[1]), hflip=flip,
            interpolation=p.interpolation, color_jitter=jitter, auto_augment=a.auto_augment or None,
            re_prob=a.erase, re_mode="pixel", re_count=1, mean=p.mean, std=p.std,
        )  # fmt: skip
    except (AssertionError, ValueError) as err:  # how timm refuses a policy
        problem = f"auto_augment is '{a.auto_augment}', which is no policy of timm's"
        raise SvpError(problem, "-r auto_augment=rand-m9-mstd0.5-inc1", "usage") from err
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

    Decoded pictures (for evaluation: cropped ones) are kept while all of the split fits `cache_bytes`; see `Kept`.

    Where in_bytes is set, tensors are (3, H, W) in uint8, and the transform's `normalised` finishes whole batches of them.
    """

    def __init__(
        self,
        split: Split,
        transform: Any,
        seed: int = 0,
        cache_bytes: int = LIMIT_BYTES,
    ):
        self.in_bytes = False
        self.split, self.transform, self.seed, self.epoch = split, transform, seed, 0
        self.random = getattr(transform, "is_random", True)
        self.crops = isinstance(transform, EvalTransform) and not transform.is_random
        slot = 3 * transform.p.crop[0] * transform.p.crop[1] if self.crops else _largest_bytes(split)
        self.kept = Kept(len(split), slot, cache_bytes)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> tuple[Tensor, int, int]:
        try:
            return self._tensor(self.kept.get(i, self._picture), i), int(self.split.labels[i]), i
        except SvpError as err:
            if get_worker_info() is None:
                raise
            raise FromWorker.of(err) from err

    def _picture(self, i: int) -> Image.Image:
        picture = self.split.picture(i)
        return self.transform.cropped(picture) if self.crops else picture

    def _tensor(self, picture: Image.Image, i: int) -> Tensor:
        if isinstance(self.transform, EvalTransform):
            pixels = self._pixels(picture, i)
            return pixels if self.in_bytes else self.transform.normalised(pixels)
        if not self.random:
            return self.transform(picture)
        with seeded(self.seed, self.epoch, i):
            return self.transform(picture)

    def _pixels(self, picture: Image.Image, i: int) -> Tensor:
        if self.crops:  # it is cropped already
            return self.transform.pixels(picture)
        # draws from what it is given: nothing global to put back
        return self.transform.drawn(picture, chance.Random(mixed_seed(self.seed, self.epoch, i)))


class seeded:
    """Python's, numpy's and torch's generators seeded from numbers inside, and as they were after."""

    def __init__(self, *numbers: int):
        self.number = mixed_seed(*numbers)

    def __enter__(self) -> None:
        self.before = chance.getstate(), np.random.get_state(), torch.get_rng_state()
        chance.seed(self.number)
        np.random.seed(self.number % 2**32)
        torch.default_generator.manual_seed(self.number)

    def __exit__(self, *_: object) -> None:
        python, numpy, torch_state = self.before
        chance.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)


class FromWorker(SvpError):
    """An SvpError that leaves a data worker whole: torch makes it anew from the text of its traceback alone."""

    MARK = "svp explains: "

    @classmethod
    def of(cls, err: SvpError) -> FromWorker:
        return cls(cls.MARK + json.dumps([err.problem, err.hint, err.kind]))

    def __init__(self, text: str, hint: str = "", kind: str = "data"):
        found = re.search(rf"{self.MARK}(\[.*\])", text)
        super().__init__(*(json.loads(found[1]) if found else (text, hint, kind)))
        if found and get_worker_info():
            self.args = (found[0],)  # what the traceback will show


def _largest_bytes(split: Split) -> int:
    """Bytes of the largest of a few pictures, evenly spaced, as RGB; 0 where none can be read."""
    largest = 0
    for i in np.unique(np.linspace(0, len(split) - 1, min(LOOKS, len(split))).astype(int)).tolist():
        try:
            seen = split.look(i)
            largest = max(largest, 3 * seen.width * seen.height)
        except SvpError:  # told when the picture's turn comes
            continue
    return largest


def mixed_seed(*numbers: int) -> int:
    """One seed from several numbers, unrelated for neighbours."""
    text = " ".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")
