"""ILM-VP: a trained frame around small pictures and a map from source classes to ours, renewed each epoch (arXiv 2211.11635)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from svp.methods._reprogram import (
    LabelMap,
    Normalise,
    fitted,
    frame_mask,
    inner_side,
    no_source_classes,
    padded,
    reads_texts,
)
from svp.methods._texts import source_logits, unfit_for_texts
from svp.methods.base import Method, Phase
from svp.options import option


class ILMVP(Method):
    """normalise(pad(x) + sigmoid(program) * frame) on raw pixels; class j reads the source logit map[j]. No head trains.

    expansive  the picture is resized to `size` pixels and stands in a frame that fills the rest
    additive   the picture keeps its size; program * frame of width `width` is added to it after normalisation
    ilm        the map follows the frequencies of predictions, before every `interval`-th epoch;  flm: once, before training
    rlm        a map drawn once
    The program starts at 0: an expansive frame at mid-grey.
    On CLIP's picture side the sources are texts, 81 for each class, each "a photo of a NAME" in other words; the released
    code has additive prompts there (`preset="clip"`).
    Ours: sizes away from 224 pixels are in proportion; smaller pictures are made larger (`preset="low_shot"`: they are not).
    Left out: that a class without training pictures shifts the columns of the map behind it; here every class has its source.
    Source: arXiv 2211.11635; repository OPTML-Group/ILM-VP, models/visual_prompt.py and algorithms/.
    """

    @dataclass(frozen=True)
    class Options:
        mapping: Literal["ilm", "flm", "rlm"] = option("ilm", "renewed, by frequency once, or drawn")
        interval: int = option(1, "ilm: epochs between two maps", low=1)
        prompt: Literal["expansive", "additive"] = option("expansive", "a frame around the picture, or on it")
        size: int | None = option(None, "expansive: pixels of the picture; none: 128 of 224", low=1)
        width: int | None = option(None, "additive: pixels of the frame; none: 30 of 224", low=1)
        embeddings: str | None = option(
            None, "CLIP: a .safetensors file with `target`, 81 rows for each class; none: CLIP reads their names"
        )

    PRESETS = {"low_shot": dict(size=32), "clip": dict(prompt="additive")}
    paper = "arXiv 2211.11635 (CVPR 2023)"
    params_formula = "3 side², of which the frame acts: 3 (side² - size²), additive: 3 (side² - (side - 2 width)²)"
    default_lr = 1e-2
    order = -2

    @classmethod
    def unfit(cls, site, opt):
        h, w = site.img_size
        if h != w:
            return f"pictures of {h} x {w} pixels have no square frame"
        if opt.interval > 1 and opt.mapping != "ilm":
            return f'interval lies between two maps, mapping "{opt.mapping}" has one'
        if (opt.width if opt.prompt == "expansive" else opt.size) is not None:
            return f"{'width' if opt.prompt == 'expansive' else 'size'} says nothing of an {opt.prompt} prompt"
        inner, width = sizes(site, opt)
        if opt.prompt == "expansive" and inner >= h:
            return f"size {inner} leaves no frame around pictures of {h} pixels"
        if opt.prompt == "additive" and 2 * width > h:
            return f"width {width} is more than half of pictures of {h} pixels"
        if reads_texts(site):
            return unfit_for_texts(site, opt.embeddings)
        if opt.embeddings is not None:
            return "embeddings are of texts, which CLIP alone reads"
        return no_source_classes(site)

    mask: Tensor

    def __init__(self, site, opt, num_classes):
        super().__init__(site, opt, num_classes)
        self.side = site.img_size[0]
        self.inner, width = sizes(site, opt)
        self.program = nn.Parameter(torch.zeros(3, self.side, self.side))
        self.normalise = Normalise(site)
        hole = self.inner if opt.prompt == "expansive" else self.side - 2 * width
        mask = frame_mask(self.side, hole, (self.side - hole + 1) // 2, self.program.detach())
        self.register_buffer("mask", mask, persistent=False)

    def preprocessing(self, p):
        if self.opt.prompt == "additive":
            return p
        raw = p.but(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        return raw.but(crop=(self.inner, self.inner), exact=True, interpolation="bilinear")

    def make_head(self, site, num_classes):
        return LabelMap(source_logits(site, self.classes, num_classes, self.opt.embeddings), num_classes)

    def phases(self, recipe):
        return [Phase(recipe, self.first_map)]

    def network(self, images, run):
        return run(self.prompted(images))[0]

    def prompted(self, images: Tensor) -> Tensor:
        """Pictures (b, 3, s, s) as `preprocessing` makes them -> what the network takes, (b, 3, side, side)."""
        if self.opt.prompt == "additive":
            return fitted(images, self.side) + self.program * self.mask
        return self.normalise(padded(fitted(images, self.inner), self.side) + torch.sigmoid(self.program) * self.mask)

    def first_map(self, run):
        head = run.model.head
        if self.opt.mapping == "flm":
            head.renew(run)
        elif self.opt.mapping == "rlm":
            drawn = torch.randperm(head.source.out_features, generator=run.generator)[: self.num_classes]
            head.map.copy_(drawn[:, None])

    def start_epoch(self, run, epoch):
        if self.opt.mapping == "ilm" and epoch % self.opt.interval == 0:
            run.model.head.renew(run)


def sizes(site, opt) -> tuple[int, int]:
    """(pixels of the picture, pixels of an additive frame)"""
    return opt.size or inner_side(site), opt.width or max(1, round(30 * site.img_size[0] / 224))
