"""Recipe: how a run is trained, as one frozen table of options; named rows live in recipes/."""

from __future__ import annotations

import fnmatch
import importlib
import pkgutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from svp.errors import SvpError, unknown
from svp.extras import own_version
from svp.options import changed, option
from svp.training.config import read_yaml

LISTING = "svp list recipes"
ONCE_AN_EPOCH = ("cosine_epoch", "timm_epoch", "milestones")  # schedules that hold a rate for whole epochs


@dataclass(frozen=True)
class Recipe:
    """Optimiser, schedule, lengths, regularisation, augmentation. `but` gives a checked copy with changes.

    An optimiser step sees batch_size * accumulate pictures (over all processes). `lr` is absolute; with lr_per it is
    multiplied by the pictures of a step over lr_per. The mean loss of a step is exact whatever the last batch holds.
    """

    epochs: int = option(10, "passes over the training pictures", low=0, high=100_000)
    batch_size: int = option(32, "pictures of a forward pass, over all processes", low=1, high=1_000_000)
    accumulate: int = option(1, "forward passes of an optimiser step", low=1, high=100_000)
    drop_last: bool = option(False, "leave out an incomplete last batch")
    lr: float | None = option(None, "learning rate; none: the method's own default", above=0.0)
    lr_per: int = option(0, "multiply lr by (pictures of a step / lr_per); 0: lr is absolute", low=0)

    optimizer: Literal["adamw", "adam", "sgd"] = option("adamw", "the optimiser")
    betas: tuple[float, ...] = option((0.9, 0.999), "decay of Adam's two averages", low=0.0, high=1.0)
    eps: float = option(1e-8, "added to Adam's denominator", above=0.0)
    momentum: float = option(0.9, "of SGD", low=0.0, high=1.0)
    weight_decay: float = option(1e-4, "weight decay; AdamW decouples it from the gradient", low=0.0)
    decay: Literal["matrices", "all"] = option(
        "matrices", "what is decayed: tensors with two axes or more that are no bias (timm's rule), or all"
    )
    clip_grad: float = option(0.0, "largest norm of the gradient over all that trains; 0: off", low=0.0)

    schedule: Literal["cosine", "cosine_epoch", "timm_epoch", "milestones", "constant"] = option(
        "cosine",
        "cosine: every step; cosine_epoch: once an epoch; timm_epoch: once an epoch as timm 0.4.12 and DeiT's loop; "
        "milestones: falls at some epochs; constant",
    )
    milestones: tuple[float, ...] = option(
        (0.5, 0.72), "where milestones lets the rate fall, as shares of all epochs", above=0.0, high=1.0
    )
    gamma: float = option(0.1, "factor of the learning rate at each milestone", above=0.0, high=1.0)
    warmup: float = option(0.05, "length of the linear warm-up, in warmup_unit", low=0.0)
    warmup_unit: Literal["fraction", "epochs", "steps"] = option("fraction", "fraction: of all steps; epochs; steps")
    warmup_lr: float = option(0.0, "learning rate at the start of the warm-up (never scaled)", low=0.0)
    warmup_first: Literal["above", "start"] = option(
        "above", "the first step of the warm-up trains one step above warmup_lr, or at warmup_lr itself"
    )
    min_lr: float = option(0.0, "learning rate at the end of the cosine (never scaled)", low=0.0)

    label_smoothing: float = option(0.1, "share of the target spread over all classes", low=0.0, high=0.999)
    mixup: float = option(0.0, "alpha of mixup's Beta; 0: off", low=0.0)
    cutmix: float = option(0.0, "alpha of cutmix's Beta; 0: off", low=0.0)
    mixup_prob: float = option(1.0, "probability that a batch is mixed at all", low=0.0, high=1.0)
    mixup_switch: float = option(0.5, "probability of cutmix where both are on", low=0.0, high=1.0)
    drop_path: float = option(0.0, "stochastic depth of the (frozen) backbone while training", low=0.0, high=0.9)
    ema: float = option(0.0, "decay of the averaged weights that are evaluated and saved; 0: off", low=0.0, high=1.0)
    grad_checkpointing: bool = option(
        False, "compute each block again in the backward pass: half the memory for a third more time"
    )
    amp: Literal["off", "bf16", "fp16"] | None = option(None, "precision of this recipe; none: as --amp says")
    eval_batch_size: int = option(64, "pictures of a forward pass in evaluation", low=1, high=1_000_000)

    augment: Literal["crop", "timm", "none"] = option(
        "crop", "crop: random resized crop and flip; timm: its create_transform; none: as in evaluation"
    )
    crop_scale: tuple[float, ...] = option((0.5, 1.0), "share of the area in a random crop", above=0.0, high=1.0)
    crop_ratio: tuple[float, ...] = option((0.75, 4 / 3), "aspect of a random crop", above=0.0)
    flip: float = option(0.5, "probability to mirror, where the task allows it", low=0.0, high=1.0)
    force_flip: bool = option(False, "mirror even where the task forbids it, as released recipes do")
    auto_augment: str = option("", "timm's policy, for example rand-m9-mstd0.5-inc1")
    color_jitter: float = option(0.0, "timm's colour jitter; ignored beside a policy", low=0.0)
    erase: float = option(0.0, "probability to erase a box (timm)", low=0.0, high=1.0)

    def but(self, **changes: Any) -> Recipe:
        """A checked copy with some fields changed; an unknown one is an error naming the nearest."""
        return changed(self, changes, "the recipe", LISTING)

    @property
    def step_size(self) -> int:
        """Pictures of an optimiser step."""
        return self.batch_size * self.accumulate

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    @property
    def base_lr(self) -> float:
        """The learning rate that is used: lr, scaled where lr_per says so."""
        assert self.lr is not None, "resolve() gives lr its value"
        return self.lr * self.step_size / self.lr_per if self.lr_per else self.lr

    def augmentation(self) -> Any:
        """The part that concerns pictures, in the words of `svp.data.transforms`."""
        from svp.data.transforms import Augmentation

        return Augmentation(
            kind=self.augment, scale=self.crop_scale, ratio=self.crop_ratio, flip=self.flip, force_flip=self.force_flip,
            auto_augment=self.auto_augment, color_jitter=self.color_jitter, erase=self.erase,
        )  # fmt: skip


@dataclass(frozen=True)
class RecipeRow:
    """A named recipe with what belongs to the same line of its source: method options, head, protocol, seed."""

    name: str
    recipe: Recipe
    source: str = "ours"
    method: str = ""  # the method that method_options are for
    method_options: dict[str, Any] = field(default_factory=dict)
    head: str = "linear"
    protocol: str = "default"
    seed: int = 0
    note: str = ""


def resolve(recipe: Recipe, default_lr: float) -> Recipe:
    """The recipe with its learning rate in place, checked as a whole; raises SvpError (kind "usage")."""
    recipe = recipe.but(lr=default_lr if recipe.lr is None else recipe.lr)
    if recipe.epochs < 1:
        raise SvpError(f"epochs is {recipe.epochs}, expected at least 1", "--epochs 10", "usage")
    for name in ("auto_augment", "color_jitter", "erase"):
        if getattr(recipe, name) and recipe.augment != "timm":
            raise SvpError(
                f"{name} is timm's, and augment is {recipe.augment}: it would do nothing", "-r augment=timm", "usage"
            )
    if recipe.mixes and recipe.batch_size % 2:
        hint = f"-r batch_size={recipe.batch_size + 1}, or -r mixup=0 -r cutmix=0; an odd last batch is no problem"
        raise SvpError(f"mixup and cutmix pair pictures: batch_size {recipe.batch_size} is odd", hint, "usage")
    for name, pair in (("betas", recipe.betas), ("crop_scale", recipe.crop_scale), ("crop_ratio", recipe.crop_ratio)):
        if len(pair) != 2:
            form = "[0.9,0.999]" if name == "betas" else "[0.5,1]"
            raise SvpError(f"{name} of the recipe has {len(pair)} numbers, expected two", f"-r {name}={form}", "usage")
    if max(recipe.betas) >= 1:
        raise SvpError(
            f"betas of the recipe are {list(recipe.betas)}, expected less than 1", "-r betas=[0.9,0.999]", "usage"
        )
    if recipe.warmup_unit == "fraction" and recipe.warmup > 1:
        raise SvpError(
            f"warmup of the recipe is {recipe.warmup} of all steps, expected at most 1",
            "-r warmup_unit=epochs, or a fraction such as -r warmup=0.05", "usage",
        )  # fmt: skip
    if recipe.schedule in ONCE_AN_EPOCH and recipe.warmup_unit == "steps" and recipe.warmup:
        problem = (
            f"the schedule {recipe.schedule} changes once an epoch, its warm-up cannot last {recipe.warmup:g} steps"
        )
        raise SvpError(problem, "-r warmup_unit=epochs -r warmup=5", "usage")
    if list(recipe.milestones) != sorted(set(recipe.milestones)):
        shown = ", ".join(f"{m:g}" for m in recipe.milestones)
        raise SvpError(f"milestones of the recipe are {shown}, expected ascending shares", "-r milestones=[0.5,0.72]", "usage")  # fmt: skip
    return recipe


# -- names and files ---------------------------------------------------------------------------------------------------


def recipes() -> dict[str, RecipeRow]:
    """All named rows: the RECIPES of every file in recipes/."""
    from svp.training import recipes as folder

    found: dict[str, RecipeRow] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(folder.__path__)):
        found |= importlib.import_module(f"svp.training.recipes.{module}").RECIPES
    return found


def list_recipes(pattern: str = "*") -> list[str]:
    """The names of the rows that match a wildcard pattern."""
    return fnmatch.filter(recipes(), pattern)


def recipe_named(name: str) -> Recipe:
    """The recipe of a row."""
    return recipe_row(name).recipe


def recipe_row(name: str) -> RecipeRow:
    rows = recipes()
    if name not in rows:
        raise unknown("recipe", name, rows, LISTING)
    return rows[name]


def recipe_from(name_or_file: str | Path) -> RecipeRow:
    """A row by name, or from a YAML file of recipe fields; its key `base` names the row that it starts from.

    Raises SvpError (kind "usage") with file, line and key for what is unknown, doubled, of the wrong type or too new.
    """
    text = str(name_or_file)
    if not (text.endswith((".yaml", ".yml")) or "/" in text or "\\" in text):
        return recipe_row(text)
    values, lines = read_yaml(text)
    check_version(values.pop("svp_version", None), text)
    key = "base"
    try:
        row = recipe_row(str(values.pop(key, "default")))
        recipe = row.recipe
        for key, value in values.items():
            recipe = recipe.but(**{key: value})
    except SvpError as err:
        raise SvpError(f"{text}, line {lines.get(key, 1)}: {err.problem}", err.hint, "usage") from err
    return replace(row, name=text, recipe=recipe, source=f"{text}, from {row.name}", note="")


def check_version(written: Any, path: str | Path) -> None:
    """Raise SvpError when a file says that a newer svp wrote it."""
    here = own_version()
    if written is not None and here != "source" and _numbers(str(written)) > _numbers(here):
        raise SvpError(f"{path} was written by svp {written}, this is {here}", "pip install -U svp-vision", "usage")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".") if part.isdigit())
