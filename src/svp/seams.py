"""The places where a method may touch a frozen backbone: three wrappers, two tables, one memory.

A backbone is a pure function of (images, weights by name, seams). What a method does not override is not there, so a
backbone takes its fast paths by looking at what is overridden, never at who asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from svp.errors import SvpError
from svp.ops.add_norm import Term
from svp.ops.add_norm.reference import with_terms

Weights = dict[str, Tensor]


class Tokens(NamedTuple):
    """What travels between blocks; every change returns a new one.

    x         (b, l, d)   Vim: the previous mixer's output; elsewhere the stream itself
    residual  (b, l, d)   Vim from block 1 on: the running sum, float32 or wider; elsewhere None
    cls       positions of the class tokens; (): the feature is the mean of the patches
    patches   (h*w,)      positions of the picture's tokens, in raster order
    prompts   (p,)        positions of inserted tokens
    grid      (h, w) of this stage
    side      (b, l', d)  a second stream that a method carries along
    """

    x: Tensor
    residual: Tensor | None
    cls: tuple[int, ...]
    patches: Tensor
    prompts: Tensor
    grid: tuple[int, int]
    side: Tensor | None = None

    @property
    def stream(self) -> Tensor:
        """(b, l, d) what a block reads: x plus the running sum."""
        return self.x if self.residual is None else self.x + self.residual

    def add(self, p: Tensor, at: Tensor | None = None) -> Tokens:
        """x[:, at] + p for p (b|1, len(at), d); at: the patches unless given. It enters the residual with x."""
        at = self.patches if at is None else at
        return self._replace(x=self.x + _spread(p.to(self.x.dtype), at, self.x.shape[1]))

    def plus(self, terms: tuple[Term, ...], skip: tuple[int, ...] = ()) -> Tokens:
        """x + the sum of the terms, at every position but `skip`. A block that is given the terms does it on its way."""
        return self._replace(x=with_terms(self.x, terms, skip))

    def put(self, p: Tensor, at: Tensor) -> Tokens:
        """x[:, at] = p and nothing of the running sum stays there."""
        p = p.to(self.x.dtype).expand(len(self.x), -1, -1)
        residual = None if self.residual is None else self.residual.index_fill(1, at, 0.0)
        return self._replace(x=self.x.index_copy(1, at, p), residual=residual)

    def insert(self, p: Tensor, before: Sequence[int]) -> Tokens:
        """Put p[:, j] in front of today's position before[j] (the length of x: at the end); no position is added to it.

        p (b|1, len(before), d), before in ascending order. cls, patches and prompts move along; the new tokens join `prompts`.
        """
        length, count = self.x.shape[1], len(before)
        if list(before) != sorted(before) or not all(0 <= t <= length for t in before):
            raise SvpError(f"tokens cannot be inserted before {list(before)}", f"ascending positions in 0…{length}")
        new = [t + j for j, t in enumerate(before)]
        old = sorted(set(range(length + count)) - set(new))
        to = torch.tensor(old, device=self.x.device)
        fresh = torch.tensor(new, device=self.x.device)
        blank = self.x.new_zeros(len(self.x), length + count, self.x.shape[2])
        x = blank.index_copy(1, to, self.x).index_copy(1, fresh, p.to(self.x.dtype).expand(len(self.x), -1, -1))
        residual = self.residual
        if residual is not None:
            residual = residual.new_zeros(x.shape).index_copy(1, to, residual)
        prompts = torch.cat([to[self.prompts], fresh]).sort().values
        cls = tuple(old[t] for t in self.cls)
        return self._replace(x=x, residual=residual, cls=cls, patches=to[self.patches], prompts=prompts)

    def drop(self, at: Sequence[int]) -> Tokens:
        """Take out the tokens at these positions: the inverse of `insert`."""
        keep = [t for t in range(self.x.shape[1]) if t not in set(at)]
        place = {t: j for j, t in enumerate(keep)}
        lost = [t for t in self.cls if t not in place]
        if lost:
            raise SvpError(f"the class token at position {lost[0]} cannot be dropped", "drop inserted tokens only")
        index = torch.tensor(keep, device=self.x.device)

        def moved(positions: Tensor) -> Tensor:
            left = [place[t] for t in positions.tolist() if t in place]
            return torch.tensor(left, device=self.x.device, dtype=torch.long)

        return self._replace(
            x=self.x[:, index],
            residual=None if self.residual is None else self.residual[:, index],
            cls=tuple(place[t] for t in self.cls),
            patches=moved(self.patches),
            prompts=moved(self.prompts),
        )


def _spread(p: Tensor, at: Tensor, length: int) -> Tensor:
    """(b, len(at), d) -> (b, length, d) with zeros elsewhere."""
    if len(at) == length:  # the positions are ascending: all of them means each in its place
        return p
    return p.new_zeros(p.shape[0], length, p.shape[2]).index_copy(1, at, p)


class KV(NamedTuple):
    """What an attention layer knows before its first token: k, v (1|b, heads, m, d/heads)."""

    k: Tensor
    v: Tensor


class Scan(NamedTuple):
    """What a scan knows before its first token, for all k directions.

    h0      (1|b, k, e, n)       the state; past (1|b, k, e, taps-1) the inputs of the convolution
    offset  (k, e, n)            added to the state when it is read; bias (k, e) added to the output
    before  k of (1|b, m, e)     columns that a direction's convolution meets before the first token, in its own order; the
                                 block runs them first, and what they leave behind is its h0 and past
    """

    h0: Tensor | None = None
    past: Tensor | None = None
    offset: Tensor | None = None
    bias: Tensor | None = None
    before: tuple[Tensor, ...] | None = None

    def direction(self, k: int) -> Scan:
        """The slice of direction k of all but `before`."""
        h0, past = (None if t is None else t[:, k] for t in (self.h0, self.past))
        offset, bias = (None if t is None else t[k] for t in (self.offset, self.bias))
        return Scan(h0, past, offset, bias)


@dataclass(frozen=True)
class BlockSite:
    """What a method may know of one block. kinds: its branches, of "mixer", "attn", "mlp"."""

    width: int
    stage: int = 0
    kinds: tuple[str, ...] = ("mixer",)
    heads: int = 0
    e: int = 0
    n: int = 0
    r: int = 0
    k: int = 0
    taps: int = 0


@dataclass(frozen=True)
class Site:
    """What a method may know of a backbone: sizes, and views of its frozen tensors by published name."""

    name: str
    blocks: tuple[BlockSite, ...]
    weights: Mapping[str, Tensor]
    slots: frozenset[str]  # empty bias slots that `weights` may fill
    img_size: tuple[int, int]
    patch_size: int
    grid: tuple[int, int]
    cls: tuple[int, ...]
    num_features: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source_head: nn.Module | None = field(default=None, repr=False)

    def groups(self, size: int) -> list[int]:
        """block -> group of `size` consecutive blocks, counted within a stage so that no group crosses one."""
        found: list[int] = []
        first, group = 0, -1
        for i, block in enumerate(self.blocks):
            new_stage = i == 0 or block.stage != self.blocks[i - 1].stage
            first = i if new_stage else first
            group += new_stage or (i - first) % size == 0
            found.append(group)
        return found


class Seams:
    """Where a method may touch a frozen backbone. What a method does not override is not there."""

    # whether `block` hands on what run returned as it is: then the last block may leave out what nobody reads
    acts_before_blocks = False

    # three wrappers
    def network(self, images: Tensor, run: Callable) -> Tensor:
        """(b, 3, H, W) as preprocessed -> feature (b, d); run(images, side=None) -> (feature, side as it left the last block).

        run.norm(x) is the network's last norm, (b, l, d) -> (b, l, d); run.frozen(images) the feature of the network alone.
        """
        return run(images)[0]

    def block(self, tokens: Tokens, i: int, run: Any) -> Tokens:
        """Block i over all stages; run.norm(stream) is the block's own first norm, run.w its weights in force, by name.

        run(tokens, terms, skip) is run(tokens.plus(terms, skip)) in one pass over the tokens.
        """
        return run(tokens)

    def branch(self, x: Tensor, h: Tensor, i: int, kind: str, run: Callable[[Tensor], Tensor]) -> Tensor:
        """x the stream, h = norm(x), (b, l, d) -> what is added to the stream; kind: "mixer", "attn" or "mlp"."""
        return run(h)

    # two tables
    def weights(self, w: Weights) -> Weights:
        """{published name: tensor} in place of w[name]; the tensors of w are detached."""
        return {}

    def beside(self, i: int) -> dict[str, Callable[[Tensor], Tensor]]:
        """{"in_proj": module, …}: the layer's output becomes W x + module(x)."""
        return {}

    # one memory
    def memory(self, i: int, w: Weights) -> Scan | KV | None:
        """What the sequence layer of block i holds before its first token; w: the weights of block i in force."""
        return None

    def acts(self, seam: str) -> bool:
        """Whether this seam is overridden."""
        return getattr(type(self), seam) is not getattr(Seams, seam)


SEAMS = ("network", "block", "branch", "weights", "beside", "memory")


class Stack(Seams):
    """Several seams at once: wrappers nest (the first is outermost), tables chain, two memories of one block are an error."""

    def __init__(self, parts: Sequence[Seams]):
        self.parts = tuple(parts)

    @property
    def acts_before_blocks(self) -> bool:  # type: ignore[override]
        return all(part.acts_before_blocks or not part.acts("block") for part in self.parts)

    def acts(self, seam: str) -> bool:
        return any(part.acts(seam) for part in self.parts)

    def network(self, images, run):
        for part in reversed(self.parts[1:]):
            if part.acts("network"):
                run = _Inner(part, run)
        return self.parts[0].network(images, run)

    def block(self, tokens, i, run):
        for part in reversed(self.parts):
            if part.acts("block"):
                run = _Outer(part, i, run)
        return run(tokens)

    def branch(self, x, h, i, kind, run):
        def outer(part, inner):
            return lambda h: part.branch(x, h, i, kind, inner)

        for part in reversed(self.parts):
            if part.acts("branch"):
                run = outer(part, run)
        return run(h)

    def weights(self, w):
        changed: Weights = {}
        for part in self.parts:
            if part.acts("weights"):
                changed |= part.weights({**w, **changed})
        return changed

    def beside(self, i):
        found: dict[str, Callable[[Tensor], Tensor]] = {}
        for part in self.parts:
            for name, module in (part.beside(i) if part.acts("beside") else {}).items():
                found[name] = _Sum(found[name], module) if name in found else module
        return found

    def memory(self, i, w):
        held = [(part, m) for part in self.parts if part.acts("memory") and (m := part.memory(i, w)) is not None]
        if len(held) > 1:
            names = " and ".join(type(part).__name__ for part, _ in held)
            raise SvpError(f"{names} both bring a memory for block {i}", "combine only one of them", kind="usage")
        return held[0][1] if held else None


class _Inner:
    """A network with one part of a stack around it: what the part returns, and the side stream of its last run."""

    def __init__(self, part: Seams, run: Any):
        self.part, self.run, self.norm, self.frozen = part, run, run.norm, run.frozen

    def __call__(self, images: Tensor, side: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        tap = _Tap(self.run, side)
        return self.part.network(images, tap), tap.last


class _Tap:
    """A network that keeps the side stream of its last run; a run without one gets the one that was given from outside."""

    def __init__(self, run: Any, side: Tensor | None):
        self.run, self.side, self.last = run, side, side
        self.norm, self.frozen = run.norm, run.frozen

    def __call__(self, images: Tensor, side: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        feature, self.last = self.run(images, side=self.side if side is None else side)
        return feature, self.last


class _Outer:
    """A block with one part of a stack around it; the block's norm and weights stay in reach."""

    def __init__(self, part: Seams, i: int, run: Any):
        self.part, self.i, self.run, self.norm, self.w = part, i, run, run.norm, run.w

    def __call__(self, tokens: Tokens, terms: tuple[Term, ...] = (), skip: tuple[int, ...] = ()) -> Tokens:
        return self.part.block(tokens.plus(terms, skip), self.i, self.run)


class _Sum:
    def __init__(self, *terms: Callable[[Tensor], Tensor]):
        self.terms = terms

    def __call__(self, x: Tensor) -> Tensor:
        return sum((term(x) for term in self.terms[1:]), self.terms[0](x))
