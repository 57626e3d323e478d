"""FacT beside its factorisation written out, block by block."""

import pytest
import torch

from methods.nets import net_of, stirred
from support import assert_close
from svp.model import adapt


@pytest.mark.parametrize("kind", ["tk", "tt"])
def test_fact_is_the_shared_factorisation(kind):
    """Each d x d block of a layer sees s V(U(x) T) of its own part of the input."""
    net = net_of("vit")
    model = stirred(adapt(net, "fact", num_classes=3, rank=3, kind=kind, scale=0.5))
    m, w = model.method, {name: p.detach() for name, p in net.named_parameters()}
    changed, j = m.weights(w), 0
    if kind == "tk":
        cores = [sum(m.P[s, block] * m.C[:, :, s] for s in range(3)) for block in range(24)]
    else:
        cores = list(m.T)
    for name, value in changed.items():
        rows, columns = (size // 16 for size in value.shape)
        x = torch.randn(5, 16 * columns, dtype=torch.float64)
        parts = []
        for a in range(rows):
            ways = [x[:, 16 * c : 16 * c + 16] @ m.U.T @ cores[j + a * columns + c] @ m.V.T for c in range(columns)]
            parts.append(0.5 * sum(ways))
        j += rows * columns
        assert_close(x @ value.T, (x @ w[name].T + torch.cat(parts, 1)).detach(), name, 1e-12)
    assert j == len(cores) == 24


def test_the_released_cut_of_the_mlp(images):
    """x U meets the four cores of fc1 side by side, (r, r, 4) read as (r, 4 r); fc2's the other way round."""
    net = net_of("vit")
    model = stirred(adapt(net, "fact", num_classes=3, rank=3, preset="published", scale=0.5))
    m, w = model.method, {name: p.detach() for name, p in net.named_parameters()}
    changed, cores = m.weights(w), torch.einsum("abs,sj->abj", m.C, m.P)
    x, wide = (torch.randn(5, d, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) for d in (16, 64))
    for i in range(2):
        fc1, fc2 = (cores[:, :, 12 * i + j : 12 * i + j + 4].reshape(3, 12) for j in (4, 8))
        up = ((x @ m.U.T @ fc1).reshape(5, 4, 3) @ m.V.T).flatten(1)
        down = (wide.reshape(5, 4, 16) @ m.U.T).flatten(1) @ fc2.T @ m.V.T
        for name, seen, added in (("fc1", x, up), ("fc2", wide, down)):
            name = f"blocks.{i}.mlp.{name}.weight"
            assert_close(seen @ changed[name].T, seen @ w[name].T + 0.5 * added, name, 1e-12)
        qkv = f"blocks.{i}.attn.qkv.weight"
        heads = [x @ m.U.T @ cores[:, :, 12 * i + j] @ m.V.T for j in range(3)]
        assert_close(x @ changed[qkv].T, x @ w[qkv].T + 0.5 * torch.cat(heads, 1), qkv, 1e-12)


def test_cores_of_a_wide_input_start_as_one_layer_over_it():
    m = adapt(net_of("vit"), "fact", num_classes=3, rank=8, kind="tt", probe=False).method
    largest = m.T.detach().abs().amax((1, 2)).unflatten(0, (2, 12))
    assert (largest[:, :8] > 0.9 / 8**0.5 * 0.9).all() and (largest[:, 8:] <= 1 / 32**0.5).all()
