"""SA2VP: a map of prompts, as large as the picture, passes the same frozen blocks beside it (arXiv 2312.10376)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svp.methods.base import Method
from svp.options import option


class SA2VP(Method):
    """Two streams, picture x and prompt map q, through every frozen block; each reads its neighbourhood in the other.

        x, q = block(x), block(q);  in every fourth block (0, 4, …) q += scale cross(q, x), in the others x += scale cross(x, q)
        cross(y, z) = up(gelu(down(norm(attention(y, z) + y)))), read from the streams as they enter the block

    The attention has the frozen projections of the block. A class token reads the whole other map, a patch the 3 x 3 around
    its place: base leaves out what lies beyond the border and has the block's heads; acc has one head, and beyond the
    border stand zeros that take part in the softmax. At blocks 4, 8, … a deep prompt passes the block alone and joins q.
    Training adds `second_loss` times the loss of the head on q's class token: a loop that does not call `Method.loss`
    leaves it out. preset "published" has dropout inside the frozen network, which its training mode switches on.
    Source: arXiv 2312.10376; repository tommy-xq/SA2VP, vpt_main/src/models/vit_backbones/vit_tinypara.py.
    """

    @dataclass(frozen=True)
    class Options:
        hidden: int = option(16, "width of prompts and of cross networks; paper: 8 to 64", low=1)
        scale: float = option(0.1, "factor of what is read from the other stream; paper: 0.1, 0.5 or 1.5")
        attn: Literal["base", "acc"] = option("base", "neighbours beyond the border are left out, or zeros")
        dropout: float = option(0.1, "in the cross networks, in training", low=0.0, high=0.9)
        backbone_dropout: float = option(
            0.0, "on embeddings and in MLPs of the frozen blocks; published: 0.1", low=0.0, high=0.9
        )
        second_loss: float = option(
            0.2, "weight of the prompt map's loss; the picture's has the rest", low=0.0, high=1.0
        )

    PRESETS = {"published": dict(backbone_dropout=0.1)}
    paper = "arXiv 2312.10376 (AAAI 2024)"
    params_formula = (
        "l k + k d + d + depth (2 d + 2 d k + k + d) + n (d + l k + k d + d), l tokens, k = hidden, n = deep prompts"
    )
    default_lr = 1e-3
    counts_tokens = True

    @classmethod
    def unfit(cls, site, opt):
        if any("attn" not in block.kinds for block in site.blocks):
            return "its attention between picture and prompts has the frozen projections of attention blocks"
        if site.cls != (0,) or "reg_token" in site.weights:
            return f"{site.name} has not one class token before the patches"
        if "blocks.0.attn.q_norm.weight" in site.weights:
            return f"the attention of {site.name} norms its queries"
        if len(site.blocks) % 4 == 1:
            return f"of {len(site.blocks)} blocks the last would change the prompts alone"
        return None

    def __init__(self, site, opt, num_classes):
        super().__init__(site, opt, num_classes)
        d, k, depth = site.blocks[0].width, opt.hidden, len(site.blocks)
        length, deep = 1 + site.grid[0] * site.grid[1], (depth - 1) // 4
        self.heads = [1 if opt.attn == "acc" else block.heads for block in site.blocks]
        self.prompt, self.proj = nn.Parameter(torch.empty(length, k)), started(k, d)
        self.cross = nn.ModuleList(Cross(d, k, opt.dropout) for _ in range(depth))
        nn.init.trunc_normal_(self.prompt, std=0.02)
        if deep:
            self.deep = nn.Parameter(nn.init.trunc_normal_(torch.empty(deep, length, k), std=0.02))
            self.deep_proj = nn.ModuleList(started(k, d) for _ in range(deep))
            self.deep_scale = nn.Parameter(torch.empty(deep, d).normal_(std=0.02))
        positions = site.weights["pos_embed"][0]
        self.register_buffer("positions", F.pad(positions, (0, 0, length - len(positions), 0)), persistent=False)
        self.hidden_drop = HiddenDrop(opt.backbone_dropout)
        self.seconds: list[Tensor] | None = None  # the prompt map's class tokens, while `loss` asks for them

    def acts(self, seam):
        return super().acts(seam) and (seam not in ("branch", "beside") or self.opt.backbone_dropout > 0)

    def network(self, images, run):
        q = self.proj(self.prompt) + self.positions  # (l, d)
        feature, q = run(images, side=self.dropped(q.expand(len(images), -1, -1)))
        if self.seconds is not None:
            self.seconds.append(run.norm(q)[:, 0])
        return feature

    def block(self, tokens, i, run):
        x, q = self.dropped(tokens.x) if i == 0 else tokens.x, tokens.side
        if self.training and self.opt.backbone_dropout:
            self.hidden_drop.weight = run.w["mlp.fc2.weight"]
        to_prompts, frozen = i % 4 == 0, self.frozen(i, run)
        y, z = (q, x) if to_prompts else (x, q)
        attended = attention(run.norm(y), run.norm(z), frozen, self.heads[i], tokens.grid, self.opt.attn)
        read = self.opt.scale * self.cross[i](y, attended)
        streams = [x, q.to(x.dtype)]
        if to_prompts and i > 0:
            deep = self.deep_proj[i // 4 - 1](self.deep[i // 4 - 1])
            streams.append(deep[None].to(x.dtype))
        x, q, *deep = run(tokens._replace(x=torch.cat(streams), side=None)).x.split([len(s) for s in streams])
        if deep:
            q = q + deep[0] * self.deep_scale[i // 4 - 1]
        return tokens._replace(x=x, side=q + read) if to_prompts else tokens._replace(x=x + read, side=q)

    def frozen(self, i, run) -> Projections:
        """The projections of block i's attention."""
        return Projections(
            *(run.w.get(f"attn.{name}") for name in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias"))
        )

    def dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.opt.backbone_dropout, self.training)

    def branch(self, x, h, i, kind, run):
        return self.dropped(run(h)) if kind == "mlp" else run(h)

    def beside(self, i):
        return {"fc2": self.hidden_drop} if self.training else {}

    def loss(self, model, images, target, criterion):
        self.seconds = []
        try:
            first = criterion(model(images), target)
            second = criterion(model.head(self.seconds[-1]), target)
        finally:
            self.seconds = None
        return (1 - self.opt.second_loss) * first + self.opt.second_loss * second


class Cross(nn.Module):
    """y (b, l, d) and what it attends to -> what it takes from there, (b, l, d)."""

    def __init__(self, d: int, hidden: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(d, eps=1e-6)
        self.down, self.up = started(d, hidden), started(hidden, d)
        self.drop = nn.Dropout(dropout)

    def forward(self, y: Tensor, attended: Tensor) -> Tensor:
        h = self.norm(self.drop(attended) + y)
        return self.drop(self.up(self.drop(F.gelu(self.down(h)))))


class Projections(NamedTuple):
    """Of an attention layer: queries, keys and values (3 d, d) in one, and the output (d, d)."""

    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None


class HiddenDrop(nn.Module):
    """Beside fc2: W dropout(h) - W h, so that both together are fc2 of a hidden layer with dropout."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.weight: Tensor = torch.empty(0)  # of the block that runs

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(F.dropout(h, self.rate) - h, self.weight)


def attention(y: Tensor, z: Tensor, w: Projections, heads: int, grid: tuple[int, int], kind: str) -> Tensor:
    """Queries from y, keys and values from z, (b, 1 + h*w, d): the class token reads all, a patch the 3 x 3 around it."""
    weights, biases = w.qkv.chunk(3), (None, None, None) if w.qkv_bias is None else w.qkv_bias.chunk(3)
    maps = (F.linear(s, weight, bias) for s, weight, bias in zip((y, z, z), weights, biases, strict=True))
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in maps)  # (b, heads, l, d/heads) each
    cls = F.scaled_dot_product_attention(q[:, :, :1], k, v)  # (b, heads, 1, d/heads)
    near_k, near_v = neighbours(k[:, :, 1:], grid), neighbours(v[:, :, 1:], grid)  # (b, heads, h*w, 9, d/heads)
    scores = (near_k @ q[:, :, 1:, :, None])[..., 0] * q.shape[-1] ** -0.5  # (b, heads, h*w, 9)
    if kind == "base":
        outside = neighbours(q.new_ones(1, 1, grid[0] * grid[1], 1), grid)[..., 0] == 0
        scores = scores.masked_fill(outside, -torch.inf)
    patches = (scores.softmax(-1)[..., None, :] @ near_v)[..., 0, :]
    out = torch.cat([cls, patches], dim=2).transpose(1, 2).flatten(2)
    return F.linear(out, w.out, w.out_bias)


def neighbours(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """(b, heads, h*w, e) in raster order -> (b, heads, h*w, 9, e): the 3 x 3 around each place, zeros beyond the border."""
    b, heads, places, e = x.shape
    maps = x.transpose(2, 3).reshape(b, heads * e, *grid)
    return F.unfold(maps, 3, padding=1).reshape(b, heads, e, 9, places).permute(0, 1, 4, 3, 2)


def started(d_in: int, d_out: int) -> nn.Linear:
    layer = nn.Linear(d_in, d_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.normal_(layer.bias, std=1e-6)
    return layer
