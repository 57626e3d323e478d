"""AdaptedModel = frozen backbone + method + head: made by `adapt`, probed, saved, loaded, used."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svp.backbones.base import Backbone, drawn_from
from svp.backbones.create import create_backbone
from svp.errors import SvpError
from svp.extras import own_version
from svp.methods.base import Method, Several, options_of, parts_of
from svp.preprocessing import Preprocessing
from svp.registry import method_class
from svp.seams import SEAMS

FORMAT = 1  # of a saved adapter
HEADS = ("linear", "two_linear")
MethodSpec = str | tuple[str, dict[str, Any]]


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
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes in the order of the logits. Set to another number of names than num_classes it raises SvpError."""
        return self._classes

    @classes.setter
    def classes(self, names: Sequence[str] | None) -> None:
        if names is not None and len(names) != self.num_classes:
            raise _miscounted(names, self.num_classes)
        self._classes = None if names is None else tuple(names)

    def forward(self, images: Tensor) -> Tensor:
        """images (b, 3, H, W) -> logits (b, num_classes)."""
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """images (b, 3, H, W) -> feature (b, d), the head's input."""
        rate = self.drop_path if self.training else 0.0
        self.backbone.check_images(images, any_size=self._resizes)
        if self._disabled:
            with torch.no_grad():
                return self.backbone.features(images)
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
        lines = [f"{name} on {self.backbone.name}: {self.num_trainable():,} + head {self.num_trainable(True) - self.num_trainable():,} "
                 f"numbers train, {frozen:,} are frozen ({self.num_trainable(True) / frozen:.2%})"]  # fmt: skip
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
        return net.requires_grad_(True)

    def save_pretrained(self, folder: str | os.PathLike, card: str = "") -> Path:
        """Write adapter_config.json, adapter_model.safetensors and README.md; the folder appears whole or not at all.

        Raises SvpError when the folder holds something else than an adapter, or cannot be written.
        """
        from safetensors.torch import save  # save_file makes files that only their owner may read

        tensors = {name: t.detach().to("cpu").contiguous().clone() for name, t in self.state_dict().items()}
        return write_folder(Path(folder), {
            "adapter_model.safetensors": save(tensors, {"format": "pt"}),
            "adapter_config.json": (json.dumps(self.config(), indent=2) + "\n").encode(),
            "README.md": model_card(self, card).encode(),
        })  # fmt: skip

    def config(self) -> dict[str, Any]:
        """All that `load` needs besides the tensors."""
        net, dtype = self.backbone, next(self.backbone.parameters()).dtype
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
                "overrides": getattr(net, "overrides", {}),
                "pos_resize": getattr(net, "pos_resize", "middle"),
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
                images = torch.stack([transform(read_picture(path)) for path in batch]).to(device)
                with torch.inference_mode():
                    probabilities = self(images).float().softmax(-1).cpu()
                best, index = probabilities.topk(min(top, len(names)))
                for path, p, k in zip(batch, best.tolist(), index.tolist(), strict=True):
                    ranked = [(names[j], value) for j, value in zip(k, p, strict=True)]
                    found.append(Prediction(str(path), ranked[0][0], ranked[0][1], ranked))
        finally:
            self.train(training)
        return found


# -- making ------------------------------------------------------------------------------------------------------------


def adapt(
    backbone: Backbone,
    method: MethodSpec | Sequence[MethodSpec],
    *,
    num_classes: int,
    head: str | nn.Module = "linear",
    classes: Sequence[str] | None = None,
    seed: int = 0,
    probe: bool = True,
    **options: Any,
) -> AdaptedModel:
    """A backbone with a method and a new head; start values come from `seed`, the global generators are left alone.

    method   a name, or a list that composes: ["svp", ("lora", {"rank": 8})]; `options` belong to a single method
    head     "linear"; "two_linear" (d -> d // 2 -> classes, no activation between); or a module feature -> logits, with
             which an adapter is saved but not loaded: build it again and use load_state_dict
    probe    run the effect probe (`AdaptedModel.probe`)
    Raises SvpError for an unknown method or option, one that cannot act on this backbone, or tensors without effect.
    """
    if not isinstance(num_classes, int) or num_classes < 2:
        raise SvpError(f"num_classes is {num_classes}, expected at least 2", "num_classes=data.num_classes", "usage")
    if classes is not None and len(classes) != num_classes:
        raise _miscounted(classes, num_classes)
    specs = _specs(method, options)
    site = backbone.site()
    with drawn_from(seed):
        parts = [(name, _build(name, values, site, num_classes)) for name, values in specs]
        for _, part in parts:
            part.classes = tuple(classes) if classes is not None else None
        joined = parts[0][1] if len(parts) == 1 else Several(parts)
        torch.manual_seed(seed)  # again: a head's start values are the same whatever the method drew
        own = joined.make_head(site, num_classes)
        head = "linear" if isinstance(head, str) and head == "method" else head  # as a run of such a method says it
        if own is not None and head != "linear":
            said = f"'{head}'" if isinstance(head, str) else type(head).__name__
            raise SvpError(f"{'+'.join(n for n, _ in specs)} brings a head of its own, beside which head {said} has no place",
                           "leave head out", "usage")  # fmt: skip
        hidden = next((name for name, part in parts if hasattr(part.opt, "head")), None)  # by adapt's own keyword
        made = own if own is not None else _head(head, backbone.num_features, num_classes, hidden)
    head_name = "method" if own is not None else head if isinstance(head, str) else "module"
    specs = [(name, dataclasses.asdict(part.opt)) for name, part in parts]
    model = AdaptedModel(backbone, joined, made, specs, head_name)
    p = next(backbone.parameters())
    model.method.to(p.device, p.dtype)
    model.head.to(p.device, p.dtype)
    backbone.eval()
    model.classes = classes
    if probe:
        model.probe(seed)
    return model


def load(
    folder: str | os.PathLike,
    backbone: Backbone | None = None,
    *,
    weights: str | None = None,
    device: str | None = None,
    kernel: str = "auto",
) -> AdaptedModel:
    """The adapter in `folder` (or the run folder that holds one), on `backbone` or on the one that it names.

    weights, kernel  of the backbone that it names; None: the weights it was trained on
    device           None: where `backbone` is, else the CPU. A given backbone moves along, and with it its other adapters.
    Raises SvpError when files are missing or damaged, sizes disagree, or the backbone is not the one it was trained on.
    """
    folder = _adapter_folder(Path(folder))
    config = read_json(folder / "adapter_config.json")
    if "format" not in config:
        raise SvpError(
            f"{folder} was not written by svp: its adapter_config.json has no 'format'",
            f"svp convert {folder} OUT-FOLDER --backbone NAME --weights FILE, for a LoRA of another program", "artefact",
        )  # fmt: skip
    try:
        if config["format"] > FORMAT:
            raise SvpError(
                f"{folder} was written by svp {config['svp_version']}, this is {own_version()}",
                "pip install -U svp-vision",
                "artefact",
            )
        named = config["backbone"]
        specs = [(m["name"], m["options"]) for m in config["methods"]]
        if backbone is None:
            backbone = _named_backbone(folder, named, weights, kernel)
        _same_backbone(folder, named, backbone)
        if config["head"] == "module":
            raise SvpError(
                f"{folder} was saved with a head module of its own",
                "build it with svp.adapt and load_state_dict",
                "artefact",
            )
        spec = [(name, dict(values)) for name, values in specs]
        head = "linear" if config["head"] == "method" else config["head"]
        try:
            model = adapt(
                backbone, spec, num_classes=config["num_classes"], head=head, classes=config["classes"], probe=False
            )
        except SvpError as err:
            hint = "the file was changed by hand, or is of a svp that took these options otherwise; copy it again, or train again"
            raise SvpError(f"{folder / 'adapter_config.json'}: {err.problem}", hint, "artefact") from err
        prepared = Preprocessing.from_dict(config["preprocessing"])
        if (prepared.mean, prepared.std) != (model.preprocessing.mean, model.preprocessing.std):
            raise SvpError(
                f"{folder} was saved by an earlier svp, whose {model.method_name} took pictures prepared otherwise",
                "train it again", "artefact",
            )  # fmt: skip
        model.preprocessing = prepared
        model.task = config["task"]
    except (KeyError, TypeError, ValueError) as err:
        raise SvpError(
            f"{folder / 'adapter_config.json'}: the field {err} is missing or wrong",
            "save the adapter again",
            "artefact",
        ) from err
    for part in model.modules():
        if hasattr(part, "filled"):  # what it would read when first needed is in the adapter
            part.filled = True  # type: ignore[assignment]
    _fill(model, folder / "adapter_model.safetensors")
    return (model if device is None else model.to(device)).eval()


def _named_backbone(folder: Path, named: dict[str, Any], weights: str | None, kernel: str) -> Backbone:
    """The backbone that an adapter was trained on; random weights are drawn again, which its fingerprint proves."""
    source = str(weights or named["weights"])
    if source == "merged":
        raise SvpError(
            f"{folder} was trained on a backbone with merged weights, which no file holds", "give backbone=", "artefact"
        )
    net = create_backbone(
        named["name"], weights=None if source in ("random", "none") else weights or weights_beside(folder, source),
        img_size=tuple(named["img_size"]), kernel=kernel, pos_resize=named.get("pos_resize", "middle"), **named["overrides"],
    )  # fmt: skip
    return net if "dtype" not in named else net.to(getattr(torch, named["dtype"]))


def _same_backbone(folder: Path, named: dict[str, Any], net: Backbone) -> None:
    """Raises SvpError where a backbone is not the one that an adapter was trained on."""
    found, wanted = net.fingerprint(), named["fingerprint"]
    if found != wanted:
        p = next(net.parameters())
        is_lost = named["weights"] in ("random", "merged")
        hint = (
            "give the backbone it was trained on with backbone="
            if is_lost
            else "give the weights it was trained on with weights="
        )
        if p.dtype not in (torch.float32, torch.float64):
            hint += f"; {str(p.dtype).removeprefix('torch.')} rounds them: load first, then change the type"
        raise SvpError(
            f"{folder} was trained on {named['name']} {wanted[:12]} ({named['weights']}), "
            f"this backbone is {net.name} {found[:12]} ({net.weights_from})", hint, "artefact",
        )  # fmt: skip
    if tuple(named["img_size"]) != net.img_size:
        (h, w), size = named["img_size"], net.img_size
        raise SvpError(
            f"{folder} was trained on pictures of {h} x {w} pixels, this backbone takes {size[0]} x {size[1]}",
            f'create_backbone("{net.name}", img_size=({h}, {w}))', "artefact",
        )  # fmt: skip
    way, is_resized = named.get("pos_resize", "middle"), net.stored_positions is not None
    if is_resized and getattr(net, "pos_resize", "middle") != way:
        raise SvpError(
            f'{folder} was trained with positions resized by "{way}", those of this backbone are by "{net.pos_resize}"',
            f'create_backbone(…, pos_resize="{way}")', "artefact",
        )  # fmt: skip


def weights_beside(folder: Path, known: str) -> str:
    """The weights that an adapter names, or where they have moved, the file of that name in its folder."""
    if known in ("random", "merged", "none", "default") or known.startswith("hf:") or Path(known).exists():
        return known
    beside = folder / Path(known).name
    if beside.exists():
        return str(beside)
    raise SvpError(
        f"{folder} was trained on the weights {known}, which are not there",
        "give the file: weights=FILE, on the command line --weights FILE", "artefact",
    )  # fmt: skip


def predict(
    model: AdaptedModel | str | os.PathLike, paths: Any, *, batch_size: int = 32, top: int = 5
) -> list[Prediction]:
    """Label pictures (files or folders) with a model, or with the adapter in a folder.

    Raises SvpError with the name of a picture that is missing or damaged, and what `load` raises.
    """
    found = model if isinstance(model, AdaptedModel) else load(model)
    return found.predict(paths, batch_size=batch_size, top=top)


def _fill(model: AdaptedModel, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as err:
        raise SvpError(
            f"{path} cannot be read: {err}", "the file is damaged; save or copy the adapter again", "artefact"
        ) from err
    own = model.state_dict()
    for name in own.keys() ^ tensors.keys():
        where = "lacks" if name in own else "has a tensor that the adapter does not know:"
        raise SvpError(
            f"{path} {where} {name}", "adapter_config.json and the tensors do not belong together", "artefact"
        )
    for name, value in tensors.items():
        if own[name].shape != value.shape:
            raise SvpError(
                f"{path}: {name} is {tuple(value.shape)}, adapter_config.json makes it {tuple(own[name].shape)}",
                "the two files do not belong together; copy the adapter again", "artefact",
            )  # fmt: skip
        if not torch.isfinite(value).all():
            raise SvpError(
                f"{path}: {name} holds numbers that are not finite", "the training diverged; train again", "artefact"
            )
    model.load_state_dict(tensors)


def _adapter_folder(folder: Path) -> Path:
    for candidate in (folder, folder / "model"):
        if (candidate / "adapter_config.json").is_file():
            if not (candidate / "adapter_model.safetensors").is_file():
                raise SvpError(
                    f"{candidate} has no adapter_model.safetensors",
                    "the adapter is incomplete; copy it again",
                    "artefact",
                )
            return candidate
    what = "does not exist" if not folder.exists() else "holds no adapter (adapter_config.json)"
    raise SvpError(f"{folder} {what}", "give a run folder of `svp train`, or what save_pretrained wrote", "artefact")


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    """An adapter folder of these files, in place of an older one; it appears whole, or the older one stays.

    Raises SvpError when it holds something else than an adapter, or cannot be written. What else lies in the older one, for example the weights of a converted backbone, lies in the new one too.
    """
    folder = folder.resolve()
    old = folder.with_name(f".{folder.name}-old-{os.getpid()}")
    work = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and not (folder / "adapter_config.json").exists() and any(folder.iterdir()):
            raise SvpError(f"{folder} exists and is no adapter folder", "choose another name", kind="artefact")
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        for name, content in files.items():
            (work / name).write_bytes(content)
        work.chmod(0o755)
        if folder.exists():
            for path in folder.iterdir():
                if path.name not in files:
                    _beside(path, work / path.name)
            folder.rename(old)
        work.rename(folder)
    except BaseException as err:
        if old.exists() and not folder.exists():
            old.rename(folder)
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        if not isinstance(err, OSError):
            raise
        problem = f"{folder} cannot be written: {err.strerror or err}"
        raise SvpError(problem, "check the folder and the space on its disk", "env") from err
    shutil.rmtree(old, ignore_errors=True)
    return folder


def _beside(path: Path, new: Path) -> None:
    """A file or folder under another name, without another copy of the bytes where the file system can do that."""
    if path.is_dir() and not path.is_symlink():
        shutil.copytree(path, new, symlinks=True, copy_function=_link)
    else:
        _link(path, new)


def _link(path: str | Path, new: str | Path, **_: Any) -> None:
    try:
        os.link(path, new, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(path, new, follow_symlinks=False)


def read_json(path: Path, limit: int = 10_000_000) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes; raises SvpError when it is none."""
    try:
        if path.stat().st_size > limit:
            raise SvpError(f"{path} has {path.stat().st_size:,} bytes, at most {limit:,} are read", kind="artefact")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise SvpError(f"{path} is no JSON file: {err}", "the file is damaged; copy it again", "artefact") from err
    if not isinstance(value, dict):
        raise SvpError(
            f"{path} holds {type(value).__name__}, expected an object", "the file is damaged; copy it again", "artefact"
        )
    return value


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
        f"# {model.method_name} on {net.name}\n\n{model.num_trainable(True):,} trained numbers; {model.num_classes} classes; "
        f"pictures of {model.preprocessing.crop[0]} x {model.preprocessing.crop[1]} pixels.\n{classes}\n"
        '```python\nimport svp\nmodel = svp.load("this-folder")\nmodel.predict(["picture.jpg"])\n```\n'
        + (f"\n{card}\n" if card else "")
    )


def _miscounted(names: Sequence[str], num_classes: int) -> SvpError:
    problem = f"{len(names)} class names were given for num_classes {num_classes}"
    return SvpError(problem, "one name for each class, in the order of their labels", "usage")


def _specs(method: MethodSpec | Sequence[MethodSpec], options: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    single = isinstance(method, str) or (isinstance(method, tuple) and len(method) == 2 and isinstance(method[1], dict))
    specs: list[Any] = [method] if single else list(method)
    pairs = [(spec, {}) if isinstance(spec, str) else (spec[0], dict(spec[1])) for spec in specs]
    if not pairs:
        raise SvpError("no method was given", 'for example "svp"', kind="usage")
    if len({name for name, _ in pairs}) < len(pairs):
        raise SvpError(
            f"a method stands twice in {'+'.join(n for n, _ in pairs)}", "name each method once", kind="usage"
        )
    if options and len(pairs) > 1:
        raise SvpError(
            f"option {next(iter(options))} belongs to no single method",
            '("name", {"option": value}) pairs',
            kind="usage",
        )
    return [(name, {**values, **options}) for name, values in pairs]


def _build(name: str, values: dict[str, Any], site: Any, num_classes: int) -> Method:
    cls: type[Method] = method_class(name)
    opt = options_of(cls, values, name)
    reason = cls.unfit(site, opt)
    if reason:
        raise SvpError(f"{name} cannot act on {site.name}: {reason}", f"svp list methods {name}", kind="usage")
    return cls(site, opt, num_classes)


def _head(head: str | nn.Module, d: int, num_classes: int, hidden: str | None = None) -> nn.Module:
    if isinstance(head, nn.Module):
        return head
    if head not in HEADS:
        hint = f'("{hidden}", {{"head": "{head}"}}) is the option of {hidden}' if hidden else "--head linear"
        raise SvpError(f"head is '{head}', expected {' or '.join(HEADS)}", hint, kind="usage")
    layers = [nn.Linear(d, num_classes)] if head == "linear" else [nn.Linear(d, d // 2), nn.Linear(d // 2, num_classes)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


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
