"""AutoVP: pictures at a trained size in a trained frame, and a map or layer from source classes to ours (arXiv 2310.08381)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svp.errors import SvpError
from svp.methods._reprogram import (
    LabelMap,
    Normalise,
    by_meaning,
    fitted,
    frame_mask,
    inner_side,
    no_source_classes,
    padded,
    reads_texts,
)
from svp.methods._texts import NAMES, names_in, read, refined, source_logits, source_names, unfit_for_texts
from svp.methods.base import Method, Phase
from svp.ops.precision import wide
from svp.options import option

SMALLEST, LARGEST = 0.1, 5.0  # where the trained scale is kept


class AutoVP(Method):
    """normalise(scaled(x) + sigmoid(delta) * frame) on raw pixels; then the frozen network with its own head, then a map.

    On CLIP's picture side: scaled(normalised x) + delta * frame, and the source logits are those of 81 texts for each
    class (`ilm_vp` too); a fully mapping then starts at the first text of each. Gradients of mapping and scale are kept
    within ±0.001 / 2^16: the released code bounds those of a loss that is scaled by 2^16, and its rate of 40 needs that.

    scaling   the picture has s = scale * 128 pixels. learnable: it comes at 128 pixels and is zoomed about the centre,
              bilinearly, by a trained scale, kept in 0.1…5
    frame     delta acts outside of the middle s pixels; "published" places that hole at (side - s) // 2, a pixel before
              the padded picture where side - s is odd
    mapping   fully: a layer source -> ours; freq: by the frequencies of predictions, before training; iter: renewed
              before every `interval`-th epoch; semantic: by CLIP's embeddings of the names of ImageNet's classes and ours;
              each class reads the mean of `num_map` source logits
    Pictures that come at another size are resized first.
    Ours: away from 224 pixels, 128 becomes round(128 side / 224); smaller pictures are made larger, so that an adapter does
    not hang on the size that its pictures came in.
    Left out: the search over these options that gives the method its name, which is a study over runs; automatic precision
    without loss scaling and selection on test, as the released code has them, which are no matter of the method; its pull
    of a mapping of texts towards its start, which is off by default there; a mapping drawn at random (`ilm_vp` has it: rlm).
    Source: arXiv 2310.08381; repository IBM/AutoVP, auto_vp/programs.py.
    """

    @dataclass(frozen=True)
    class Options:
        scale: float = option(1.0, "size of the picture, in units of 128 of 224 pixels", low=SMALLEST, high=LARGEST)
        learnable: bool = option(True, "train the scale")
        mapping: Literal["fully", "freq", "iter", "semantic"] = option("fully", "from source classes to ours")
        num_map: int = option(1, "source classes of each class, in maps", low=1)
        interval: int = option(1, "iter: epochs between two maps", low=1)
        embeddings: str | None = option(
            None,
            "a .safetensors file, semantic: with `source` and `target`; CLIP: `target`; none: CLIP reads the names",
        )
        frame: Literal["aligned", "published"] = option(
            "aligned", "where the hole of the frame begins if the room is odd"
        )

    PRESETS = {"published": dict(frame="published")}
    paper = "arXiv 2310.08381 (ICLR 2024)"
    params_formula = "3 side² (+ 1 learnable scale), of which the frame acts: 3 (side² - s²); fully: + S C + C"
    default_lr = 1e-3
    order = -2

    @classmethod
    def unfit(cls, site, opt):
        h, w = site.img_size
        if h != w:
            return f"pictures of {h} x {w} pixels have no square frame"
        if int(inner_side(site) * opt.scale) >= h:
            return f"scale {opt.scale:g} leaves no frame around pictures of {h} pixels"
        if int(inner_side(site) * opt.scale) < 1:
            return f"scale {opt.scale:g} leaves nothing of pictures of {inner_side(site)} pixels"
        if opt.num_map > 1 and opt.mapping == "fully":
            return "num_map counts the sources of a map, a fully mapping reads them all"
        if opt.interval > 1 and opt.mapping != "iter":
            return f'interval lies between two maps, mapping "{opt.mapping}" has one'
        if reads_texts(site):
            if opt.mapping == "semantic":
                return f"{site.name} reads texts of our classes, so that no other classes could be near them"
            return unfit_for_texts(site, opt.embeddings)
        if opt.embeddings is not None and opt.mapping != "semantic":
            return f'embeddings are of names, which mapping "{opt.mapping}" does not read'
        reason = no_source_classes(site)
        if reason is None and opt.mapping == "semantic" and opt.embeddings is None:
            count = site.source_head.out_features
            if source_names(count) is None:
                return (
                    f"the names of its {count} source classes are not known; embeddings=FILE with `source` and `target`"
                )
        return reason

    def __init__(self, site, opt, num_classes):
        super().__init__(site, opt, num_classes)
        self.side, self.base = site.img_size[0], inner_side(site)
        self.delta = nn.Parameter(torch.zeros(3, self.side, self.side))
        if opt.learnable:
            self.scale = nn.Parameter(torch.tensor([float(opt.scale)]))
        self.on_clip = reads_texts(site)
        self.normalise = nn.Identity() if self.on_clip else Normalise(site)

    def preprocessing(self, p):
        if self.on_clip:
            return p
        size = self.input_side()
        return p.but(crop=(size, size), exact=True, interpolation="bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def make_head(self, site, num_classes):
        source = source_logits(site, self.classes, num_classes, self.opt.embeddings)
        if self.opt.mapping != "fully":
            return LabelMap(source, num_classes, self.opt.num_map)
        layer = nn.Linear(source.out_features, num_classes)
        if self.on_clip:
            nn.init.eye_(layer.weight)
        return nn.Sequential(source, layer)

    def groups(self):
        return {name: {"clip_value": 1e-3 / 2**16} for name in ("scale", "head.*")} if self.on_clip else {}

    def phases(self, recipe):
        return [Phase(recipe, None if self.opt.mapping == "fully" else self.first_map)]

    def network(self, images, run):
        return run(self.prompted(images))[0]

    def prompted(self, images: Tensor) -> Tensor:
        """Pictures (b, 3, s, s) as `preprocessing` makes them -> what the network takes, (b, 3, side, side)."""
        delta = self.delta if self.on_clip else torch.sigmoid(self.delta)
        return self.normalise(self.resized(images) + delta * self.mask())

    def resized(self, images: Tensor) -> Tensor:
        """The picture in its place and size, zeros around."""
        images = padded(fitted(images, self.input_side()), self.side)
        if not self.opt.learnable:
            return images
        at = torch.linspace(-1, 1, self.side, device=images.device, dtype=images.dtype) / self.scale.to(images.dtype)
        grid = torch.stack(torch.meshgrid(at, at, indexing="xy"), dim=-1).expand(len(images), -1, -1, -1)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True)

    def input_side(self) -> int:
        """Pixels of a picture as `preprocessing` makes it."""
        return self.base if self.opt.learnable else int(self.base * self.opt.scale)

    def mask(self) -> Tensor:
        """(side, side): 1 where delta acts."""
        inner: Tensor | int = self.input_side()
        if self.opt.learnable:
            inner = (self.base * wide(self.scale.detach())).floor().long().clamp(max=self.side)
        first = (self.side - inner + (self.opt.frame == "aligned")) // 2
        return frame_mask(self.side, inner, first, self.delta)

    def after_step(self):
        if self.opt.learnable:
            self.scale.data.clamp_(SMALLEST, LARGEST)

    def first_map(self, run):
        head = run.model.head
        if self.opt.mapping == "semantic":
            head.map.copy_(by_meaning(*self.meanings(head.source.out_features), self.opt.num_map))
        else:
            head.renew(run)

    def meanings(self, count: int) -> tuple[Tensor, Tensor]:
        """Embeddings of the names of the `count` source classes (S, e) and of ours (C, e)."""
        if self.opt.embeddings is not None:
            return names_in(self.opt.embeddings, count, self.num_classes)
        if self.classes is None:
            raise SvpError("a semantic mapping needs the names of the classes", "classes=[…]", "usage")
        return read(source_names(count), ("{}",), NAMES), read(refined(self.classes), ("{}",), NAMES)

    def start_epoch(self, run, epoch):
        if self.opt.mapping == "iter" and epoch > 0 and epoch % self.opt.interval == 0:
            run.model.head.renew(run)
