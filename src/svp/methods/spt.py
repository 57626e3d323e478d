"""Self-Prompt Tuning: VPT whose prompts start as tokens of the training pictures themselves (arXiv 2402.02382)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from svp.methods._layers import is_vit
from svp.methods.base import Phase
from svp.methods.vpt import VPT, Position
from svp.options import option


class SPT(VPT):
    """VPT's forward pass; before training, prompt i is drawn from the tokens that enter block i of the frozen network.

    random     tokens of random training pictures
    mean, max  each picture's tokens are pooled in T windows: T - 1 of N // (T - 1) tokens, and the rest (all, if there is
               none); of these rows T are chosen: centres of k-means, or rows at random as the released code does
    kmeans     T centres of k-means over all tokens
    Block 0's tokens are taken before class token and positions. The pictures are augmented as in training. preset
    "published" draws pictures with replacement and picks pooled rows at random.
    On Vim a pool holds the complete stream; "hidden" takes the previous mixer's output alone.
    Ours: k-means (k-means++, one start, on at most `max_rows` random rows of a pool), as no generator was released; both pools
    of Vim.
    Left out: that the released shallow form draws random tokens whatever is asked for, which prototypes=random says.
    Source: arXiv 2402.02382; repository WangYZ1608/Self-Prompt-Tuning, train.py and Models/vpt_deep.py.
    """

    @dataclass(frozen=True)
    class Options:
        num_tokens: int | None = option(None, "prompt tokens; none: 20 deep, 100 shallow", low=1, high=4096)
        deep: bool = option(True, "prompts of their own before every block; else at the first block only")
        prototypes: Literal["random", "mean", "max", "kmeans"] = option("random", "what the prompts start as")
        pick: Literal["kmeans", "random"] = option(
            "kmeans", "mean, max: how T pooled rows are chosen; published: random"
        )
        sample: float | None = option(
            None, "share of the training pictures; none: all, kmeans 0.3", above=0.0, high=1.0
        )
        replacement: bool = option(False, "draw the pictures with replacement; published: true")
        max_rows: int = option(16384, "rows of a pool that k-means sees", low=1)
        vim_pool: Literal["stream", "hidden"] = option("stream", "what a token is on Vim")
        position: Position = option("pre", "where the tokens stand in Vim's sequence")
        vim_deep: Literal["replace", "hidden_only", "add"] = option(
            "replace", "what deep prompts do to their places on Vim"
        )
        project: ClassVar[None] = None
        dropout: ClassVar[float] = 0.0

    PRESETS = {"shallow": dict(deep=False), "published": dict(pick="random", replacement=True)}
    paper = "arXiv 2402.02382 (ICML 2024)"
    params_formula = "deep: depth T d, shallow: T d"

    @classmethod
    def unfit(cls, site, opt):
        patches, pooled, opt = site.grid[0] * site.grid[1], opt.prototypes in ("mean", "max"), resolved(opt)
        if pooled and not 2 <= opt.num_tokens <= patches + 1:
            return f"{patches} patches cannot be pooled in {opt.num_tokens} windows: 2 to {patches + 1} can"
        return super().unfit(site, opt)

    def __init__(self, site, opt, num_classes):
        super().__init__(site, resolved(opt), num_classes)

    @classmethod
    def label(cls, site, opt):
        return None if is_vit(site) else "spt_vim"

    def phases(self, recipe):
        return [Phase(recipe, self.begin)]

    @torch.no_grad()
    def begin(self, run):
        """Prompts from data: rows of each block's pool are drawn first, then only their pictures are looked at."""
        site, opt = run.model.backbone.site(), self.opt
        pictures = self.pictures(run)
        each = opt.num_tokens if self.pools else site.grid[0] * site.grid[1]
        centres = opt.prototypes == "kmeans" or (self.pools and opt.pick == "kmeans")
        count = opt.max_rows if centres else opt.num_tokens
        rows = [self.rows(len(pictures) * each, count, i, run) for i in range(len(self.prompts))]
        for i, found in enumerate(self.collected(run, site, pictures, rows, each)):
            chosen = k_means(found, opt.num_tokens, run.generator) if centres else found
            self.prompts[i] = chosen[torch.arange(opt.num_tokens) % len(chosen)]  # fewer rows than prompts: some twice

    @property
    def pools(self) -> bool:
        return self.opt.prototypes in ("mean", "max")

    def pictures(self, run) -> Tensor:
        """Indices of the training pictures whose tokens are pooled."""
        size, share = run.size("train"), self.opt.sample or (0.3 if self.opt.prototypes == "kmeans" else 1.0)
        count = max(round(share * size), 1)
        if self.opt.replacement:
            return torch.randint(size, (count,), generator=run.generator)
        return torch.randperm(size, generator=run.generator)[:count]

    def rows(self, size: int, count: int, i: int, run) -> Tensor:
        """Which rows of block i's pool are drawn, without replacement."""
        return torch.randperm(size, generator=run.generator)[:count].clone()  # without the rest, which may be millions

    def collected(self, run, site, pictures: Tensor, rows: list[Tensor], each: int) -> list[Tensor]:
        """The tensors of the drawn rows, (len(rows[i]), d) for each block: pooled rows lie by window, tokens by picture."""
        many = len(pictures)
        owner = [r % many if self.pools else r // each for r in rows]
        slot = [r // many if self.pools else r % each for r in rows]
        needed = torch.cat(owner).unique()
        found: list[Tensor] = []
        done = 0
        for images, _, _ in run.batches("train", augment=True, index=pictures[needed]):
            local = torch.full((many,), -1)
            local[needed[done : done + len(images)]] = torch.arange(len(images))
            done += len(images)
            for i, tokens in enumerate(self.tokens(run, site, images)):
                tokens = pooled(tokens, self.opt.num_tokens, self.opt.prototypes) if self.pools else tokens
                if len(found) == i:
                    found.append(tokens.new_empty(len(rows[i]), tokens.shape[-1]))
                here = local[owner[i]] >= 0
                found[i][here] = tokens[local[owner[i][here]], slot[i][here]]
        return found

    def tokens(self, run, site, images: Tensor) -> list[Tensor]:
        """The picture's tokens (b, h*w, d) that enter each block; the first ones without positions."""
        w, (h, _) = site.weights, site.grid
        stride = (site.img_size[0] - site.patch_size) // (h - 1) if h > 1 else site.patch_size
        first = (
            F.conv2d(images, w["patch_embed.proj.weight"], w.get("patch_embed.proj.bias"), stride)
            .flatten(2)
            .transpose(1, 2)
        )
        if not self.opt.deep:
            return [first]
        later = run.block_inputs(images)[1:]
        return [first, *((t.stream if self.opt.vim_pool == "stream" else t.x)[:, t.patches] for t in later)]


def resolved(opt):
    """The options with the number of tokens that the form asks for."""
    return dataclasses.replace(opt, num_tokens=opt.num_tokens or (20 if opt.deep else 100))


def pooled(x: Tensor, count: int, kind: str) -> Tensor:
    """Tokens (b, N, d) -> (b, count, d): count - 1 windows, and what is left over, or all where nothing is."""
    width = x.shape[1] // (count - 1)
    rest = x.shape[1] % width
    windows = [x[:, j * width : (j + 1) * width] for j in range(count - 1)] + [x[:, -rest:] if rest else x]
    return torch.stack([w.mean(1) if kind == "mean" else w.amax(1) for w in windows], dim=1)


def k_means(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(n, d) -> (at most count, d) centres."""
    from sklearn.cluster import KMeans

    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    fitted = KMeans(min(count, len(rows)), n_init=1, max_iter=300, random_state=seed).fit(rows.cpu().double().numpy())
    return torch.from_numpy(fitted.cluster_centers_).to(rows)
