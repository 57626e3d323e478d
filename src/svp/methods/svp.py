"""Selective Visual Prompting: every patch token gets a prompt computed from itself (arXiv 2412.08947)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from svp.errors import SvpError
from svp.methods._layers import is_vit
from svp.methods.base import Method, fresh_linear
from svp.ops.add_norm import Term
from svp.ops.add_norm.reference import ACTIVATIONS, with_terms
from svp.options import option

Activation = Literal["none", "silu", "gelu", "relu"]


class SVP(Method):
    """p_i = alpha * cross(x_i) + beta * inner(x_i) is added to every patch token at the input of each block (Eq. 4-7).

    The inner generator (Eq. 5) belongs to one block, the cross generator (Eq. 4) to `shared_layers` consecutive ones.
    alpha and beta start at zero, so training starts at the frozen network. The class token is not prompted.

    Where paper and released code differ, the default is the paper's definition with the code's answers to what the paper
    leaves open (activation, biases, where the prompt enters): preset "paper". preset "published" is the released code:
    the second half of the tokens gets the cross prompt of the (already prompted) first half. preset "literal" reads the
    paper to the letter: generators read the residual stream, no activation on the cross path, alpha of each block.
    Source: arXiv 2412.08947 Eq. 4-9; repository zhoujiahuan1991/AAAI2025-SVP, svp/model/models_mamba.py.
    """

    @dataclass(frozen=True)
    class Options:
        inner: bool = option(True, "the inner path, one generator a block (Eq. 5)")
        cross: bool = option(True, "the cross path, one generator a group of blocks (Eq. 4)")
        hidden: int | Literal["relative"] = option(
            64, "width of the inner generator; relative: round(64 d / 384)", low=1, high=65_536
        )
        inner_mid_act: Activation = option("none", "activation between down and up")
        inner_act: Activation = option("silu", "activation at the end of the inner path")
        cross_kind: Literal["linear", "bottleneck"] = option(
            "linear", "cross generator: one d x d layer, or down and up"
        )
        cross_hidden: int | None = option(
            None, "width of a bottleneck cross generator; none: hidden", low=1, high=65_536
        )
        cross_act: Activation = option("silu", "activation at the end of the cross path")
        bias: bool = option(True, "biases in the generators")
        shared_layers: int = option(8, "blocks that share one cross generator; paper: 4, 6, 8 or 12", low=1)
        cross_scale: Literal["group", "layer"] = option("group", "alpha of each group (code) or of each block (figure)")
        scale_init: float = option(0.0, "start value of alpha and beta")
        scale_kind: Literal["channel", "scalar", "none"] = option("channel", "alpha, beta: a vector, one number, or 1")
        prompt_cls: bool = option(False, "also prompt the class token")
        cross_source: Literal["token", "first_half"] = option("token", "Eq. 4, or the released code's first half")
        gen_input: Literal["hidden", "sum", "normed"] = option(
            "hidden", "generators read the previous block's output, the residual stream, or the normed stream"
        )
        add_to: Literal["stream", "branch"] = option(
            "stream", "stays in the residual, or enters this block's mixer only"
        )
        layers: tuple[int, ...] | None = option(None, "which blocks are prompted; none: all")
        dropout: float = option(0.0, "on generator outputs, before the scales", low=0.0, high=0.9)
        input_filter: Literal["none", "simam"] = option("none", "SimAM on the input picture")
        generator_init: Literal["torch", "zero_up", "trunc02"] = option("torch", "start values of the generators")

    PRESETS = {
        "paper": {},
        "published": dict(cross_source="first_half"),
        "literal": dict(gen_input="sum", cross_act="none", cross_scale="layer"),
    }
    paper = "arXiv 2412.08947 (AAAI 2025)"
    params_formula = (
        "depth (2 d h + h + d) + G (d² + d) + depth d + G d, with G = ceil(depth / shared_layers), h = hidden"
    )
    default_lr = 1e-2
    acts_before_blocks = True

    @classmethod
    def unfit(cls, site, opt):
        depth = len(site.blocks)
        outside = [i for i in opt.layers or () if not 0 <= i < depth]
        if opt.layers == ():
            return f"layers is empty: name some of the blocks 0…{depth - 1}, or none for all"
        if outside:
            return f"layer {outside[0]} is out of range: {site.name} has blocks 0…{depth - 1}"
        if opt.add_to == "branch" and opt.gen_input == "hidden" and not is_vit(site):
            return 'add_to "branch" meets the residual stream, no hidden output alone: it needs gen_input "sum" or "normed"'
        if opt.add_to == "branch" and opt.cross_source == "first_half":
            return 'add_to "branch" needs cross_source "token"'
        if opt.add_to == "branch" and ("reg_token" in site.weights or ("cls_token" in site.weights and not site.cls)):
            return f'add_to "branch" knows patches and class tokens that are read, {site.name} has others'
        if opt.cross_source == "first_half":
            patches = site.grid[0] * site.grid[1]
            if site.cls != (patches // 2,) or patches % 2:
                return (
                    f'cross_source "first_half" needs one class token in the middle of an even number of patches; '
                    f"{site.name} has {patches} patches and class tokens at {list(site.cls)}"
                )
            if opt.prompt_cls:
                return 'cross_source "first_half" leaves the class token alone: prompt_cls cannot be true'
        ends = [act for is_on, act in ((opt.inner, opt.inner_act), (opt.cross, opt.cross_act)) if is_on]
        if opt.generator_init == "zero_up" and "relu" in ends:
            return 'generator_init "zero_up" never learns behind a relu, whose slope at zero is zero'
        if opt.generator_init == "zero_up" and opt.scale_kind != "none" and opt.scale_init == 0:
            return 'generator_init "zero_up" never learns where alpha and beta start at zero too: scale_init=1, or scale_kind=none'
        return None

    def __init__(self, site, opt, num_classes):
        super().__init__(site, opt, num_classes)
        self.cls, self.num_tokens = site.cls, site.grid[0] * site.grid[1] + len(site.cls)
        widths = [block.width for block in site.blocks]
        self.group = site.groups(opt.shared_layers)  # block -> group
        group_widths = dict(zip(self.group, widths, strict=True)).values()
        prompted = set(range(len(widths)) if opt.layers is None else opt.layers)
        self.prompted = sorted(prompted)
        used = {self.group[i] for i in prompted}
        self.inner = nn.ModuleDict(
            {
                str(i): Generator(d, relative(opt.hidden, d), opt.inner_act, opt.inner_mid_act, opt)
                for i, d in enumerate(widths)
                if opt.inner and i in prompted
            }
        )
        cross_hidden, narrow = opt.cross_hidden or opt.hidden, opt.cross_kind == "bottleneck"
        self.cross = nn.ModuleDict(
            {
                str(g): Generator(d, relative(cross_hidden, d) if narrow else None, opt.cross_act, "none", opt)
                for g, d in enumerate(group_widths)
                if opt.cross and g in used
            }
        )
        self.beta = _scales(opt, {i: widths[i] for i in self.prompted} if opt.inner else {})
        alphas = {i: widths[i] for i in self.prompted} if opt.cross_scale == "layer" else dict(enumerate(group_widths))
        self.alpha = _scales(opt, {k: d for k, d in alphas.items() if k in (prompted if opt.cross_scale == "layer" else used)}
                             if opt.cross else {})  # fmt: skip
        self.drop = nn.Dropout(opt.dropout)

    def acts(self, seam):
        prompts = bool(self.prompted) and (self.opt.inner or self.opt.cross)
        return {
            "network": self.opt.input_filter != "none",
            "block": prompts and self.opt.add_to == "stream",
            "branch": prompts and self.opt.add_to == "branch",
        }.get(seam, False)

    def network(self, images, run):
        return run(simam(images) if self.opt.input_filter == "simam" else images)[0]

    def block(self, tokens, i, run):
        if i not in self.prompted or not self.acts("block"):
            return run(tokens)
        x = {"hidden": lambda: tokens.x, "sum": lambda: tokens.stream, "normed": lambda: run.norm(tokens.stream)}
        read = x[self.opt.gen_input]()
        if self.opt.cross_source == "token" and read.shape[1] == len(tokens.patches) + len(tokens.cls):
            return run(tokens, self.terms(read, i), () if self.opt.prompt_cls else tokens.cls)
        at = tokens.patches
        if self.opt.prompt_cls:
            at = torch.cat([at, at.new_tensor(tokens.cls)]).sort().values
        return run(tokens.add(self.prompt(read[:, at], i), at))

    def branch(self, x, h, i, kind, run):
        if i not in self.prompted or not self.acts("branch") or kind == "mlp":  # what mixes tokens reads the prompts
            return run(h)
        source = h if self.opt.gen_input == "normed" else x
        at = [t for t in range(self.num_tokens) if self.opt.prompt_cls or t not in self.cls]
        if h.shape[1] != self.num_tokens:
            raise SvpError(
                f'add_to "branch" knows {self.num_tokens} tokens, block {i} holds {h.shape[1]}',
                'use add_to "stream" beside a method that inserts tokens', kind="usage",
            )  # fmt: skip
        return run(h.index_add(1, torch.tensor(at, device=h.device), self.prompt(source[:, at], i).to(h.dtype)))

    def prompt(self, x: Tensor, i: int) -> Tensor:
        """x (b, p, d) the tokens to prompt -> their prompts (b, p, d) at block i (Eq. 6)."""
        if self.opt.cross_source == "token" or not self.opt.cross:
            return sum_of(self.terms(x, i))
        inner = sum_of(self.terms(x, i, cross=False)) if self.opt.inner else None
        generate, scale = self.cross_of(i)
        half = x.shape[1] // 2  # released code: the second half reads the first, which is prompted by then
        first = x[:, :half]
        prompt = self.scaled(self.alpha, scale, self.drop(generate(first)))
        prompt = prompt if inner is None else prompt + inner[:, :half]
        second = self.scaled(self.alpha, scale, self.drop(generate(first + prompt)))
        second = second if inner is None else second + inner[:, half:]
        return torch.cat([prompt, second], dim=1)

    def terms(self, x: Tensor, i: int, cross: bool = True) -> tuple[Term, ...]:
        """The summands of the prompts of x (b, p, d) at block i, before activation and scale where these can wait."""
        found = []
        if self.opt.cross and cross:
            generate, scale = self.cross_of(i)
            found.append(self.term(generate, x, self.scale_of(self.alpha, scale), self.opt.cross_act))
        if self.opt.inner:
            found.append(self.term(self.inner[str(i)], x, self.scale_of(self.beta, i), self.opt.inner_act))
        return tuple(found)

    def term(self, generate: Generator, x: Tensor, scale: Tensor | None, act: str) -> Term:
        if self.drop.p:
            return Term(self.drop(generate(x)), scale)
        return Term(generate.before_act(x), scale, act)

    def cross_of(self, i: int) -> tuple[Generator, int]:
        """The cross generator of block i, and the key of its scale."""
        g = self.group[i]
        return self.cross[str(g)], i if self.opt.cross_scale == "layer" else g  # type: ignore[return-value]

    def groups(self):
        """The released code keeps all scales in two 2-d tensors, which its weight decay reaches: so ours are decayed too."""
        return {"alpha.*": {"decay_scale": 1.0}, "beta.*": {"decay_scale": 1.0}}

    def scale_of(self, scales: nn.ParameterDict, key: int) -> Tensor | None:
        return None if self.opt.scale_kind == "none" else scales[str(key)]

    def scaled(self, scales: nn.ParameterDict, key: int, p: Tensor) -> Tensor:
        scale = self.scale_of(scales, key)
        return p if scale is None else scale * p


def from_published(tensors: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Tensors under the released code's names -> under ours; prompt_scale always has 24 rows there, ours has `depth`.

    Heads are left alone: `head.weight` or `head.0.weight` … are not the method's.
    """
    ours: dict[str, Tensor] = {}
    for name, t in tensors.items():
        if name == "prompt_scale":
            ours |= {f"beta.{i}": t[i] for i in range(depth)}
        elif name == "prompt_shared_scale":
            ours |= {f"alpha.{g}": row for g, row in enumerate(t)}
        elif name.startswith("prompt_generator_shared."):
            _, g, _, leaf = name.split(".")
            ours[f"cross.{g}.proj.{leaf}"] = t
        elif name.startswith("prompt_generator."):
            _, i, part, leaf = name.split(".")
            ours[f"inner.{i}.{('down', 'up')[int(part)]}.{leaf}"] = t
    return ours


class Generator(nn.Module):
    """act(up(mid_act(down(x)))) with a hidden width, or act(proj(x)) without."""

    def __init__(self, d: int, hidden: int | None, act: str, mid_act: str, opt: Any):
        super().__init__()
        first = "trunc02" if opt.generator_init == "trunc02" else "torch"
        last = {"torch": "torch", "zero_up": "zero", "trunc02": "trunc02"}[opt.generator_init]
        self.hidden, self.act, self.mid_act = hidden, ACTIVATIONS[act], ACTIVATIONS[mid_act]
        if hidden is None:
            self.proj = fresh_linear(d, d, opt.bias, last)
        else:
            self.down, self.up = fresh_linear(d, hidden, opt.bias, first), fresh_linear(hidden, d, opt.bias, last)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.before_act(x))

    def before_act(self, x: Tensor) -> Tensor:
        return self.proj(x) if self.hidden is None else self.up(self.mid_act(self.down(x)))


def sum_of(terms: tuple[Term, ...]) -> Tensor:
    return with_terms(torch.zeros_like(terms[0].pre), terms, ())


def relative(hidden: int | str, width: int) -> int:
    """The hidden width: as given, or in the proportion 64 : 384 to the block's width."""
    return max(1, round(64 * width / 384)) if hidden == "relative" else int(hidden)


def simam(images: Tensor) -> Tensor:
    """Each pixel weighted by how far it stands out of its channel: the filter `input_relu` of the released code.

    images (b, 3, H, W) normalised -> the same shape. Source: repository zhoujiahuan1991/AAAI2025-SVP, simam_module.
    """
    n = images.shape[2] * images.shape[3] - 1
    q = (images - images.mean(dim=(2, 3), keepdim=True)).square()
    energy = q / (4 * (q.sum(dim=(2, 3), keepdim=True) / n + 1e-3)) + 0.5
    return images * torch.sigmoid(energy)


def _scales(opt: Any, widths: dict[int, int]) -> nn.ParameterDict:
    """alpha or beta: one vector, number or nothing for each block or group."""
    if opt.scale_kind == "none":
        return nn.ParameterDict()
    sizes = {key: d if opt.scale_kind == "channel" else 1 for key, d in widths.items()}
    return nn.ParameterDict({str(key): nn.Parameter(torch.full((d,), opt.scale_init)) for key, d in sizes.items()})
