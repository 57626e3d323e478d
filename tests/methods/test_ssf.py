"""SSF is a scale and a shift behind each layer, written as hooks here."""

import copy

import torch

from methods.nets import net_of, stirred
from support import assert_close
from svp.model import adapt
from svp.seams import Seams


def hooked(net, layers, change):
    """A copy whose layers' outputs go through change(name, y)."""
    net = copy.deepcopy(net)
    for name in layers:
        net.get_submodule(name).register_forward_hook(lambda _m, _x, y, name=name: change(name, y))
    return net


def test_ssf_on_a_vit_is_a_hook_on_each_layer(images):
    """timm's own forward with gamma y + beta after each layer."""
    from timm.models.vision_transformer import VisionTransformer

    net = net_of("vit")
    model = stirred(adapt(net, "ssf", num_classes=3)).eval()
    plain = (
        VisionTransformer(embed_dim=16, depth=2, num_heads=2, patch_size=4, img_size=16, num_classes=0).double().eval()
    )
    plain.load_state_dict({k: t for k, t in net.state_dict().items() if not k.startswith("head.")})
    m = model.method
    rows = {name: (g, b) for name, g, b in zip(m.names, m.gamma, m.beta, strict=True)}
    assert len(rows) == 2 * 6 + 2

    def change(name, y):
        gamma, beta = rows[name]
        if y.dim() == 4:
            return y * gamma[:, None, None] + beta[:, None, None]
        return y * gamma + beta

    with torch.no_grad():
        assert_close(model.features(images), hooked(plain, rows, change)(images), "feature", 1e-10)


class ShiftedNorms(Seams):
    """gamma h + beta after the norm of each block."""

    def __init__(self, rows):
        self.rows = rows

    def branch(self, x, h, i, kind, run):
        gamma, beta = self.rows[f"layers.{i}.norm"]
        return run(gamma * h + beta)


def test_ssf_on_vim_is_a_hook_on_each_layer(images):
    net = net_of("vim")
    model = stirred(adapt(net, "ssf", num_classes=3)).eval()
    m = model.method
    rows = {name: (g.detach(), b.detach()) for name, g, b in zip(m.names, m.gamma, m.beta, strict=True)}
    assert len(rows) == 2 * 7 + 2
    inside = [name for name in rows if ".mixer." in name]
    slow = hooked(net, inside, lambda name, y: y * rows[name][0] + rows[name][1])
    gamma, beta = rows["patch_embed.proj"]
    with torch.no_grad():
        slow.patch_embed.proj.weight *= gamma[:, None, None, None]
        slow.patch_embed.proj.bias.mul_(gamma).add_(beta)
        feature = slow.features(images, ShiftedNorms(rows))
        gamma, beta = rows["norm_f"]
        assert_close(model.features(images), feature * gamma + beta, "feature", 1e-10)
