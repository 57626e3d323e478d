"""The rows: our step, and what it is measured against. Each builds a Step, or says why it cannot."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svp.backbones.base import Backbone
from svp.backbones.vit import Vit
from svp.data.transforms import seeded
from svp.model import adapt
from svp.seams import Seams, Stack
from svp.studies.bench.setting import CLASSES, PROMPTS, Setting, Step

Scan = Callable[..., Tensor]


class Peer(NamedTuple):
    """A row: what it is, how its step is built, why it cannot be had (or None); slow ones may run on a part of the depth."""

    about: str
    build: Callable[[Setting], Step]
    missing: Callable[[Setting], str | None] = lambda setting: None
    is_slow: bool = False
    by_default: bool = True


# -- ours --------------------------------------------------------------------------------------------------------------


def ours(setting: Setting) -> Step:
    model = setting.adapted(setting.network())
    return Step(setting, model)


def checkpointed(setting: Setting) -> Step:
    """Each block computed again in the backward pass."""
    model = setting.adapted(setting.network())
    return Step(setting, model, around=model.backbone.set_grad_checkpointing)


def compiled(setting: Setting) -> Step:
    model = setting.adapted(setting.network())
    return Step(setting, model, torch.compile(model))


def reference(setting: Setting) -> Step:
    return checkpointed(setting.but(kernel="reference"))


# -- other people's scans in the place of ours -------------------------------------------------------------------------


class Plugged(Seams):
    """The mixer of every block written out in plain PyTorch, with a scan given from outside.

    scan(u, delta, A, B, C, D) with u, delta (b, l, e), A (e, n), B, C (b, l, n) and the step size as it is -> (b, l, e)
    """

    def __init__(self, net: Backbone, scan: Scan):
        self.net, self.scan = net, scan
        self.w: dict[str, Tensor] = {}

    def weights(self, w):
        self.w = dict(w)  # those in force, for the mixers below
        return {}

    def branch(self, x, h, i, kind, run):
        mixer = f"layers.{i}.mixer."
        w = {name.removeprefix(mixer): t for name, t in self.w.items() if name.startswith(mixer)}
        xz = F.linear(h, w["in_proj.weight"], w.get("in_proj.bias"))
        x, z = xz.chunk(2, dim=-1)
        y = self.one_way(w, x, "", "A_log") + self.one_way(w, x.flip(1), "_b", "A_b_log").flip(1)
        y = y * F.silu(z) * (0.5 if self.net.divide_out else 1.0)
        return F.linear(y, w["out_proj.weight"], w.get("out_proj.bias"))

    def one_way(self, w: dict[str, Tensor], x: Tensor, twin: str, a_name: str) -> Tensor:
        taps, l = w[f"conv1d{twin}.weight"], x.shape[1]
        u = F.conv1d(
            x.transpose(1, 2), taps, w.get(f"conv1d{twin}.bias"), padding=taps.shape[2] - 1, groups=taps.shape[0]
        )
        u = F.silu(u[..., :l]).transpose(1, 2)
        A = -torch.exp(w[a_name].float())
        n = A.shape[1]
        r = w[f"dt_proj{twin}.weight"].shape[1]
        dt, B, C = F.linear(u, w[f"x_proj{twin}.weight"]).split([r, n, n], dim=-1)
        delta = F.softplus(F.linear(dt, w[f"dt_proj{twin}.weight"], w[f"dt_proj{twin}.bias"]))
        return self.scan(u, delta, A, B, C, w[f"D{twin}"])


def plugged(scan: Callable[[], Scan], recompute: bool) -> Callable[[Setting], Step]:
    def build(setting: Setting) -> Step:
        model = setting.adapted(setting.network())
        net = model.backbone
        seams = Stack([model.method, Plugged(net, scan())])

        def forward(images: Tensor) -> Tensor:
            return model.head(net.features(images, seams))

        return Step(setting, model, forward, net.set_grad_checkpointing if recompute else lambda _: None)

    return build


def mambapy_scan() -> Scan:
    from mambapy.pscan import pscan

    def scan(u, delta, A, B, C, D):
        h = pscan(torch.exp(delta[..., None] * A), (delta * u)[..., None] * B[:, :, None])  # (b, l, e, n)
        return (h @ C[..., None]).squeeze(3) + D * u

    return scan


def mamba_ssm_scan() -> Scan:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def scan(u, delta, A, B, C, D):
        u, delta, B, C = (t.transpose(1, 2).contiguous() for t in (u, delta, B, C))
        return selective_scan_fn(u, delta.to(u.dtype), A, B, C, D.float()).transpose(1, 2)

    return scan


def absent(package: str, device: str | None = None) -> Callable[[Setting], str | None]:
    def why(setting: Setting) -> str | None:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        if device is not None and not setting.device.startswith(device):
            return f"{package} needs {device}, the device is {setting.device}"
        net: Any = setting.shape()
        return None if net.scan_type == "v2" else f"its scan is plugged into two directions, this has {net.scan_type}"

    return why


# -- the ViT of equal width --------------------------------------------------------------------------------------------


def twin_sizes(setting: Setting) -> dict[str, Any]:
    """Keywords of timm's VisionTransformer: as wide as the Vim, half as many blocks, as many tokens; Vim-S gives DeiT-S."""
    net: Any = setting.shape()
    heads = max(net.embed_dim // 64, 1)
    while net.embed_dim % heads:
        heads -= 1
    side = net.stride * net.grid[0]
    return dict(img_size=side, patch_size=net.stride, embed_dim=net.embed_dim, depth=max(net.depth // 2, 1),
                num_heads=heads, num_classes=CLASSES)  # fmt: skip


class PromptedVit(nn.Module):
    """timm's VisionTransformer, frozen, with prompts of its own before every block: VPT-deep as short as it can be."""

    def __init__(self, sizes: dict[str, Any], prompts: int = PROMPTS):
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer

        self.net: Any = VisionTransformer(**sizes).requires_grad_(False)
        d, depth = sizes["embed_dim"], sizes["depth"]
        self.prompts = nn.Parameter(torch.empty(depth, prompts, d).uniform_(-0.1, 0.1))
        self.head = nn.Linear(d, sizes["num_classes"])
        self.net.head = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        net, count = self.net, self.prompts.shape[1]
        x = net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(images))))
        cls, patches = x[:, :1], x[:, 1:]
        for block, prompt in zip(net.blocks, self.prompts, strict=True):
            x = block(torch.cat([cls, prompt.expand(len(x), -1, -1), patches], dim=1))
            cls, patches = x[:, :1], x[:, 1 + count :]
        return self.head(net.norm(cls)[:, 0])


def vit(setting: Setting) -> Step:
    with seeded(0):
        model = PromptedVit(twin_sizes(setting)).to(setting.device)
    return Step(setting, model, _resized(model, setting))


def vpt(setting: Setting) -> Step:
    """The same through our own seams: what their generality costs."""
    sizes = twin_sizes(setting)
    with seeded(0):
        net = Vit("vit", **sizes).to(setting.device).eval()
    for p in net.parameters():
        p.requires_grad_(False)
    model = adapt(net, ("vpt", {"num_tokens": PROMPTS, "dropout": 0.0}), num_classes=CLASSES, probe=False)
    model.to(setting.device).train()
    return Step(setting, model, _resized(model, setting))


def _resized(model: Callable[[Tensor], Tensor], setting: Setting) -> Callable[[Tensor], Tensor]:
    """A Vim whose patches overlap sees a margin more than the ViT with as many tokens."""
    net: Any = setting.shape()
    height, width = (net.stride * side for side in net.grid)
    return lambda images: model(images[:, :, :height, :width])


PEERS: dict[str, Peer] = {
    "ours": Peer("this package", ours),
    "checkpointed": Peer("ours, with gradient checkpointing", checkpointed),
    "compiled": Peer("ours, through torch.compile", compiled, by_default=False),
    "reference": Peer("the plain loop that defines the scan", reference, is_slow=True),
    "pscan": Peer(
        "mambapy's parallel scan in our blocks", plugged(mambapy_scan, True), absent("mambapy"), is_slow=True
    ),
    "mamba_ssm": Peer(
        "mamba_ssm's CUDA scan in our blocks", plugged(mamba_ssm_scan, False), absent("mamba_ssm", "cuda")
    ),
    "vit": Peer(f"timm's ViT of equal width, {PROMPTS} prompts before every block", vit),
    "vpt": Peer("the same ViT through our method vpt", vpt),
}
