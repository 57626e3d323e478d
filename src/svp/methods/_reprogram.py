"""What methods share that reprogram a frozen classifier: raw pixels in a frame, its own head, maps between classes."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svp.errors import SvpError

# -- pixels ------------------------------------------------------------------------------------------------------------


def inner_side(site) -> int:
    """Pixels of a picture inside its frame: 128 of 224 (arXiv 2310.08381, 2211.11635); elsewhere in proportion: ours."""
    return max(1, round(128 * site.img_size[0] / 224))


def fitted(images: Tensor, size: int) -> Tensor:
    """Pictures of another size than (b, 3, size, size), resized to it as the released codes do: bilinear, antialiased."""
    if images.shape[2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def padded(images: Tensor, side: int) -> Tensor:
    """(b, 3, s, s) -> (b, 3, side, side): zeros around; an odd pixel goes to the left and the top."""
    room = side - images.shape[-1]
    first, last = (room + 1) // 2, room // 2
    return F.pad(images, (first, last, first, last))


def frame_mask(side: int, inner: Tensor | int, first: Tensor | int, like: Tensor) -> Tensor:
    """(side, side): 0 on the rows and columns first … first + inner - 1, 1 around them."""
    at = torch.arange(side, device=like.device)
    inside = (at >= first) & (at < first + inner)
    return 1 - (inside[:, None] & inside[None, :]).to(like.dtype)


class Normalise(nn.Module):
    """Raw pixels in 0…1 -> what the frozen network was trained on."""

    mean: Tensor
    std: Tensor

    def __init__(self, site):
        super().__init__()
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(site, name)).reshape(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


# -- classes -----------------------------------------------------------------------------------------------------------


def no_source_classes(site) -> str | None:
    """Why no class of this network can stand for one of ours, or None."""
    if site.source_head is None:
        return f"{site.name} has no source head whose classes could be mapped"
    if "_clip_" in site.name and "_ft_" not in site.name:  # timm puts CLIP's projection where a head would be
        return f"the head of {site.name} is a projection to text embeddings, not a classifier"
    return None


class SourceHead(nn.Module):
    """feature (b, d) -> source logits (b, S). Frozen; not saved, as the backbone has it and its fingerprint covers it."""

    def __init__(self, source: nn.Linear):
        super().__init__()
        self.register_buffer("weight", source.weight.detach(), persistent=False)
        bias = source.bias
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)  # type: ignore[arg-type]


class LabelMap(nn.Module):
    """feature (b, d) -> logits (b, C): class j is the mean of the source logits map[j]; map (C, k) is a saved buffer."""

    def __init__(self, source: nn.Linear, num_classes: int, each: int = 1):
        super().__init__()
        self.source = SourceHead(source)
        if each * num_classes > source.out_features:
            raise SvpError(
                f"{each} source classes for each of {num_classes} are more than the {source.out_features} of the backbone",
                "fewer sources a class, or another backbone", kind="usage",
            )  # fmt: skip
        self.register_buffer("map", torch.arange(each * num_classes).reshape(num_classes, each))

    def forward(self, x: Tensor) -> Tensor:
        return self.source(x)[:, self.map].mean(-1)

    @torch.no_grad()
    def renew(self, run) -> None:
        """Map by frequency: what the frozen head says of the training pictures, as they are prompted now."""
        classes, each = self.map.shape  # type: ignore[operator, misc]
        model, training = run.model, run.model.training
        model.eval()
        said = [(self.source(model.features(images)).argmax(-1), labels) for images, labels, _ in run.batches("train")]
        model.train(training)
        predicted, labels = (torch.cat(part) for part in zip(*said, strict=True))
        found = greedy(frequencies(predicted, labels, len(self.source.weight), classes), each)  # type: ignore[arg-type]
        self.map.copy_(found)  # type: ignore[operator]


class TextHead(nn.Module):
    """feature (b, d) -> logits (b, C): the cosine of its projection with an embedding of each class's text, times a scale.

    The projection is the frozen head of a CLIP tower; the embeddings are a saved buffer, so that an adapter needs its file
    once. Raises SvpError for a file that holds none, and when it is used without.
    """

    text: Tensor
    scale: Tensor

    def __init__(self, source: nn.Linear, num_classes: int, path: str):
        super().__init__()
        self.projection = SourceHead(source)
        self.missing = None if Path(path).exists() else path  # a loaded adapter brings its own
        shape = (num_classes, source.out_features)
        text, scale = (torch.zeros(shape), torch.ones(1)) if self.missing else texts_in(path, shape)
        self.register_buffer("text", text)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.missing:
            raise SvpError(
                f"{self.missing} with embeddings of the classes does not exist", "-s vp.embeddings=FILE", "usage"
            )
        return self.scale * F.normalize(self.projection(x), dim=-1) @ F.normalize(self.text, dim=-1).T

    def _load_from_state_dict(self, *args, **kwargs):
        self.missing = None
        super()._load_from_state_dict(*args, **kwargs)


def texts_in(path: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(embeddings (C, e), scale (1,)) of a file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
        text, scale = found["target"].float(), found.get("scale", torch.tensor(100.0)).float().reshape(1)
    except (OSError, SafetensorError, KeyError, RuntimeError) as err:
        raise SvpError(
            f"{path} holds no embeddings of texts: {err}", "a .safetensors file with `target`", "artefact"
        ) from err
    if text.shape != shape:
        raise SvpError(
            f"{path}: target is {tuple(text.shape)}, expected {shape}, a row for each class", kind="artefact"
        )
    return text, scale


def frequencies(predicted: Tensor, labels: Tensor, source: int, classes: int) -> Tensor:
    """(S, C) how often a picture of class c was taken for source class s; classes without pictures have a column too."""
    return torch.bincount(predicted * classes + labels, minlength=source * classes).reshape(source, classes)


def greedy(counts: Tensor, each: int) -> Tensor:
    """(S, C) counts -> (C, each) sources: the most frequent pair first, a source once; of equals the first in memory."""
    classes = counts.shape[1]
    chosen: list[list[int]] = [[] for _ in range(classes)]
    used, missing = set(), each * classes
    for cell in counts.flatten().argsort(descending=True, stable=True).tolist():
        source, target = divmod(cell, classes)
        if source in used or len(chosen[target]) == each:
            continue
        chosen[target].append(source)
        used.add(source)
        missing -= 1
        if not missing:
            break
    return torch.tensor(chosen, device=counts.device)


def by_meaning(source: Tensor, target: Tensor, each: int) -> Tensor:
    """Embeddings of class names (S, e), (C, e) -> (C, each) sources: rounds in which every class takes its nearest unused."""
    near = F.normalize(target, dim=-1) @ F.normalize(source, dim=-1).T  # (C, S)
    chosen = []
    for _ in range(each):
        for row in range(len(target)):
            best = near[row].argmax()
            near[:, best] = -torch.inf
            chosen.append(best)
    return torch.stack(chosen).reshape(each, -1).T.contiguous()
