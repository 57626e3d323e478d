"""`create_backbone`: a registered network of any size, with random, shipped, published or local weights."""

from __future__ import annotations

import contextlib
import importlib
import numbers
import operator
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

from svp.backbones.base import Backbone, drawn_from, pair
from svp.backbones.checkpoints import Checkpoint, Report, load_into, read_checkpoint, shortened
from svp.errors import SvpError, unknown
from svp.registry import BACKBONES

FAMILIES = {"vim": "a Vision Mamba", "vit": "a ViT"}
OPTIONAL: dict[str, Any] = {  # functions that a family's file may have, and what holds without them
    "published": lambda name: None,  # (hub repository, its files) of the weights "default"
    "renamed": lambda tensors: tensors,  # a checkpoint's tensors under our names
    "recognise": lambda tensors: {},  # the sizes that they make, None: of another network
    "compared": lambda name, sizes: {},  # the sizes that must be those
}
POS_RESIZE = ("middle", "repo")
KERNELS = ("auto", "reference", "cpu", "triton")


def create_backbone(
    name: str,
    *,
    weights: str | os.PathLike | None = None,
    img_size: int | tuple[int, int] | None = None,
    kernel: str = "auto",
    seed: int = 0,
    pos_resize: str = "middle",
    trust_pickle: bool = False,
    **overrides: Any,
) -> Backbone:
    """A backbone by its registered name, in evaluation mode.

    weights    None: random, from `seed`; "default": what ships with the package, else the published file from the
               Hugging Face hub; a local .pth, .pt or .safetensors file; "hf:OWNER/NAME[/file]"
    img_size   pixels, int or (H, W); None: the size it was trained with. The position table is resized to it.
    kernel     "auto", "reference", "cpu" or "triton": which scan answers; a named one never falls back
    overrides  keywords of the family, for example depth=2, embed_dim=32
    Raises SvpError for unknown names and keywords, and for files that do not fit, naming the backbone they would fit.
    """
    module = family_of(name)
    for what, given, known in (("kernel", kernel, KERNELS), ("pos_resize", pos_resize, POS_RESIZE)):
        if given not in known:
            raise unknown(what, given, known)
    # numpy's integers are integers, too
    overrides = {
        k: int(v) if isinstance(v, numbers.Integral) and not isinstance(v, bool) else v for k, v in overrides.items()
    }
    seed = operator.index(seed)
    sizes = {**module.VARIANTS.get(name, {}), **overrides}
    if img_size is not None:
        sizes["img_size"] = pair(img_size)
    found = None if weights is None else read_checkpoint(weights_file(name, str(weights)), trust_pickle=trust_pickle)
    if found is not None:
        found.tensors = part_of(module, "renamed")(found.tensors)
    try:
        sizes = sizes if found is None else _fitted(name, module, sizes, found, overrides)
        with drawn_from(seed):
            net = family_class(module)(name, **sizes)
    except TypeError as err:
        raise SvpError(f"{name}: {str(err).split('() ')[-1]}", f"svp list backbones {name}", "usage") from err
    net.kernel, net.pos_resize, net.seed = kernel, pos_resize, seed
    net.overrides = {k: list(v) if isinstance(v, tuple) else v for k, v in overrides.items()}
    net.report = Report()
    if found is not None:
        net.report = load_into(net, found, pos_resize)
        net.weights_from = str(weights)
    return net.eval()


def family_of(name: str) -> Any:
    """The module of a registered name; one that timm may know as a ViT belongs to the family vit."""
    if name not in BACKBONES.entries() and re.match(r"(vit|deit3?)_", name):
        return importlib.import_module("svp.backbones.vit")
    return BACKBONES.get(name).load()


def family_class(module: Any) -> type[Backbone]:
    """The Backbone subclass that a family's file defines."""
    kinds = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, Backbone)]
    return next(kind for kind in kinds if kind.__module__ == module.__name__)


def part_of(module: Any, name: str) -> Any:
    """A function of a family's file, or what holds where it has none."""
    return getattr(module, name, OPTIONAL[name])


def weights_file(name: str, weights: str) -> Path:
    """The local file of a `weights` text; hub files are fetched into the hub's cache."""
    if weights == "default":
        shipped = shipped_weights(name)
        if shipped is not None:
            return shipped
        published = part_of(family_of(name), "published")(name)
        if published is None:
            raise SvpError(
                f"no weights ship with {name} and none are published",
                "--weights none (in Python None) for random ones",
                "artefact",
            )
        return from_hub(*published)
    if weights.startswith("hf:"):
        owner, _, rest = weights[3:].partition("/")
        repository, _, file = rest.partition("/")
        if not owner or not repository:
            raise SvpError(
                f"weights '{weights}' is not hf:OWNER/NAME or hf:OWNER/NAME/FILE",
                "hf:hustvl/Vim-small-midclstok/vim_s_midclstok_80p5acc.pth",
                "usage",
            )
        return from_hub(f"{owner}/{repository}", file or "model.safetensors")
    if weights in ("none", "random"):
        raise SvpError(f"the checkpoint {weights} does not exist", "leave weights out for random ones", "artefact")
    return Path(weights)


def shipped_weights(name: str) -> Path | None:
    """The file inside the package, or None."""
    with contextlib.suppress(FileNotFoundError, ModuleNotFoundError):
        path = Path(str(resources.files("svp") / "weights" / f"{name}.safetensors"))
        return path if path.is_file() else None
    return None


def from_hub(repository: str, *files: str) -> Path:
    """The first of these files that a repository of the Hugging Face hub has, from its cache when it is there.

    HF_HUB_OFFLINE is honoured.
    """
    hub = importlib.import_module("huggingface_hub")
    for name in files:
        cached = hub.try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return Path(cached)
    file, *others = files
    address = f"https://huggingface.co/{repository}/resolve/main/{file}"
    try:
        return Path(hub.hf_hub_download(repository, file))
    except Exception as err:  # the hub raises many kinds: no network, no such file, refused
        is_absent = isinstance(err, hub.errors.EntryNotFoundError) and not isinstance(
            err, hub.errors.LocalEntryNotFoundError
        )
        if is_absent and others:
            return from_hub(repository, *others)
        reason = str(err).strip().split("\n")[0] or type(err).__name__
        raise SvpError(
            f"{file} of {repository} could not be fetched: {reason}",
            f"download {address} yourself and give it with --weights {file}", "env",
        ) from err  # fmt: skip


def _fitted(
    name: str, module: Any, sizes: dict[str, Any], found: Checkpoint, overrides: dict[str, Any]
) -> dict[str, Any]:
    """The sizes with the file's class count; raises when the file is of another network, naming the one it fits."""
    seen, compared = part_of(module, "recognise")(found.tensors), part_of(module, "compared")
    if seen is None:
        raise SvpError(
            f"{found.path} does not look like {name}: it holds {looks_like(found.tensors)}",
            f"its tensors: {shortened(found.tensors)}; `svp list backbones` shows what is known", "artefact",
        )  # fmt: skip
    free = [key for key in ("num_classes", "d_state") if key in seen and key not in overrides]  # as the file has them
    wanted = {key: value for key, value in compared(name, sizes).items() if key not in free}
    wrong = [k for k, v in wanted.items() if k in seen and v is not None and seen[k] != v]
    if wrong:
        fits = [
            other
            for other, row in module.VARIANTS.items()
            if all(seen.get(k, v) == v for k, v in compared(other, row).items() if v is not None)
        ]
        hint = f"the file fits {' or '.join(fits[:3])}: --backbone {fits[0]}" if fits else f"its sizes: {words(seen)}"
        said = " and ".join(f"{k} {seen[k]}" for k in wrong)
        raise SvpError(
            f"{found.path} has {said}, {name} needs {' and '.join(str(wanted[k]) for k in wrong)}", hint, "artefact"
        )
    return {**sizes, **{key: seen[key] for key in free}}


def looks_like(tensors: dict[str, Any]) -> str:
    """What network these tensors make, as a person reads it."""
    for family in FAMILIES:
        module = importlib.import_module(f"svp.backbones.{family}")
        seen = module.recognise(part_of(module, "renamed")(tensors))
        if seen is not None:
            return f"{FAMILIES[family]} of {words(seen)}"
    return "no network of this package"


def words(sizes: dict[str, Any]) -> str:
    """Recognised sizes as a person reads them."""
    return ", ".join(f"{key} {value}" for key, value in sizes.items())
