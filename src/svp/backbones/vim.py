"""Vision Mamba: bidirectional Mamba blocks over patch tokens, the class token in the middle (arXiv 2401.09417)."""

from __future__ import annotations

import math
import re
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svp.backbones.base import PLAIN, Backbone, beside, by_block, drop_path, grid_of, is_plain, linear, pair
from svp.errors import SvpError, unknown
from svp.ops import causal_conv1d, selective_scan
from svp.ops.add_norm import Term, add_norm
from svp.ops.add_norm.reference import rms_norm
from svp.ops.mixer import Direction, mixer
from svp.ops.precision import wide
from svp.preprocessing import Preprocessing
from svp.seams import BlockSite, Scan, Seams, Site, Tokens, Weights

VARIANTS: dict[str, dict[str, Any]] = {  # name: what differs
    "vim_tiny": dict(embed_dim=192),
    "vim_tiny_stride8": dict(embed_dim=192, stride=8),
    "vim_small": dict(embed_dim=384),
    "vim_small_stride8": dict(embed_dim=384, stride=8),
    "vim_base": dict(embed_dim=768),
    "vim_tiny_64": dict(embed_dim=192, patch_size=8, img_size=64, num_classes=200),
    "vim_nano": dict(embed_dim=96, patch_size=8, img_size=64, num_classes=200),
}
PUBLISHED = {  # variant: (hub repository, file) of the weights published with arXiv 2401.09417
    "vim_tiny": ("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth"),
    "vim_tiny_stride8": ("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_ft_78p3acc.pth"),
    "vim_small": ("hustvl/Vim-small-midclstok", "vim_s_midclstok_80p5acc.pth"),
    "vim_small_stride8": ("hustvl/Vim-small-midclstok", "vim_s_midclstok_ft_81p6acc.pth"),
    "vim_base": ("hustvl/Vim-base-midclstok", "vim_b_midclstok_81p9acc.pth"),
}
SIZES = dict(depth=24, d_state=16, expand=2, patch_size=16)  # what the published sizes share
CLASS_TOKENS = Literal["middle", "head", "double", "none"]
SCAN_TYPES = Literal["v2", "v1", "none"]


class Vim(Backbone):
    """Vision Mamba of any size.

    embed_dim, depth, d_state, d_conv, expand, dt_rank   widths of the blocks; dt_rank None: ceil(embed_dim / 16)
    patch_size, stride, img_size                         pixels; stride None: patch_size; img_size int or (H, W)
    cls_token       "middle" (published), "head", "double" (head and tail, their mean), "none" (mean of the patches)
    scan_type       "v2": two directions with their own weights (published); "v1": they share all but A; "none": forward only
    divide_out      halve the sum of the two directions (published, scan_type "v2")
    layer_scale     start value of a per-channel scale after out_proj, or None
    Source: arXiv 2401.09417; repository hustvl/Vim, vim/models_mamba.py and mamba-1p1p1.
    """

    family = "vim"

    def __init__(
        self,
        name: str = "vim",
        *,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        patch_size: int = 16,
        stride: int | None = None,
        img_size: int | tuple[int, int] = 224,
        num_classes: int = 1000,
        cls_token: CLASS_TOKENS = "middle",
        scan_type: SCAN_TYPES = "v2",
        divide_out: bool = True,
        layer_scale: float | None = None,
        bias: bool = False,
        conv_bias: bool = True,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        for what, value in dict(
            embed_dim=embed_dim, depth=depth, d_state=d_state, d_conv=d_conv, expand=expand, patch_size=patch_size,
            stride=1 if stride is None else stride, dt_rank=1 if dt_rank is None else dt_rank,
        ).items():  # fmt: skip
            if not isinstance(value, int) or value < 1:
                raise SvpError(f"{what} of {name} is {value!r}, expected a whole number from 1", f"svp list backbones {name}", "usage")  # fmt: skip
        for what, text, known in (
            ("cls_token", cls_token, get_args(CLASS_TOKENS)), ("scan_type", scan_type, get_args(SCAN_TYPES)),
        ):  # fmt: skip
            if text not in known:
                raise unknown(f"{what} of {name}", str(text), known, f"svp list backbones {name}")
        if not isinstance(num_classes, int) or num_classes < 0:
            raise SvpError(f"num_classes of {name} is {num_classes!r}, expected a whole number from 0 (no head)", f"svp list backbones {name}", "usage")  # fmt: skip
        self.name, self.depth, self.embed_dim, self.num_features = name, depth, embed_dim, embed_dim
        self.num_classes, self.drop_path_rate, self.norm_eps = num_classes, drop_path_rate, norm_eps
        self.patch_size, self.stride, self.cls_kind = patch_size, stride or patch_size, cls_token
        self.img_size = pair(img_size)
        self.grid = grid_of(self.img_size, patch_size, self.stride)
        self.scan_type, self.divide_out = scan_type, divide_out and scan_type == "v2"
        small = max(self.img_size) <= 64  # trained without a margin
        self.preprocessing = Preprocessing(self.img_size, resize=max(self.img_size) if small else None)

        count = self.grid[0] * self.grid[1]
        self.patch_embed = PatchEmbed(embed_dim, patch_size, self.stride)
        for token in {
            "middle": ["cls_token"],
            "head": ["cls_token"],
            "double": ["cls_token_head", "cls_token_tail"],
        }.get(cls_token, []):
            self.register_parameter(token, nn.Parameter(torch.zeros(1, 1, embed_dim)))
        self.pos_embed = nn.Parameter(torch.zeros(1, count + len(self.cls_positions), embed_dim))
        sizes = dict(
            d_state=d_state, d_conv=d_conv, expand=expand, dt_rank=dt_rank, scan_type=scan_type, layer_scale=layer_scale
        )
        self.layers = nn.ModuleList(Layer(embed_dim, bias=bias, conv_bias=conv_bias, **sizes) for _ in range(depth))
        self.norm_f = Norm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.init_weights()

    # -- the function --------------------------------------------------------------------------------------------------

    def embed(self, images: Tensor, w: Weights) -> Tokens:
        """Pictures (b, 3, H, W) -> patch tokens with class tokens and positions."""
        x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], self.stride)
        x = x.flatten(2).transpose(1, 2)  # (b, h*w, d)
        b, count, _ = x.shape
        cls = self.cls_positions
        if self.cls_kind == "double":
            head, tail = (w[f"cls_token_{end}"].expand(b, -1, -1) for end in ("head", "tail"))
            x = torch.cat([head, x, tail], dim=1)
        elif cls:
            token = w["cls_token"].expand(b, -1, -1)
            x = torch.cat([x[:, : cls[0]], token, x[:, cls[0] :]], dim=1)
        x = x + w["pos_embed"]  # under autocast as wide as the table, as published: the convolution alone is narrow
        places = torch.tensor([t for t in range(count + len(cls)) if t not in cls], device=x.device)
        return Tokens(x, None, cls, places, places.new_empty(0), self.grid)

    def run_blocks(self, images, w, seams, side=None, drop_path_rate=0.0, pooled_only=False):
        blocks = by_block(w)
        tokens = self.embed(images, w)._replace(side=side)
        for i, layer in enumerate(self.layers):
            last = pooled_only and i == self.depth - 1 and len(tokens.cls) == 1
            block = Block(self, layer, blocks[i], i, seams, drop_rate(drop_path_rate, i, self.depth), last)
            tokens = self.checkpointed(seams, tokens, i, block)
        tokens = tokens._replace(x=drop_path(tokens.x, drop_path_rate))
        return tokens._replace(x=self.last_norm(tokens.stream, w), residual=None)

    def last_norm(self, x: Tensor, w: Weights) -> Tensor:
        normed = rms_norm(x, w["norm_f.weight"], self.norm_eps, w["norm_f.weight"].dtype)
        return normed + w["norm_f.bias"] if "norm_f.bias" in w else normed

    @property
    def cls_positions(self) -> tuple[int, ...]:
        count = self.grid[0] * self.grid[1]
        return {"middle": (count // 2,), "head": (0,), "double": (0, count + 1), "none": ()}[self.cls_kind]

    # -- what methods may know -----------------------------------------------------------------------------------------

    def site(self) -> Site:
        directions = {"v2": 2, "v1": 2, "none": 1}[self.scan_type]
        blocks = []
        for layer in self.layers:
            e, n = layer.mixer.A_log.shape
            r, taps = layer.mixer.dt_proj.weight.shape[1], layer.mixer.conv1d.weight.shape[2]
            blocks.append(BlockSite(self.embed_dim, kinds=("mixer",), e=e, n=n, r=r, k=directions, taps=taps))
        p = self.preprocessing
        views = {name: t.detach() for name, t in self.named_parameters()}
        return Site(
            self.name, tuple(blocks), views, self.site_slots(), self.img_size, self.patch_size, self.grid,
            self.cls_positions, self.num_features, p.mean, p.std, self.head if isinstance(self.head, nn.Linear) else None,
        )  # fmt: skip

    def site_slots(self) -> frozenset[str]:
        twins = ("x_proj", "x_proj_b") if self.scan_type == "v2" else ("x_proj",)
        names = {f"layers.{i}.mixer.{m}.bias" for i in range(self.depth) for m in ("in_proj", "out_proj", *twins)}
        names |= {f"layers.{i}.mixer.{m}.bias" for i in range(self.depth) for m in ("conv1d", "conv1d_b")}
        names.add("norm_f.bias")
        return frozenset(names - set(dict(self.named_parameters())))

    # -- start values, timm's protocol ---------------------------------------------------------------------------------

    @torch.no_grad()
    def init_weights(self) -> None:
        """The published start values (arXiv 2401.09417's code): the backward step size starts at softplus(0) on purpose."""
        nn.init.normal_(
            self.patch_embed.proj.weight, std=math.sqrt(1 / self.patch_embed.proj.weight[0].numel()) / 0.8796
        )
        nn.init.zeros_(self.patch_embed.proj.bias)
        for name, p in self.named_parameters():
            if name in ("pos_embed", "cls_token", "cls_token_head", "cls_token_tail", "head.weight"):
                nn.init.normal_(p, std=0.02)
            elif name.endswith("out_proj.weight"):
                nn.init.kaiming_uniform_(p, a=math.sqrt(5))
                p /= math.sqrt(self.depth)
            elif name.endswith(("in_proj.bias", "out_proj.bias", "dt_proj_b.bias", "head.bias")):
                nn.init.zeros_(p)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token", "cls_token_head", "cls_token_tail"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        }

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        return_prefix_tokens: bool = False,
        stop_early: bool = False,
    ) -> Any:
        """timm's intermediate features: after the chosen blocks the residual stream's patches, (b, d, h, w) or (b, h*w, d)."""
        if output_fmt not in ("NCHW", "NLC"):
            raise SvpError(f"output_fmt is {output_fmt!r}, expected NCHW or NLC", 'output_fmt="NCHW"', "usage")
        wanted = _indices(indices, self.depth)
        taken = Taker(wanted)
        self.check_images(x)
        w = self.in_force(None)
        last = self.run_blocks(x, w, taken, None, self.drop_path_now)
        outs = []
        for i in wanted:
            stream, tokens = taken.found[i]
            stream = self.last_norm(stream, w) if norm else stream
            patches = stream[:, tokens.patches]
            if output_fmt == "NCHW":
                patches = patches.transpose(1, 2).unflatten(2, self.grid)
            outs.append((patches, stream[:, list(last.cls)]) if return_prefix_tokens else patches)
        return outs if intermediates_only else (last.x, outs)


class Taker(Seams):
    """Keeps the stream after chosen blocks."""

    def __init__(self, wanted: list[int]):
        self.wanted = set(wanted)
        self.found: dict[int, tuple[Tensor, Tokens]] = {}

    def block(self, tokens, i, run):
        tokens = run(tokens)
        if i in self.wanted:
            self.found[i] = tokens.stream, tokens
        return tokens


class Block:
    """What seams.block gets as `run`: block i with the weights in force.

    only_cls: nothing but the class token is read afterwards, so that it alone is gated and projected, and each direction
    is scanned no further than to it. The tokens that come out are then that one.
    """

    def __init__(self, net: Vim, layer: Layer, w: Weights, i: int, seams: Seams, drop: float, only_cls: bool = False):
        self.net, self.layer, self.w, self.i, self.seams, self.drop = net, layer, w, i, seams, drop
        self.only_cls = only_cls

    def __call__(self, tokens: Tokens, terms: tuple[Term, ...] = (), skip: tuple[int, ...] = ()) -> Tokens:
        # the residual is added one block late; it stays in float32 or wider whatever autocast does
        x, residual = tokens.x, tokens.residual
        if self.drop and residual is not None:
            x, terms = drop_path(tokens.plus(terms, skip).x, self.drop), ()
        norm, net = self.w["norm.weight"], self.net
        h, stream = add_norm(x, residual, norm, net.norm_eps, terms=terms, skip=skip, kernel=net.kernel)
        if self.only_cls:
            (at,) = tokens.cls
            none = tokens.patches[:0]
            return tokens._replace(
                x=self.mixer(h, at), residual=stream[:, at : at + 1], cls=(0,), patches=none, prompts=none
            )
        y = self.seams.branch(stream, h, self.i, "mixer", self.mixer) if self.seams.acts("branch") else self.mixer(h)
        return tokens._replace(x=y, residual=stream)

    def norm(self, x: Tensor) -> Tensor:
        """The block's own first norm, (b, l, d), in the dtype of the weights in force."""
        return rms_norm(x, self.w["norm.weight"], self.net.norm_eps, self.w["norm.weight"].dtype)

    def mixer(self, h: Tensor, at: int | None = None) -> Tensor:
        """(b, l, d) -> (b, l, d): both directions over one projection of the normed stream; at: that token alone, (b, 1, d)."""
        net, mod, seams = self.net, self.layer.mixer, self.seams
        for name in CONVOLUTIONS:
            if hasattr(mod, name) and not is_plain(getattr(mod, name), nn.Conv1d):
                problem = f"{name} of block {self.i} carries a hook or wrapper, and {net.name} does not call that layer"
                raise SvpError(problem, "remove it; `partial` trains the taps and biases", "usage")
        w = {name.removeprefix("mixer."): t for name, t in self.w.items() if name.startswith("mixer.")}
        extra = seams.beside(self.i) if seams.acts("beside") else {}
        memory = seams.memory(self.i, w) if seams.acts("memory") else None
        if memory is not None and not isinstance(memory, Scan):
            raise SvpError(f"block {self.i} of {net.name} holds a scan, the method gives it {type(memory).__name__}")
        scale, memory = 0.5 if net.divide_out else 1.0, memory or Scan()
        if memory.before is not None:
            left = [left_behind(mod, w, x, twin, net.kernel) for x, twin in zip(memory.before, ("", "_b"), strict=True)]
            h0, past = (torch.stack(of_both, dim=1) for of_both in zip(*left, strict=True))
            memory = memory._replace(h0=h0, past=past, before=None)
        xz = beside(linear(mod.in_proj, w, "in_proj", h), h, extra, "in_proj")
        if at is None and net.scan_type == "v2" and all(is_plain(getattr(mod, name)) for name in INNER):
            pair = (direction(w, twin, memory.direction(k)) for k, twin in enumerate(("", "_b")))
            y = mixer(xz, *pair, scale=scale, kernel=net.kernel)
        else:
            x, z = xz.chunk(2, dim=-1)  # (b, l, e) each
            z = z if at is None else z[:, at : at + 1]
            y = directions(mod, w, x, net.scan_type, memory, net.kernel, at) * F.silu(z) * scale
        out = beside(linear(mod.out_proj, w, "out_proj", y), y, extra, "out_proj")
        return out * w["gamma"] if "gamma" in w else out


INNER = (
    "x_proj",
    "dt_proj",
    "x_proj_b",
    "dt_proj_b",
)  # a hook or wrapper on one of them acts on the path of single ops


CONVOLUTIONS = ("conv1d", "conv1d_b")


def direction(w: Weights, twin: str, memory: Scan) -> Direction:
    """The tensors in force of one direction."""
    return Direction(
        w[f"conv1d{twin}.weight"].squeeze(1), w.get(f"conv1d{twin}.bias"), w[f"x_proj{twin}.weight"],
        w.get(f"x_proj{twin}.bias"), w[f"dt_proj{twin}.weight"], w.get(f"dt_proj{twin}.bias"),
        negative_exp(w["A_b_log" if twin else "A_log"]), w["D" + twin],
        memory.h0, memory.past, memory.offset, memory.bias,
    )  # fmt: skip


def negative_exp(A_log: Tensor) -> Tensor:
    """A (e, n), in float32 or wider."""
    return -torch.exp(wide(A_log))


def directions(
    mod: nn.Module, w: Weights, x: Tensor, scan_type: str, memory: Scan, kernel: str, at: int | None = None
) -> Tensor:
    """x (b, l, e) -> the sum of the scans over both orders (b, l, e), before the gate; at: of that token alone, (b, 1, e)."""
    until, since = (slice(None), slice(None)) if at is None else (slice(at + 1), slice(at, None))
    ours = [memory.direction(k) for k in range(1 if scan_type == "none" else 2)]
    # a scan at one token needs what comes before it in its own order; v1's backward scan reads the forward convolution
    forward = convolved(w, x if scan_type == "v1" else x[:, until], "", ours[0], False, kernel)
    y = scan_one_way(mod, w, forward[:, until], "", "A_log", ours[0], False, kernel)
    y = y if at is None else y[:, -1:]
    if scan_type == "none":
        return y
    if scan_type == "v1":  # it shares all but A
        back = scan_one_way(mod, w, forward[:, since], "", "A_b_log", ours[1], True, kernel)
    else:
        backward = convolved(w, x[:, since], "_b", ours[1], True, kernel)
        back = scan_one_way(mod, w, backward, "_b", "A_b_log", ours[1], True, kernel)
    return y + (back if at is None else back[:, :1])


def convolved(w: Weights, x: Tensor, twin: str, memory: Scan, reverse: bool, kernel: str) -> Tensor:
    """SiLU of the causal depthwise convolution of one direction: (b, l, e) -> (b, l, e)."""
    weight = w[f"conv1d{twin}.weight"].squeeze(1)  # (e, taps)
    bias = w.get(f"conv1d{twin}.bias")
    return causal_conv1d(x, weight, bias, activation="silu", past=memory.past, reverse=reverse, kernel=kernel)


def left_behind(mod: nn.Module, w: Weights, x: Tensor, twin: str, kernel: str) -> tuple[Tensor, Tensor]:
    """x (b, m, e) columns -> what they leave in the direction `twin`: state (b, e, n), past (b, e, taps - 1)."""
    a_name, taps = "A_b_log" if twin else "A_log", w[f"conv1d{twin}.weight"].shape[-1]
    past = F.pad(x, (0, 0, taps - 1, 0))[:, x.shape[1] :].transpose(1, 2)
    if not x.shape[1]:
        return w[a_name].new_zeros(len(x), *w[a_name].shape), past
    u = convolved(w, x, twin, Scan(), False, kernel)
    _, state = scan_one_way(mod, w, u, twin, a_name, Scan(), False, kernel, return_last_state=True)
    return state, past


def scan_one_way(
    mod: nn.Module, w: Weights, u: Tensor, twin: str, a_name: str, memory: Scan, reverse: bool, kernel: str,
    return_last_state: bool = False,
) -> Any:  # fmt: skip
    """u (b, l, e) -> scan with the input-dependent delta, B, C of one direction, plus the skip term D u; the state, too."""
    x_proj, dt_proj = getattr(mod, f"x_proj{twin}"), getattr(mod, f"dt_proj{twin}")
    A = negative_exp(w[a_name])  # (e, n)
    n = A.shape[1]
    p = linear(x_proj, w, f"x_proj{twin}", u)  # (b, l, r + 2n): delta's code, B, C
    code, B, C = p.split([p.shape[-1] - 2 * n, n, n], dim=-1)
    delta = linear(dt_proj, w, f"dt_proj{twin}", code, bias=False)  # (b, l, e)
    delta_bias = w.get(f"dt_proj{twin}.bias") if is_plain(dt_proj) else None
    return selective_scan(
        u, delta, A, B, C, w["D" + twin], delta_bias=delta_bias, delta_softplus=True,
        h0=memory.h0, offset=memory.offset, bias=memory.bias, reverse=reverse, kernel=kernel,
        return_last_state=return_last_state,
    )  # fmt: skip


# -- files -------------------------------------------------------------------------------------------------------------


def published(name: str) -> tuple[str, ...] | None:
    """(hub repository, file) of a variant's published weights, or None."""
    return PUBLISHED.get(name)


def recognise(tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    """The sizes of the Vim that these tensors make, as keywords of `Vim`, or None when they make none."""
    a_log, conv = tensors.get("layers.0.mixer.A_log"), tensors.get("patch_embed.proj.weight")
    in_proj, dt = tensors.get("layers.0.mixer.in_proj.weight"), tensors.get("layers.0.mixer.dt_proj.weight")
    if a_log is None or conv is None or in_proj is None or dt is None:
        return None
    depth = 1 + max(int(m[1]) for k in tensors if (m := re.match(r"layers\.(\d+)\.", k)))
    d = in_proj.shape[1]
    sizes: dict[str, Any] = dict(
        embed_dim=d, depth=depth, d_state=a_log.shape[1], dt_rank=dt.shape[1], expand=a_log.shape[0] // d,
        patch_size=conv.shape[2],
    )  # fmt: skip
    if "layers.0.mixer.A_b_log" not in tensors:
        sizes["scan_type"] = "none"
    elif "layers.0.mixer.x_proj_b.weight" not in tensors:
        sizes["scan_type"] = "v1"
    if "pos_embed" in tensors:
        sizes["tokens"] = tensors["pos_embed"].shape[1]
        if sizes["tokens"] == 27 * 27 + 1 and sizes["patch_size"] == 16:  # of 224 pixels, patches that overlap
            sizes["stride"] = 8
    head = tensors.get("head.weight")
    if head is not None and head.dim() == 2 and head.shape[1] == d:
        sizes["num_classes"] = head.shape[0]
    return sizes


def compared(name: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes that a file must have to fit keywords of `Vim`."""
    needed = {**SIZES, **{k: v for k, v in sizes.items() if k in (*SIZES, "embed_dim", "dt_rank")}}
    if "img_size" not in sizes:  # at its own size the number of tokens tells the stride
        needed["stride"] = sizes.get("stride") or needed["patch_size"]
    return needed


# -- modules that hold the published tensors under the published names -------------------------------------------------


class PatchEmbed(nn.Module):
    def __init__(self, embed_dim: int, patch_size: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch_size, stride)


class Norm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Layer(nn.Module):
    def __init__(self, embed_dim: int, **sizes: Any):
        super().__init__()
        self.mixer = Mixer(embed_dim, **sizes)
        self.norm = Norm(embed_dim)


class Mixer(nn.Module):
    """The tensors of one bidirectional Mamba block; the arithmetic is `Block.mixer`."""

    def __init__(
        self, d: int, *, d_state: int, d_conv: int, expand: int, dt_rank: int | None, scan_type: str,
        layer_scale: float | None, bias: bool, conv_bias: bool,
    ):  # fmt: skip
        super().__init__()
        e, r = expand * d, dt_rank or math.ceil(d / 16)
        self.in_proj = nn.Linear(d, 2 * e, bias=bias)
        for twin in ("", "_b") if scan_type == "v2" else ("",):
            setattr(self, f"conv1d{twin}", nn.Conv1d(e, e, d_conv, groups=e, padding=d_conv - 1, bias=conv_bias))
            setattr(self, f"x_proj{twin}", nn.Linear(e, r + 2 * d_state, bias=False))
            setattr(self, f"dt_proj{twin}", nn.Linear(r, e))
            nn.init.uniform_(getattr(self, f"dt_proj{twin}").weight, -(r**-0.5), r**-0.5)
            setattr(self, f"D{twin}", nn.Parameter(torch.ones(e)))
        for name in ("A_log",) if scan_type == "none" else ("A_log", "A_b_log"):
            setattr(self, name, nn.Parameter(torch.arange(1, d_state + 1.0).log().repeat(e, 1)))
        with torch.no_grad():  # delta starts between 0.001 and 0.1, log-uniform
            dt = torch.exp(torch.rand(e) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).clamp(min=1e-4)
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        self.out_proj = nn.Linear(e, d, bias=bias)
        if layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((d,), layer_scale))


def mixer_alone(
    mod: Mixer, x: Tensor, *, scan_type="v2", divide_out=True, kernel="auto", seams: Seams = PLAIN
) -> Tensor:
    """One mixer outside a network, (b, l, d) -> (b, l, d): for tests and analysis."""
    holder = _Holder(scan_type, divide_out and scan_type == "v2", kernel)
    layer = nn.Module()
    layer.mixer = mod
    w = {f"mixer.{name}": t for name, t in mod.named_parameters()}
    if seams.acts("weights"):
        w.update(seams.weights(w))
    return Block(holder, layer, w, 0, seams, 0.0).mixer(x)  # type: ignore[arg-type]


class _Holder:
    def __init__(self, scan_type: str, divide_out: bool, kernel: str):
        self.scan_type, self.divide_out, self.kernel, self.name = scan_type, divide_out, kernel, "mixer"


def drop_rate(rate: float, i: int, depth: int) -> float:
    """Stochastic depth of block i: linear from 0, shifted by one block; the last rate belongs to the add before norm_f."""
    return 0.0 if i == 0 or depth < 2 else rate * (i - 1) / (depth - 1)


def _indices(indices: int | list[int] | None, depth: int) -> list[int]:
    if indices is None:
        return list(range(depth))
    if isinstance(indices, int):
        return list(range(depth - indices, depth))
    return [i % depth for i in indices]
