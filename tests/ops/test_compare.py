"""What `svp doctor` measures: the right kernel is right, a wrong one is found."""

import pytest

from svp.ops import native
from svp.ops.compare import OPS, compare

SMALL = (1, 20, 12, 4)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kernel", ["reference", "cpu"])
def test_kernels_are_right(op, kernel):
    if kernel == "cpu" and not native.available:
        pytest.skip(native.reason)
    found = compare(op, kernel, shape=SMALL)
    assert found.is_right and 0 < found.error < 1e-5 and found.seconds > 0 and found.reference_seconds > 0


def test_a_wrong_kernel_is_found(monkeypatch):
    run, inputs = OPS["causal_conv1d"]
    monkeypatch.setitem(
        OPS,
        "causal_conv1d",
        (lambda kernel, **t: run(kernel="reference", **t) * (1.01 if kernel == "cpu" else 1), inputs),
    )
    assert not compare("causal_conv1d", "cpu", shape=SMALL).is_right
    monkeypatch.setitem(
        OPS,
        "causal_conv1d",
        (lambda kernel, **t: run(kernel="reference", **t) * (float("nan") if kernel == "cpu" else 1), inputs),
    )
    assert not compare("causal_conv1d", "cpu", shape=SMALL).is_right
