"""Scale and shift the features after every layer and norm (arXiv 2210.08823)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svp.methods._layers import UNKNOWN, is_vit, layers
from svp.methods.base import Method
from svp.options import option


class SSF(Method):
    """y = gamma · layer(x) + beta after each norm, projection and the patch embedding; folded into weight and bias.

    gamma starts N(1, init_std), beta N(0, init_std): near the frozen network, not at it. ViT: both norms, qkv, proj, fc1,
    fc2, patch embedding, last norm (direct). Vim (adapted): norm, in_proj, out_proj, patch embedding, last norm, and
    with `scan` x_proj and dt_proj of each direction; the shift after a norm without a bias is carried into in_proj's.
    Ours: the places on Vim; there a `repadapter` beside it does not meet the shift after the norm, which goes past it.
    Source: arXiv 2210.08823; repository dongzelian/SSF.
    """

    @dataclass(frozen=True)
    class Options:
        scan: bool = option(True, "Vim: also after x_proj and dt_proj")
        init_std: float = option(0.02, "spread of the start values; 0: the frozen network", low=0.0, high=1.0)

    paper = "arXiv 2210.08823 (NeurIPS 2022)"
    params_formula = (
        "2 · widths after all layers; ViT: depth (2·2 d + 2 (3 d + d + mlp + d)) + 4 d; "
        "Vim: depth 2 (d + 2 e + d + k (r + 2 n + e)) + 4 d, without scan no k term"
    )
    default_lr = 3e-3

    @classmethod
    def unfit(cls, site, opt):
        return None if layers(site, 0) else UNKNOWN

    @classmethod
    def label(cls, site, opt):
        return None if is_vit(site) else "ssf_vim"

    def __init__(self, site, opt, num_classes):
        super().__init__(site, opt, num_classes)
        inside = [
            name for i in range(len(site.blocks)) for layer, name in layers(site, i).items()
            if opt.scan or not layer.startswith(("x_proj", "dt_proj"))
        ]  # fmt: skip
        outside = ("patch_embed.proj", "norm", "fc_norm", "norm_f")
        self.names = inside + [name for name in outside if f"{name}.weight" in site.weights]
        self.has_bias = [f"{name}.bias" in site.weights or f"{name}.bias" in site.slots for name in self.names]
        widths = [site.weights[f"{name}.weight"].shape[0] for name in self.names]
        self.gamma = nn.ParameterList(1 + opt.init_std * torch.randn(width) for width in widths)
        self.beta = nn.ParameterList(opt.init_std * torch.randn(width) for width in widths)

    def weights(self, w):
        changed: dict[str, Tensor] = {}
        carried = None  # the shift of a norm that has no bias: the next layer adds it to its input
        for name, has_bias, gamma, beta in zip(self.names, self.has_bias, self.gamma, self.beta, strict=True):
            weight, bias = w[f"{name}.weight"], w.get(f"{name}.bias", torch.zeros_like(beta))
            bias = bias if carried is None else bias + weight @ carried
            shift = gamma * bias + beta
            changed[f"{name}.weight"] = gamma.view(-1, *[1] * (weight.dim() - 1)) * weight
            if has_bias:
                changed[f"{name}.bias"] = shift
            carried = None if has_bias else shift
        return changed
