"""Position tables between grids, with the class rows left where they belong."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from svp.errors import SvpError


def square(patches: int) -> tuple[int, int]:
    """The grid of a square picture with this many patches; raises SvpError when there is none."""
    side = math.isqrt(patches)
    if side * side != patches:
        raise SvpError(
            f"a position table of {patches} patches is no square grid",
            "load the file at the picture size that it was trained with",
            "artefact",
        )
    return side, side


def resize_positions(
    table: Tensor,
    grid: tuple[int, int],
    cls: tuple[int, ...],
    source_grid: tuple[int, int] | None = None,
    mode: str = "middle",
) -> Tensor:
    """A position table for another grid.

    table        (1, patches + class tokens, d)
    grid         (h, w) wanted; cls: rows of the class tokens in the result (Vim: h*w // 2)
    source_grid  (h, w) of `table`; a square unless given
    mode         "middle": class rows are taken out and put back unchanged, patches bicubic (a = -0.75, no antialias);
                 "repo": as the published fine-tuning does it, which takes row 0 for the class row whatever it is
    returns      (1, h*w + class tokens, d)
    Source: hustvl/Vim main.py (mode "repo"); the corrected rule is ours.
    """
    count = table.shape[1] - len(cls)
    source_grid = source_grid or square(count)
    if source_grid == grid:
        return table
    if mode == "repo":
        patches = _bicubic(table[:, len(cls) :], source_grid, grid)
        return torch.cat([table[:, : len(cls)], patches], dim=1)
    at_head = cls == tuple(range(len(cls)))  # class and register tokens
    source_cls = cls if at_head else tuple(_same_kind(t, grid[0] * grid[1], count) for t in cls)
    keep = [t for t in range(table.shape[1]) if t not in source_cls]
    patches = _bicubic(table[:, keep], source_grid, grid)
    places = [t for t in range(patches.shape[1] + len(cls)) if t not in cls]
    out = table.new_empty(1, patches.shape[1] + len(cls), table.shape[2])
    out[:, places] = patches
    out[:, list(cls)] = table[:, list(source_cls)]
    return out


def _same_kind(row: int, patches: int, source_patches: int) -> int:
    """Head stays head, middle stays middle, tail stays tail."""
    if row == 0 and patches > 1:
        return 0
    return source_patches // 2 if row == patches // 2 else source_patches + 1


def _bicubic(rows: Tensor, source: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    picture = rows.reshape(1, *source, -1).permute(0, 3, 1, 2)
    picture = F.interpolate(picture, size=grid, mode="bicubic", align_corners=False)
    return picture.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)
