"""AdaptedModel = frozen backbone + method + head: what it computes, what of it trains, and what it leaves on disk."""

from __future__ import annotations

import copy
import fnmatch
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svp.backbones.base import Backbone, drawn_from
from svp.errors import SvpError
from svp.extras import own_version
from svp.methods.base import Method, parts_of
from svp.model.folder import CONFIG, TENSORS, write_folder
from svp.seams import SEAMS

FORMAT = 1  # of a saved adapter


@dataclass(frozen=True)
class Prediction:
    """One labelled picture; probabilities are in 0…1, top5 is sorted."""

    path: str
    label: str
    probability: float
    top5: list[tuple[str, float]]


class AdaptedModel(nn.Module):
    """images (b, 3, H, W) -> logits (b, num_classes), prepared as `.preprocessing` says.

    `parameters()`, `state_dict()`, `train()` and DDP see method and head alone: the backbone is kept unregistered, in
    evaluation mode, shared by any number of adapters and changed by none. `drop_path` is the stochastic depth of the
    frozen backbone while this model is in training mode.
    """

    def __init__(
        self, backbone: Backbone, method: Method, head: nn.Module, specs: list[tuple[str, dict]], head_name: str
    ):
        super().__init__()
        self._frozen = (backbone,)
        self.method, self.head = method, head
        self.specs, self.head_name = specs, head_name
        self.num_classes = method.num_classes
        self.preprocessing = method.preprocessing(backbone.preprocessing)
        self._resizes = any(type(part).preprocessing is not Method.preprocessing for part in parts_of(method))
        self._classes: tuple[str, ...] | None = None
        self.task: dict[str, Any] = {}
        self.drop_path = 0.0
        self._disabled = False

    # -- the function --------------------------------------------------------------------------------------------------

    @property
    def backbone(self) -> Backbone:
        return self._frozen[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the backbone's tensors, and of the pictures that it takes outside of autocast."""
        return next(self.backbone.parameters()).dtype

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes in the order of the logits. Set to another number of names than num_classes it raises SvpError."""
        return self._classes

    @classes.setter
    def classes(self, names: Sequence[str] | None) -> None:
        if names is not None and len(names) != self.num_classes:
            raise miscounted(names, self.num_classes)
        self._classes = None if names is None else tuple(names)

    def forward(self, images: Tensor) -> Tensor:
        """images (b, 3, H, W) -> logits (b, num_classes)."""
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """images (b, 3, H, W) -> feature (b, d), the head's input."""
        rate = self.drop_path if self.training else 0.0
        if self._disabled:
            with torch.no_grad():
                return self.backbone.features(images)
        if self.method.acts("network"):  # it may change pictures before the network looks at them
            self.backbone.check_images(images, any_size=self._resizes)
        return self.backbone.features(images, self.method, rate)

    @property
    def frozen_features(self) -> bool:
        """Whether nothing between the pictures and the head is changed: features may be computed once."""
        return not any(self.method.acts(seam) for seam in SEAMS)

    @contextmanager
    def disabled(self) -> Iterator[AdaptedModel]:
        """The backbone acts alone inside: `features` are those of the frozen network (peft: disable_adapter).

        Raises SvpError where the method takes pictures that are prepared for itself: the network takes others.
        """
        if self.method.preprocessing(self.backbone.preprocessing) != self.backbone.preprocessing:
            raise SvpError(
                f"{self.method_name} takes pictures prepared for itself, which {self.backbone.name} alone does not",
                "model.backbone.features(images), of pictures prepared as model.backbone.preprocessing says",
            )
        before, self._disabled = self._disabled, True
        try:
            yield self
        finally:
            self._disabled = before

    def _apply(self, fn, recurse=True):
        self.backbone._apply(fn)
        return super()._apply(fn, recurse)

    # -- what trains ---------------------------------------------------------------------------------------------------

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What an optimiser of your own is given: the tensors of method and head that train now."""
        return [p for p in self.parameters() if p.requires_grad]

    def num_trainable(self, head: bool = False) -> int:
        """How many numbers train in the method, with head=True also in the head."""
        parts = [self.method, self.head] if head else [self.method]
        return sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad)

    @property
    def method_name(self) -> str:
        return "+".join(name for name, _ in self.specs)

    @property
    def labels(self) -> tuple[str, ...]:
        """The methods' names, or what they are called where they are adapted to this backbone."""
        site = self.backbone.site()
        parts = zip(self.specs, parts_of(self.method), strict=True)
        return tuple(type(part).label(site, part.opt) or name for (name, _), part in parts)

    def summary(self) -> str:
        """What trains, where, how many numbers (peft: print_trainable_parameters)."""
        frozen = sum(p.numel() for name, p in self.backbone.named_parameters() if not name.startswith("head."))
        name = "+".join(self.labels)
        lines = [f"{name} on {self.backbone.name}: {self.num_trainable():,} + head {self.num_trainable(head=True) - self.num_trainable():,} "
                 f"numbers train, {frozen:,} are frozen ({self.num_trainable(head=True) / frozen:.2%})"]  # fmt: skip
        for name, group in _alike(list(self.named_parameters())).items():
            found = [p for _, p in group]
            shapes = sorted({tuple(p.shape) for p in found})
            lines.append(f"  {name:<36} {len(found):>4} x {str(shapes[0]) + (' …' if len(shapes) > 1 else ''):<18}"
                         f"{sum(p.numel() for p in found):>12,}")  # fmt: skip
        return "\n".join(lines)

    # -- the effect probe ----------------------------------------------------------------------------------------------

    def probe(self, seed: int = 0) -> None:
        """Raise SvpError unless every trainable tensor gets a gradient and changes the output, with its like in other blocks.

        Adds seeded noise of 0.02 (1 + rms) to what trains (overwriting would kill the signal of a deep network, and zero
        starts hide dead partners), runs two random pictures, and puts everything back. Patterns in `method.known_inert`
        are excused.
        """
        with drawn_from(seed):
            self._probe(seed)

    def _probe(self, seed: int) -> None:
        names = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        saved = [p.detach().clone() for _, p in names]
        grads, training = [p.grad for _, p in names], self.training
        device = next(self.backbone.parameters()).device
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(2, 3, *self.preprocessing.crop, generator=generator)
        images = images.to(device, next(self.backbone.parameters()).dtype)
        self.eval()
        try:
            for _, p in names:
                p.data += _noise(p, generator)
                p.grad = None
            with torch.enable_grad():
                logits = self(images)
                weight = torch.randn(logits.shape, generator=generator).to(logits)
                (logits * weight).sum().backward()
            silent = [name for name, p in names if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
            with torch.no_grad():
                before = self(images)
                for group in _alike(names).values():
                    kept = [p.detach().clone() for _, p in group]
                    for _, p in group:
                        p.data += _noise(p, generator)
                    if torch.equal(self(images), before):
                        silent += [name for name, _ in group if name not in silent]
                    for (_, p), value in zip(group, kept, strict=True):
                        p.data.copy_(value)
        finally:
            for (_, p), value, grad in zip(names, saved, grads, strict=True):
                p.data.copy_(value)
                p.grad = grad
            self.train(training)
        inert = [
            name for name in silent if not any(fnmatch.fnmatch(name, f"*{pat}") for pat in self.method.known_inert)
        ]
        if inert:
            shown = ", ".join(inert[:5]) + (f" and {len(inert) - 5} more" if len(inert) > 5 else "")
            raise SvpError(
                f"{self.method_name} on {self.backbone.name} would train {len(inert)} tensors without any effect: {shown}",
                "this method cannot act there with these options; `svp list methods` shows the others",
            )

    # -- merging, saving, predicting -----------------------------------------------------------------------------------

    def merge(self) -> Backbone:
        """A plain backbone that acts the same, its head this model's (peft: merge_and_unload).

        Bias slots that the published network left empty are filled, and tensors may have another shape (more states).
        Raises SvpError when the method does more than replace weights.
        """
        net = copy.deepcopy(self.backbone)
        w = {name: p.detach() for name, p in net.named_parameters() if not name.startswith("head.")}
        with torch.no_grad():
            merged = w if self.frozen_features else self.method.merged(w)
        if merged is None:
            raise SvpError(
                f"{self.method_name} cannot be merged: it does more than replace weights",
                "save the adapter with save_pretrained() instead; it is a few MB",
            )
        for name, value in merged.items():
            owner, _, leaf = name.rpartition(".")
            setattr(net.get_submodule(owner), leaf, nn.Parameter(value.detach().clone()))
        net.head, net.num_classes, net.preprocessing = copy.deepcopy(self.head), self.num_classes, self.preprocessing
        net.stored_positions, net.weights_from = None, "merged"
        return net.requires_grad_(True).eval()

    def save_pretrained(self, folder: str | os.PathLike, card: str = "") -> Path:
        """Write adapter_config.json, adapter_model.safetensors and README.md; the folder appears whole or not at all.

        Raises SvpError when the folder holds something else than an adapter, or cannot be written.
        """
        from safetensors.torch import save  # save_file makes files that only their owner may read

        tensors = {name: t.detach().to("cpu").contiguous().clone() for name, t in self.state_dict().items()}
        return write_folder(Path(folder), {
            TENSORS: save(tensors, {"format": "pt"}),
            CONFIG: (json.dumps(self.config(), indent=2) + "\n").encode(),
            "README.md": model_card(self, card).encode(),
        })  # fmt: skip

    def config(self) -> dict[str, Any]:
        """All that `load` needs besides the tensors."""
        net, dtype = self.backbone, self.dtype
        return {
            "format": FORMAT,
            "svp_version": own_version(),
            "torch_version": str(torch.__version__),
            "methods": [{"name": name, "options": _plain(values)} for name, values in self.specs],
            "head": self.head_name,
            "num_classes": self.num_classes,
            "classes": list(self.classes) if self.classes else None,
            "backbone": {
                "name": net.name,
                "img_size": list(net.img_size),
                "weights": net.weights_from,
                "overrides": dict(net.overrides),
                "pos_resize": net.pos_resize,
                **({"seed": net.seed} if net.seed else {}),
                "fingerprint": net.fingerprint(),
                **({} if dtype == torch.float32 else {"dtype": str(dtype).removeprefix("torch.")}),
            },
            "preprocessing": self.preprocessing.as_dict(),
            "task": self.task,
        }

    def predict(self, paths: Any, batch_size: int = 32, top: int = 5) -> list[Prediction]:
        """Label pictures: paths of files or folders -> one Prediction each, preprocessing inside.

        Raises SvpError with the name of a picture that is missing or damaged.
        """
        from svp.data.pictures import read_picture
        from svp.data.sources import picture_files
        from svp.data.transforms import eval_transform

        files = picture_files([paths] if isinstance(paths, (str, os.PathLike)) else list(paths))
        transform = eval_transform(self.preprocessing)
        device = next(self.backbone.parameters()).device
        names = self.classes or tuple(str(i) for i in range(self.num_classes))
        training, found = self.training, []
        self.eval()
        try:
            for start in range(0, len(files), batch_size):
                batch = files[start : start + batch_size]
                images = torch.stack([transform(read_picture(path)) for path in batch]).to(device, self.dtype)
                with torch.inference_mode():
                    probabilities = self(images).float().softmax(-1).cpu()
                best, index = probabilities.topk(min(top, len(names)))
                for path, p, k in zip(batch, best.tolist(), index.tolist(), strict=True):
                    ranked = [(names[j], value) for j, value in zip(k, p, strict=True)]
                    found.append(Prediction(str(path), ranked[0][0], ranked[0][1], ranked))
        finally:
            self.train(training)
        return found


def model_card(model: AdaptedModel, card: str) -> str:
    """README.md of a saved adapter, with the front matter that Hugging Face tools show."""
    from svp.data.pictures import shown

    net = model.backbone
    classes = (
        f"\nClasses: {', '.join(map(shown, model.classes[:20]))}{' …' if len(model.classes) > 20 else ''}\n"
        if model.classes
        else ""
    )
    return (
        f"---\nlibrary_name: svp-vision\npipeline_tag: image-classification\ntags: [{model.method_name}, {net.name}]\n---\n\n"
        f"# {model.method_name} on {net.name}\n\n{model.num_trainable(head=True):,} trained numbers; {model.num_classes} classes; "
        f"pictures of {model.preprocessing.crop[0]} x {model.preprocessing.crop[1]} pixels.\n{classes}\n"
        '```python\nimport svp\nmodel = svp.load("this-folder")\nmodel.predict(["picture.jpg"])\n```\n'
        + (f"\n{card}\n" if card else "")
    )


def miscounted(names: Sequence[str], num_classes: int) -> SvpError:
    problem = f"{len(names)} class names were given for num_classes {num_classes}"
    return SvpError(problem, "one name for each class, in the order of their labels", "usage")


def _alike(names: list[tuple[str, nn.Parameter]]) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Parameters by their name without numbers: the same part of every block."""
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, p in names:
        groups.setdefault(".".join(part for part in name.split(".") if not part.isdigit()), []).append((name, p))
    return groups


def _noise(p: Tensor, generator: torch.Generator) -> Tensor:
    rms = p.detach().float().square().mean().sqrt().item() if p.numel() else 0.0
    scale = 0.02 * (1 + (rms if math.isfinite(rms) else 0.0))
    return (torch.randn(p.shape, generator=generator) * scale).to(p.device, p.dtype)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
