"""Sparse dimension tuning: a warm-up finds the channels and states of each scan that are worth training (arXiv 2410.09016)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svp.errors import SvpError
from svp.methods.base import Method, Phase
from svp.options import option


class SDT(Method):
    """Offsets of A_log at chosen (channel, state) entries, and of x_proj's B and C rows at the chosen channels.

    Phase one trains an offset of all of A_log. Then the channels with the largest sum of squares, and in each of them the
    states with the largest square, are kept; the warm-up's offset is thrown away and the offsets at these places train
    from zero; head and methods beside it start again, too. `+lora` on out_proj and in_proj (rank 8) completes the published
    recipe (SDLoRA). In a loop of your own call `warm_up()`, train, call `choose()`, make the optimiser (and what else
    trains) anew; until then the first channels and states stand in. A ViT has no scan.
    Ours: the warm-up is in epochs (in the source 248 or 499 steps); both directions of Vim; at least one channel and state.
    Left out: the published third set, states that are switched off, which has size 0 in all released settings.
    Source: arXiv 2410.09016; repository furiosa-ai/ssm-peft, sd_lora.py.
    """

    @dataclass(frozen=True)
    class Options:
        freeze_channels: float = option(0.99, "share of the channels that stay frozen", low=0.0, high=1.0)
        freeze_states: float = option(0.9, "share of a kept channel's states that stay frozen", low=0.0, high=1.0)
        warmup_epochs: int = option(1, "epochs of the warm-up", low=1)

    paper = "arXiv 2410.09016 (ICML 2025)"
    params_formula = (
        "k depth (c s + 2 n c), with c = e - round(freeze_channels e) channels, s = n - round(freeze_states n) states"
    )
    default_lr = 3e-3

    @classmethod
    def unfit(cls, site, opt):
        for i, block in enumerate(site.blocks):
            if not block.n or any(name not in site.weights for pair in places(i, block) for name in pair):
                return "it tunes the scans of Vim with weights of their own in each direction"
        return None

    @classmethod
    def label(cls, site, opt):
        return "sdt_vim"

    def __init__(self, site, opt, num_classes):
        super().__init__(site, opt, num_classes)
        self.places = [(*pair, block.n) for i, block in enumerate(site.blocks) for pair in places(i, block)]
        self.A, self.B, self.C = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        self.warm = nn.ParameterList()  # (n, e) each, during the warm-up only
        self.start: dict[str, Tensor] = {}  # what trains beside it, as it was before the warm-up
        for j, (A_log, _, n) in enumerate(self.places):
            e = site.weights[A_log].shape[0]
            c, s = kept(e, opt.freeze_channels), kept(n, opt.freeze_states)
            mask = torch.zeros(n, e, dtype=torch.bool)
            mask[:s, :c] = True
            self.register_buffer(f"mask_{j}", mask)
            self.A.append(torch.zeros(c * s))
            self.B.append(torch.zeros(n * c))
            self.C.append(torch.zeros(n * c))

    def weights(self, w):
        changed: dict[str, Tensor] = {}
        for j, (A_log, x_proj, n) in enumerate(self.places):
            if len(self.warm):
                changed[A_log] = w[A_log] + self.warm[j].T
                continue
            mask = self.mask(j)
            channels = mask.any(0).expand_as(mask)
            changed[A_log] = w[A_log] + scattered(self.A[j], mask).T
            delta_rows = w[x_proj].new_zeros(w[x_proj].shape[0] - 2 * n, w[x_proj].shape[1])
            rows = [delta_rows, scattered(self.B[j], channels), scattered(self.C[j], channels)]
            changed[x_proj] = w[x_proj] + torch.cat(rows)
        return changed

    def mask(self, j: int) -> Tensor:
        """(n, e) the chosen entries of scan j."""
        return getattr(self, f"mask_{j}")

    def phases(self, recipe):
        return [Phase(recipe.but(epochs=self.opt.warmup_epochs), self.warm_up), Phase(recipe, self.choose)]

    def warm_up(self, run=None) -> None:
        """From here an offset of all of A_log trains, and nothing else of this method."""
        self.start = {name: p.detach().clone() for name, p in self.others(run)}
        self.warm = nn.ParameterList(self.A[j].new_zeros(self.mask(j).shape) for j in range(len(self.places)))
        self.train_only(self.warm)

    @torch.no_grad()
    def choose(self, run=None) -> None:
        """From here the offsets at the entries that the warm-up moved most train, from zero."""
        for j, offset in enumerate(self.warm):
            if not offset.any():
                raise SvpError(f"the warm-up has not moved {self.places[j][0]}", "a longer one: warmup_epochs=2")
            channels = int(self.mask(j).any(0).sum())
            self.mask(j).copy_(largest(offset, channels, int(self.mask(j).sum()) // channels))
            for part in (self.A, self.B, self.C):
                part[j].zero_()
        for name, p in self.others(run):
            p.copy_(self.start[name])
        self.warm, self.start = nn.ParameterList(), {}
        self.train_only(self)

    def others(self, run) -> list[tuple[str, Tensor]]:
        """What trains beside this method: the head, and methods that act together with it."""
        own = {id(p) for p in self.parameters()}
        return [] if run is None else [(name, p) for name, p in run.model.named_parameters() if id(p) not in own]

    def train_only(self, part: nn.Module) -> None:
        self.requires_grad_(False)
        part.requires_grad_(True)


def places(i: int, block) -> list[tuple[str, str]]:
    """(A, x_proj) of each direction of block i."""
    front = f"layers.{i}.mixer."
    return [(f"{front}{a}", f"{front}{x}.weight") for a, x in (("A_log", "x_proj"), ("A_b_log", "x_proj_b"))[: block.k]]


def kept(count: int, frozen: float) -> int:
    return max(count - round(frozen * count), 1)


def largest(offset: Tensor, channels: int, states: int) -> Tensor:
    """(n, e) -> where the largest `states` squares of the `channels` columns with the largest sums are."""
    score = offset.square()
    best = score.sum(0).topk(channels).indices  # (channels,)
    rows = score[:, best].topk(states, dim=0).indices  # (states, channels)
    mask = torch.zeros_like(offset, dtype=torch.bool)
    mask[rows, best.expand_as(rows)] = True
    return mask


def scattered(values: Tensor, mask: Tensor) -> Tensor:
    """The values row by row into the chosen places of (n, e), zero elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
