"""Visual Prompting: a trained frame or patch of pixels on every picture (arXiv 2203.17274)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from svp.methods._reprogram import LabelMap, SourceHead, no_source_classes
from svp.methods._texts import TextHead, unfit_for_texts
from svp.methods.base import Method
from svp.options import option


class VP(Method):
    """images + P, after normalisation; the feature goes to a head as `adapt` makes it, or to the source head's logits.

    padding       a frame of width q (30 of 224 pixels): up and down span the width and own the corners
    fixed_patch   q x q pixels in the top left corner
    random_patch  q x q pixels at a place drawn once a batch in training; in the middle in evaluation (published: drawn too)
    head "source" is the published reprogramming: class j reads logit j of the pre-trained head, and nothing else trains;
    "text" the published form on CLIP: class j reads the cosine between the picture's projection and "This is a photo of a
    NAME", times 100; "new" trains a head too, as the comparison tables of later papers do.
    Ours: away from 224 pixels q is round(30 side / 224).
    Source: arXiv 2203.17274; repository hjbahng/visual_prompting, models/prompters.py.
    """

    @dataclass(frozen=True)
    class Options:
        kind: Literal["padding", "fixed_patch", "random_patch"] = option("padding", "where the pixels are")
        size: int | None = option(None, "q in pixels; none: round(30 side / 224)", low=1)
        head: Literal["new", "source", "text"] = option(
            "new", "a trained head, the first logits of the pre-trained one, or CLIP's cosine with texts"
        )
        embeddings: str | None = option(
            None, "text: a .safetensors file with `target`, a row for each class; none: CLIP reads their names"
        )
        patch_range: Literal["clean", "published"] = option(
            "clean", "published: random places leave out the last row and column"
        )
        random_at_eval: bool = option(False, "published: random places in evaluation too")

    PRESETS = {"published": dict(head="source", patch_range="published", random_at_eval=True)}
    paper = "arXiv 2203.17274"
    params_formula = "padding: 12 q (side - q); patches: 3 q²"
    default_lr = 1e-1

    @classmethod
    def unfit(cls, site, opt):
        if opt.head == "source" and no_source_classes(site):
            return no_source_classes(site)
        if opt.head == "text" and unfit_for_texts(site, opt.embeddings):
            return unfit_for_texts(site, opt.embeddings)
        if opt.head != "text" and opt.embeddings is not None:
            return f'embeddings are of texts, which head "{opt.head}" does not read'
        q, side = size_of(site, opt), min(site.img_size)
        if (2 * q >= side) if opt.kind == "padding" else q > side:
            return f"size {q} leaves nothing of pictures of {side} pixels"
        return None

    def __init__(self, site, opt, num_classes):
        super().__init__(site, opt, num_classes)
        (h, w), q = site.img_size, size_of(site, opt)
        self.side, self.q = (h, w), q
        if opt.kind == "padding":
            self.up, self.down = nn.Parameter(torch.randn(1, 3, q, w)), nn.Parameter(torch.randn(1, 3, q, w))
            self.left, self.right = (nn.Parameter(torch.randn(1, 3, h - 2 * q, q)) for _ in range(2))
        else:
            self.patch = nn.Parameter(torch.randn(1, 3, q, q))

    def make_head(self, site, num_classes):
        if self.opt.head == "text":
            return TextHead(site, self.classes, num_classes, 1, self.opt.embeddings)
        return LabelMap(SourceHead(site.source_head), num_classes) if self.opt.head == "source" else None

    def network(self, images, run):
        return run(images + self.prompt().to(images.dtype))[0]

    def prompt(self, place: tuple[int, int] | None = None) -> Tensor:
        """(1, 3, H, W): the pixels in their place, zeros elsewhere."""
        h, w = self.side
        if self.opt.kind == "padding":
            return framed(self.up, self.down, self.left, self.right)
        row, column = place or self.place()
        return nn.functional.pad(self.patch, (column, w - column - self.q, row, h - row - self.q))

    def place(self) -> tuple[int, int]:
        """Top left corner of the patch in this batch: first the row is drawn, then the column."""
        room = [side - self.q for side in self.side]
        if self.opt.kind == "fixed_patch":
            return 0, 0
        if not (self.training or self.opt.random_at_eval):
            return room[0] // 2, room[1] // 2
        ends = [r if self.opt.patch_range == "published" else r + 1 for r in room]
        row, column = (int(torch.randint(max(end, 1), ())) for end in ends)
        return row, column


def framed(up: Tensor, down: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """(m, 3, q, W) twice and (m, 3, H - 2 q, q) twice -> (m, 3, H, W) with zeros inside."""
    inside = left.new_zeros(*left.shape[:3], up.shape[3] - 2 * left.shape[3])
    return torch.cat([up, torch.cat([left, inside, right], dim=3), down], dim=2)


def size_of(site, opt) -> int:
    return opt.size or max(1, round(30 * min(site.img_size) / 224))
