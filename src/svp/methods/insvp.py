"""InsVP: prompts computed from each picture, for its pixels and beside its tokens (ACM MM 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svp.methods._layers import is_vit
from svp.methods.base import Method
from svp.methods.svp import simam
from svp.methods.vpt import VPT, Position
from svp.options import option


class InsVP(VPT):
    """x' = x + local(x) + scale global(x), then VPT's deep prompts plus tokens computed from x'.

    local   every patch through two layers, the same for all;  global: two wide convolutions over the picture
    tokens  three convolutions make T tokens of the picture, added to each block's own prompts (start: uniform in -1…1)
    Released code never gives the token network to the optimiser (preset "published": it keeps its random start), and
    draws its dropout anew for every block; `token_once` computes it once a pass, as evaluation does: ours, and faster.
    Ours: widths other than 768 take T d / cells channels at the end of the token network; away from 224 pixels its map is
    pooled to the patch grid; where tokens cannot be inserted the picture's part acts alone (label "insvp_image"; others:
    "insvp_vim", "insvp_once", "insvp_width").
    Source: Liu et al., ACM MM 2024; repository zhoujiahuan1991/MM2024-InsVP, models/InstanceVPD.py and tokenPrompt.py.
    """

    @dataclass(frozen=True)
    class Options:
        num_tokens: int = option(16, "prompt tokens", low=1, high=4096)
        tokens: bool | None = option(None, "prompts beside the tokens; none: where they can be inserted")
        hidden: int = option(16, "width of the local prompter", low=1)
        hidden_global: int = option(6, "channels of the global prompter", low=1)
        kernels: tuple[int, ...] = option((11, 25), "sizes of the global prompter's convolutions", low=1)
        token_kernels: tuple[int, ...] = option((7, 9, 3), "sizes of the token network's convolutions", low=1)
        global_scale: float = option(2.0, "factor of the global prompt")
        dropout: float = option(0.1, "on all prompts and in the token network, in training", low=0.0, high=0.9)
        train_token_net: bool = option(True, "train the token network; published: false")
        token_once: bool = option(False, "compute the tokens once a pass in training too")
        simam: bool = option(False, "SimAM on the input picture; published for some data sets")
        position: Position = option("pre", "where the tokens stand in Vim's sequence")
        vim_deep: Literal["replace", "hidden_only", "add"] = option(
            "replace", "what deep prompts do to their places on Vim"
        )
        project: ClassVar[None] = None
        deep: ClassVar[bool] = True

    PRESETS = {"published": dict(train_token_net=False)}
    paper = "InsVP, ACM MM 2024"
    params_formula = "2 c h + h + c + global convolutions + depth T d + token network, c = 3 patch², h = hidden"
    default_lr = 2e-3

    @classmethod
    def unfit(cls, site, opt):
        if (
            len(opt.kernels) != 2
            or len(opt.token_kernels) != 3
            or not all(k % 2 for k in opt.kernels + opt.token_kernels)
        ):
            return "kernels are two odd sizes, token_kernels three"
        if any(side % site.patch_size for side in site.img_size):
            return f"pictures of {site.img_size} pixels are not made of whole patches of {site.patch_size}"
        return super().unfit(site, opt) if has_tokens(site, opt) else None

    @classmethod
    def label(cls, site, opt):
        if not has_tokens(site, opt):
            return "insvp_image"
        if not is_vit(site):
            return "insvp_vim"
        return "insvp_once" if opt.token_once else None if site.blocks[0].width == 768 else "insvp_width"

    def __init__(self, site, opt, num_classes):
        Method.__init__(self, site, opt, num_classes)
        self.patch, c = site.patch_size, 3 * site.patch_size**2
        self.local = nn.Sequential(nn.Linear(c, opt.hidden), nn.ReLU(), nn.Linear(opt.hidden, c))
        first, last = opt.kernels
        self.broad = nn.Sequential(
            nn.Conv2d(3, opt.hidden_global, first, padding=first // 2), nn.ReLU(),
            nn.Conv2d(opt.hidden_global, 3, last, padding=last // 2),
        )  # fmt: skip
        self.drop, self.proj = nn.Dropout(opt.dropout), nn.Identity()
        self.attends, self.inserts = is_vit(site), has_tokens(site, opt)
        self.counts_tokens = self.inserts
        if self.inserts:
            d, count = site.blocks[0].width, opt.num_tokens
            self.prompts = nn.Parameter(torch.empty(len(site.blocks), count, d).uniform_(-1, 1))
            self.token_net = TokenNet(site, opt, d).requires_grad_(opt.train_token_net)

    def acts(self, seam):
        return super().acts(seam) and (seam != "block" or self.inserts)

    def network(self, images, run):
        images = simam(images) if self.opt.simam else images
        images = images + self.picture_prompt(images)
        if not self.inserts:
            return run(images)[0]
        side = self.token_net.first(images)
        redrawn = self.training and self.opt.dropout > 0 and not self.opt.token_once
        return run(images, side=side if redrawn else self.token_net.rest(side))[0]

    def block(self, tokens, i, run):
        return super().block(tokens, i, run) if self.inserts else run(tokens)

    def picture_prompt(self, x: Tensor) -> Tensor:
        """(b, 3, H, W) -> the same shape, what is added to it."""
        vectors = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)  # (b, h*w, 3 p²), by channel, row, column
        local = F.fold(self.local(vectors).transpose(1, 2), x.shape[2:], self.patch, stride=self.patch)
        return self.drop(local) + self.opt.global_scale * self.drop(self.broad(x))

    def prompt(self, tokens, i):
        side = tokens.side
        return super().prompt(tokens, i) + (side if side.dim() == 3 else self.token_net.rest(side))


def has_tokens(site, opt) -> bool:
    return len({block.width for block in site.blocks}) == 1 if opt.tokens is None else opt.tokens


class TokenNet(nn.Module):
    """Picture (b, 3, H, W) -> tokens (b, T, d): the channels of its last map, one after the other, cut into T pieces.

    `first` ends before anything is drawn, so that all blocks share it; dropout is drawn anew by each call of `rest`.
    """

    def __init__(self, site, opt, d: int):
        super().__init__()
        t, (k1, k2, k3) = opt.num_tokens, opt.token_kernels
        self.shape, self.is_published = (t, d), site.img_size == (224, 224)
        self.grid = (16, 16) if self.is_published else site.grid
        self.conv1 = nn.Conv2d(3, t, k1, padding=k1 // 2)
        self.conv2 = nn.Conv2d(t, 3 * t, k2, padding=k2 // 2)
        self.conv3 = nn.Conv2d(3 * t, math.ceil(t * d / (self.grid[0] * self.grid[1])), k3, padding=k3 // 2)
        self.drop = nn.Dropout(opt.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.first(x))

    def first(self, x: Tensor) -> Tensor:
        """Picture (b, 3, H, W) -> the first map, pooled."""
        x = F.leaky_relu(self.conv1(x))
        return F.max_pool2d(x[..., 8:216, 8:216] if self.is_published else x, 4)

    def rest(self, x: Tensor) -> Tensor:
        """The first map -> tokens (b, T, d)."""
        x = F.leaky_relu(self.conv2(self.drop(x)))
        x = self.drop(F.max_pool2d(x[..., 2:50, 2:50], 3) if self.is_published else F.adaptive_max_pool2d(x, self.grid))
        count, d = self.shape
        return self.conv3(x).flatten(1)[:, : count * d].unflatten(1, (count, d))
