"""CLIP's text side: the name of a class becomes a point that projections of pictures are compared with (arXiv 2103.00020)."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svp.errors import SvpError
from svp.extras import need
from svp.methods._reprogram import SourceHead, reads_texts
from svp.ops.precision import exactly, wide

PLAIN = "This is a photo of a {}"  # arXiv 2203.17274; with a full stop it is the first of arXiv 2211.11635
MANY = 81  # how many texts arXiv 2211.11635 and 2310.08381 make of one class
NAMES = "ViT-B-32-quickgelu"  # which CLIP arXiv 2310.08381 compares names with
AT_ONCE = 256  # texts
OWN = "embeddings=FILE gives ones of your own"


def unfit_for_texts(site, path: str | None) -> str | None:
    """Why class names cannot be read beside this picture side, or None; a file of embeddings serves any projection."""
    if site.source_head is None:
        return f"{site.name} has no projection to embeddings of texts"
    if path is not None or text_side(site.name):
        return None
    quick = site.name.replace("_clip_", "_clip_quickgelu_")
    if text_side(quick):
        return f"{site.name} computes GELU where OpenAI's CLIP has QuickGELU; take {quick}, or embeddings=FILE"
    return f"which text side belongs to {site.name} is not known; {OWN}"


def text_side(name: str) -> str | None:
    """open_clip's name of the CLIP whose picture side timm calls `name`, or None where it is none of OpenAI's."""
    found = re.fullmatch(r"vit_(base|large)_patch(\d+)_clip_quickgelu_(\d+)\.openai", name)
    if found is None:
        return None
    size, patch, side = found.groups()
    return f"ViT-{size[0].upper()}-{patch}{'' if side == '224' else f'-{side}'}-quickgelu"


class TextHead(nn.Module):
    """feature (b, d) -> (b, K C): 100 times the cosine of its projection with each text, the C of the first template first.

    The projection is the frozen head of CLIP's picture side. `text` (K C, e) and `scale` (1,) are saved buffers, filled
    when they are needed first: from the file `path` with `target` and, where it is another, `scale`; else the names of
    the classes are read by CLIP's text side. A loaded adapter brings both along and needs neither.
    Raises SvpError, at that time, for a file that holds none and where there are no names.
    """

    text: Tensor
    scale: Tensor

    def __init__(self, site, classes: tuple[str, ...] | None, num_classes: int, each: int, path: str | None):
        super().__init__()
        self.projection = SourceHead(site.source_head)
        self.side, self.classes, self.each, self.path = text_side(site.name), classes, each, path
        self.filled, self.out_features = False, each * num_classes
        self.register_buffer("text", torch.zeros(self.out_features, self.projection.out_features))
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        if not self.filled:
            self.fill()
        z = self.projection(x)
        with exactly(z.device.type):  # a hundred times a cosine has too few digits in 16 bits
            cosine = F.normalize(wide(z), dim=-1) @ F.normalize(wide(self.text), dim=-1).T
            return wide(self.scale) * cosine

    @torch.no_grad()
    def fill(self) -> None:
        if self.path is not None:
            text, scale = texts_in(self.path, tuple(self.text.shape))
        else:
            if self.classes is None:
                raise SvpError("texts are made of class names, and none were given", f"classes=[…]; {OWN}", "usage")
            templates = (PLAIN,) if self.each == 1 else many()
            text, scale = read(refined(self.classes), templates, self.side), torch.tensor(100.0)
        self.text.copy_(text)
        self.scale.copy_(scale)
        self.filled = True

    def _save_to_state_dict(self, *args, **kwargs):
        if not self.filled:
            self.fill()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        self.filled = True
        super()._load_from_state_dict(*args, **kwargs)


def source_logits(site, classes: tuple[str, ...] | None, num_classes: int, path: str | None) -> SourceHead | TextHead:
    """feature (b, d) -> what a map or layer reads: the frozen classifier's logits, on CLIP those of many texts of each class."""
    return TextHead(site, classes, num_classes, MANY, path) if reads_texts(site) else SourceHead(site.source_head)


# -- texts -------------------------------------------------------------------------------------------------------------


def refined(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names as all released codes put them into a text."""
    return tuple(name.lower().replace("_", " ").replace("-", " ") for name in names)


def many() -> tuple[str, ...]:
    """81 templates: the plain one, then the 80 that CLIP was released with for ImageNet."""
    return (f"{PLAIN}.", *(template("{}") for template in _open_clip().OPENAI_IMAGENET_TEMPLATES))


def source_names(count: int) -> tuple[str, ...] | None:
    """The classes of an ImageNet head with `count` logits, as WordNet describes them, or None where it is none."""
    from timm.data import ImageNetInfo
    from timm.data.imagenet_info import infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": count})
    return None if subset is None else tuple(ImageNetInfo(subset).label_descriptions())


@functools.lru_cache(maxsize=4)
def read(names: tuple[str, ...], templates: tuple[str, ...], side: str) -> Tensor:
    """(K C, e): unit embeddings of every template with every name, those of the first template first.

    side   open_clip's name of a CLIP with OpenAI's weights, which are downloaded once
    Raises SvpError without open_clip or its weights.
    """
    open_clip = _open_clip()
    with torch.random.fork_rng(devices=[]):
        try:
            clip = open_clip.create_model(side, pretrained="openai").eval()
        except (OSError, RuntimeError) as err:  # no network, no such file, refused
            raise SvpError(
                f"OpenAI's weights of {side}, whose text side reads class names, could not be fetched: {_first(err)}",
                f"HF_HUB_CACHE=FOLDER with what another machine has fetched, or {OWN}", "env",
            ) from err  # fmt: skip
    words = open_clip.get_tokenizer(side)([template.format(name) for template in templates for name in names])
    with torch.inference_mode():
        found = torch.cat([clip.encode_text(part, normalize=True) for part in words.split(AT_ONCE)])
    return found.clone()


def _first(err: Exception) -> str:
    """The first sentence of what an error says."""
    return re.split(r"[.:]\s", str(err).strip())[0] or type(err).__name__


def _open_clip():
    return need("open_clip", extra="clip", why="reading class names as CLIP does")


# -- files -------------------------------------------------------------------------------------------------------------


def texts_in(path: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(embeddings of this shape, scale (1,)) of a file."""
    found = _tensors(path, "target")
    text, scale = found["target"].float(), found.get("scale", torch.tensor(100.0)).float().reshape(1)
    if text.shape != shape:
        raise SvpError(f"{path}: target is {tuple(text.shape)}, expected {shape}, a row for each text", kind="artefact")
    return text, scale


def names_in(path: str | os.PathLike, source: int, target: int) -> tuple[Tensor, Tensor]:
    """The tensors `source` (S, e) and `target` (C, e) of a file; raises SvpError when they are not there."""
    found = _tensors(path, "source", "target")
    a, b = found["source"], found["target"]
    if len(a) != source or len(b) != target or a.shape[1:] != b.shape[1:]:
        raise SvpError(
            f"{path} embeds {len(a)} source and {len(b)} of our classes, expected {source} and {target} of one width",
            "one row a class, in the order of the labels", "artefact",
        )  # fmt: skip
    return a, b


def _tensors(path: str | os.PathLike, *names: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).exists():
        raise SvpError(f"{path} with embeddings of the classes does not exist", OWN, "usage")
    try:
        found = load_file(path)
        missing = [name for name in names if name not in found]
    except (OSError, SafetensorError, RuntimeError) as err:
        raise SvpError(f"{path} gives no embeddings: {err}", "a .safetensors file", "artefact") from err
    if missing:
        raise SvpError(
            f"{path} gives no embeddings: it lacks {missing[0]}",
            f"a .safetensors file with {' and '.join(names)}",
            "artefact",
        )
    return found
