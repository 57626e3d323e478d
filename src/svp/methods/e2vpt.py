"""E2VPT: VPT with trained keys and values in every attention, its prompts pruned and trained anew (arXiv 2307.13770)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svp.methods._layers import is_vit
from svp.methods.base import Phase
from svp.methods.vpt import VPT
from svp.options import option
from svp.seams import KV


class E2VPT(VPT):
    """VPT's prompts times masks P[t, j] * token[t] * piece[t, segment(j)], and `kv_tokens` keys and values before each attention.

    It trains twice: once as it begins; then tokens and pieces that the loss needs least are masked for ever, the prompts
    are rewound and trained again. `prune_tokens` and `prune_pieces` are the shares that go (as many as leave one token and
    four pieces of each); which are best is a study over runs. Both 0, or no masks: one training.

    preset "published" is the released code: pieces are interleaved channels (j mod pieces) instead of segments, masks train
    along in the first training, the score is the signed gradient of the mask instead of its size at mask 1, and the second
    training starts from newly drawn prompts instead of the first ones. The head is rewound to its start in both.
    Ours: on Vim, which has no keys and values, the prompts and masks alone are left (label "e2vpt_in"); the score is the mean
    over evaluation batches of training pictures, not augmented.
    Left out: the search over the shares that go, which is a study over runs; prompts in queries, one table for all blocks,
    scores divided by the token's and other starts of the prompts, which are ablations of the released code.
    Source: arXiv 2307.13770; repository ChengHan111/E2VPT, vit_prompt/vit_prompt_VK.py and engine/trainer.py.
    """

    @dataclass(frozen=True)
    class Options(VPT.Options):
        kv_tokens: int = option(5, "trained keys and values of each attention", low=0, high=4096)
        share_kv: bool = option(True, "one table is both keys and values")
        masks: bool = option(True, "masks on prompts and their pieces")
        pieces: int | None = option(
            None, "pieces of a prompt; none: 16, or the next smaller divisor of its width", low=1
        )
        segments: Literal["contiguous", "interleaved"] = option(
            "contiguous", "channels of a piece; published: interleaved"
        )
        masks_train: bool = option(False, "masks train in the first training; published: true")
        prune_tokens: float = option(0.5, "share of the tokens that is masked", low=0.0, high=1.0)
        prune_pieces: float = option(0.5, "share of each token's pieces that is masked", low=0.0, high=1.0)
        score: Literal["size", "signed"] = option(
            "size", "of a mask: |gradient| at 1; published: the gradient where it stands"
        )
        rewind_init: Literal["stored", "fresh"] = option("stored", "prompts of the second training; published: fresh")

    PRESETS = {"published": dict(segments="interleaved", masks_train=True, score="signed", rewind_init="fresh")}
    paper = "arXiv 2307.13770 (ICCV 2023)"
    params_formula = (
        "VPT + depth m d (deep=false: m d; twice if not shared; ViT only), m = kv_tokens; masks_train: + T + T pieces"
    )

    @classmethod
    def unfit(cls, site, opt):
        d = site.blocks[0].width
        if opt.masks and opt.pieces and d % opt.pieces:
            return f"prompts of width {d} do not divide into {opt.pieces} pieces"
        return super().unfit(site, opt)

    @classmethod
    def label(cls, site, opt):
        return None if is_vit(site) else "e2vpt_in"

    def __init__(self, site, opt, num_classes):
        super().__init__(site, opt, num_classes)
        block, count = site.blocks[0], opt.num_tokens
        if self.attends and opt.kv_tokens:
            shape = len(self.prompts), block.heads, opt.kv_tokens, block.width // block.heads
            bound = math.sqrt(6 / (shape[2] * shape[3]))  # He's, for a table of (heads, m, d / heads)
            self.k = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
            if not opt.share_kv:
                self.v = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        if opt.masks:
            pieces = opt.pieces or max(k for k in range(1, 17) if block.width % k == 0)
            self.piece_width = block.width // pieces
            self.token_mask = nn.Parameter(torch.ones(count), requires_grad=opt.masks_train)
            self.piece_mask = nn.Parameter(torch.ones(count, pieces), requires_grad=opt.masks_train)
        self.start: dict[str, Tensor] = {}

    def acts(self, seam):
        return super().acts(seam) and (seam != "memory" or hasattr(self, "k"))

    def prompt(self, tokens, i):
        prompt = super().prompt(tokens, i)
        return prompt * self.mask() if self.opt.masks else prompt

    def mask(self) -> Tensor:
        """(T, d): both masks on every channel."""
        width = self.piece_width
        interleaved = self.opt.segments == "interleaved"
        pieces = self.piece_mask.repeat(1, width) if interleaved else self.piece_mask.repeat_interleave(width, 1)
        return pieces * self.token_mask[:, None]

    def memory(self, i, w):
        if i >= len(self.k):
            return None
        return KV(self.k[i][None], (self.k if self.opt.share_kv else self.v)[i][None])

    def phases(self, recipe):
        if not (self.opt.masks and (self.opt.prune_tokens or self.opt.prune_pieces)):
            return [Phase(recipe)]
        return [Phase(recipe, self.remember), Phase(recipe, self.prune)]

    def remember(self, run):
        for mask in (self.token_mask, self.piece_mask):
            mask.data.fill_(1)  # of an earlier training, where this is another
            mask.requires_grad_(self.opt.masks_train)
        self.start = {name: t.detach().clone() for name, t in run.model.state_dict().items()}

    def prune(self, run):
        """Mask what scores lowest, rewind the rest."""
        tokens, pieces = self.scores(run)
        run.model.load_state_dict(self.start)
        self.start = {}
        if self.opt.rewind_init == "fresh":
            fresh = type(self)(run.model.backbone.site(), self.opt, self.num_classes)
            self.load_state_dict(fresh.state_dict())
        with torch.no_grad():
            for mask, score, share, kept in (
                (self.token_mask, tokens, self.opt.prune_tokens, 1), (self.piece_mask, pieces, self.opt.prune_pieces, 4),
            ):  # fmt: skip
                mask.fill_(1).scatter_(-1, lowest(score, masked_count(score.shape[-1], share, kept)), 0)
                mask.requires_grad_(False)

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        if self.opt.masks:
            for mask in (self.token_mask, self.piece_mask):  # what is masked is so for ever
                mask.requires_grad_(self.opt.masks_train and bool(mask.all()))

    def scores(self, run) -> tuple[Tensor, Tensor]:
        """How much the training loss minds each token (T,) and each piece (T, pieces): low is what may go."""
        masks, model = (self.token_mask, self.piece_mask), run.model
        for mask in masks:
            mask.requires_grad_(True)
            if self.opt.score == "size":
                mask.data.fill_(1)
        model.eval()
        sums, count = [torch.zeros_like(mask) for mask in masks], 0
        for images, labels, _ in run.batches("train"):
            grads = torch.autograd.grad(F.cross_entropy(model(images), labels), masks)
            for total, grad in zip(sums, grads, strict=True):
                total += grad.abs() if self.opt.score == "size" else grad
            count += 1
        return sums[0] / count, sums[1] / count


def masked_count(count: int, share: float, kept: int) -> int:
    """How many of `count` are masked at a share, at least `kept` being left."""
    return min(math.floor(count * share + 1e-9), max(count - kept, 0))


def lowest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` lowest along the last axis; of equals the first."""
    return scores.argsort(dim=-1, stable=True)[..., :count]
