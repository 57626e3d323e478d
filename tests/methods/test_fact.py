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
