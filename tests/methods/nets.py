"""Small networks in float64, and adapted ones that look trained."""

import torch

from svp.backbones.vim import Vim
from svp.backbones.vit import Vit


def net_of(kind, **more):
    torch.manual_seed(0)
    if kind == "vim":
        net = Vim(
            **{**dict(embed_dim=16, depth=2, d_state=4, dt_rank=2, patch_size=4, img_size=16, num_classes=3), **more}
        )
    else:
        net = Vit(
            "vit", **{**dict(embed_dim=16, depth=2, num_heads=2, patch_size=4, img_size=16, num_classes=3), **more}
        )
    net = net.double().eval()
    with torch.no_grad():  # trained-looking values: zeros hide what a method does
        for p in net.parameters():
            p += 0.05 * torch.randn(p.shape, dtype=p.dtype)
    return net


def stirred(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model
