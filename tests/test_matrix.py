"""Every method on every family of backbones, generated from the registries: a new file is tested before its author has."""

import pytest
import torch

import svp
from svp.errors import SvpError
from svp.registry import BACKBONES

TINY = {  # one small backbone of each family
    "vim_nano": dict(depth=3, img_size=32),
    "vit_nano": dict(depth=3, img_size=32),
}
FAMILIES = {entry.module for entry in BACKBONES.entries().values() if entry.entry_point is None}


def test_every_family_has_a_tiny_one():
    assert {BACKBONES.get(name).module for name in TINY} == FAMILIES


@pytest.mark.parametrize("backbone", TINY)
@pytest.mark.parametrize("method", svp.list_methods())
def test_every_method_on_every_backbone(method, backbone):
    net = svp.create_backbone(backbone, **TINY[backbone])
    before = {key: value.clone() for key, value in net.state_dict().items()}
    try:
        model = svp.adapt(net, method, num_classes=5)  # ends with the effect probe
    except SvpError as err:
        if f"{method} cannot act on {net.name}" not in err.problem:
            raise
        pytest.skip(err.problem)
    images = torch.randn(2, 3, *model.preprocessing.crop, generator=torch.Generator().manual_seed(0))
    torch.nn.functional.cross_entropy(model(images), torch.tensor([0, 4])).backward()
    trained = dict(model.named_parameters())  # of method and head: the backbone is not registered
    assert trained
    for name, p in trained.items():
        assert not p.requires_grad or (p.grad is not None and p.grad.isfinite().all()), name
    for name, p in net.named_parameters():
        assert p.grad is None and torch.equal(p, before[name]), name
