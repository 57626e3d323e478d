"""Tokens of every block, trained as they are or made by a small network from a shared embedding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Generator(nn.Module):
    """i -> tokens (n, widths[i]) of block i: a table, or with `projection` outer_i(tanh(inner(embedding))).

    Embeddings start as N(0, 1), the layers as torch starts them. width: of the embedding; hidden: after the inner layer.
    Source: arXiv 2101.00190 (its reparametrisation); repository sony/MambaPEFT, PrefixEncoder.
    """

    def __init__(
        self, n: int, widths: Sequence[int], *, projection: bool = False, width: int = 0, hidden: int | None = None
    ):
        super().__init__()
        self.projection = projection
        if projection:
            self.embedding = nn.Parameter(torch.randn(n, width))
            self.inner = nn.Linear(width, hidden or width)
            self.outer = nn.ModuleList(nn.Linear(hidden or width, out) for out in widths)
        else:
            self.tokens = nn.ParameterList(torch.randn(n, out) for out in widths)

    def forward(self, i: int) -> Tensor:
        return self.outer[i](torch.tanh(self.inner(self.embedding))) if self.projection else self.tokens[i]
