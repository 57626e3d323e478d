"""What methods share that reprogram a frozen classifier: raw pixels in a frame, its own head, maps between classes."""

from __future__ import annotations

import itertools
from typing import Any

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
    if reads_texts(site):
        return f"the head of {site.name} is a projection to text embeddings, not a classifier"
    return None


def reads_texts(site) -> bool:
    """Whether this is the picture side of CLIP: timm puts its projection where a classifier would be."""
    return site.source_head is not None and "_clip_" in site.name and "_ft_" not in site.name


class SourceHead(nn.Module):
    """feature (b, d) -> source logits (b, S). Frozen; not saved, as the backbone has it and its fingerprint covers it."""

    def __init__(self, source: nn.Linear):
        super().__init__()
        self.register_buffer("weight", source.weight.detach(), persistent=False)
        bias = source.bias
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)
        self.out_features = source.out_features

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)  # type: ignore[arg-type]


class LabelMap(nn.Module):
    """feature (b, d) -> logits (b, C): class j is the mean of the source logits map[j]; map (C, k) is a saved buffer.

    source gives the (b, S) logits, S its `out_features`. Raises SvpError when they are too few.
    """

    def __init__(self, source: Any, num_classes: int, each: int = 1):
        super().__init__()
        self.source = source
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
        found = greedy(frequencies(predicted, labels, self.source.out_features, classes), each)  # type: ignore[arg-type]
        self.map.copy_(found)  # type: ignore[operator]


def frequencies(predicted: Tensor, labels: Tensor, source: int, classes: int) -> Tensor:
    """(S, C) how often a picture of class c was taken for source class s; classes without pictures have a column too."""
    return torch.bincount(predicted * classes + labels, minlength=source * classes).reshape(source, classes)


def greedy(counts: Tensor, each: int) -> Tensor:
    """(S, C) counts -> (C, each) sources: the most frequent pair first, a source once; of equals the first in memory."""
    classes = counts.shape[1]
    chosen: list[list[int]] = [[] for _ in range(classes)]
    used = set()
    flat = counts.flatten()
    seen = flat.nonzero()[:, 0]  # far fewer than there are cells
    for cell in seen[flat[seen].argsort(descending=True, stable=True)].tolist():
        source, target = divmod(cell, classes)
        if source not in used and len(chosen[target]) < each:
            chosen[target].append(source)
            used.add(source)
    free = (source for source in range(len(counts)) if source not in used)
    # the cells that are left are equal: sources in their order go to the first class that lacks one
    for rest in chosen:
        rest += itertools.islice(free, each - len(rest))
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
