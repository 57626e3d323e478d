"""Add and norm on its kernels against its reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support import assert_close
from svp.errors import SvpError
from svp.ops import native
from svp.ops.add_norm import Term, add_norm

compiled = pytest.mark.skipif(not native.available, reason=native.reason)
SCALES = {"channel": lambda d: (d,), "scalar": lambda d: (1,), "none": lambda d: None}


def run(dtype, kernel, b, l, d, acts, scale, skip, residual, frozen=False):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    leaves = {"x": normal(b, l, d), "weight": normal(d).requires_grad_(not frozen)}
    if residual:
        leaves["residual"] = normal(b, l, d)
    terms = []
    for j, act in enumerate(acts):
        leaves[f"pre{j}"] = normal(b, l, d)
        if scale != "none":
            leaves[f"scale{j}"] = normal(*SCALES[scale](d))
        terms.append(Term(leaves[f"pre{j}"], leaves.get(f"scale{j}"), act))
    h, stream = add_norm(
        leaves["x"], leaves.get("residual"), leaves["weight"], 1e-5, terms=tuple(terms), skip=skip, kernel=kernel
    )
    weights = (torch.randn(h.shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    sum((t * w).sum() for t, w in zip((h, stream), weights, strict=True)).backward()
    return {
        "h": h.detach(),
        "stream": stream.detach(),
        **{f"d{name}": t.grad for name, t in leaves.items() if t.requires_grad},
    }


def compare(*case, **options):
    want = run(torch.float64, "reference", *case, **options)
    for name, t in run(torch.float32, "cpu", *case, **options).items():
        # a gradient is a difference of terms as large as the sums they cancel in: one number per channel, so absolute
        scale = max(1.0, float(want[name].abs().max()) if want[name].numel() else 1.0)
        assert (t.double() - want[name]).abs().max() <= 1e-5 * scale if t.numel() else True, name
        assert t.shape == want[name].shape


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("skip", [(), (0,), (1, 3)])
@pytest.mark.parametrize("scale", ["channel", "scalar", "none"])
@pytest.mark.parametrize("acts", [(), ("silu",), ("silu", "none"), ("gelu", "silu", "none", "silu")])
def test_kernel_is_the_reference(isa, acts, scale, skip, residual):
    compare(2, 17, 37, acts, scale, skip, residual)


@compiled
@settings(max_examples=40)
@given(b=st.integers(0, 3), l=st.integers(1, 40), d=st.integers(1, 90), frozen=st.booleans(), residual=st.booleans())
def test_any_shape(b, l, d, frozen, residual):
    compare(b, l, d, ("silu", "none"), "channel", (l // 2,), residual, frozen=frozen)


@compiled
def test_a_term_of_zero_changes_no_bit():
    x, pre = torch.randn(2, 9, 40), torch.randn(2, 9, 40)
    plain = add_norm(x, x * 2, torch.ones(40), 1e-5)
    for with_zero in (Term(pre, torch.zeros(40), "silu"), Term(pre, torch.zeros(1), "none")):
        got = add_norm(x, x * 2, torch.ones(40), 1e-5, terms=(with_zero, with_zero))
        assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


@compiled
def test_threads_change_nothing():
    case = (4, 197, 96, ("silu", "silu"), "channel", (98,), True)
    try:
        torch.set_num_threads(1)
        want = run(torch.float32, "cpu", *case)
        torch.set_num_threads(3)
        got = run(torch.float32, "cpu", *case)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(got[name], t) for name, t in want.items())


@compiled
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck looks at it itself
def test_it_obeys_the_rules_of_torch_ops():
    x, pre, scale, weight = (torch.randn(s, requires_grad=True) for s in ((2, 5, 8), (2, 5, 8), (8,), (8,)))
    args = (x, x.detach() + 1, pre, scale, None, None, weight, 1e-5, [True, False], [2])
    torch.library.opcheck(torch.ops.svp.add_norm_cpu.default, args)


def test_shapes_that_do_not_belong_together():
    x = torch.randn(1, 3, 4)
    with pytest.raises(SvpError, match=r"expected \(b, l, d\)"):
        add_norm(x, x[:, :2], torch.ones(4), 1e-5)
    with pytest.raises(SvpError, match="float64"):
        add_norm(x.double(), None, torch.ones(4), 1e-5, kernel="cpu")


def test_the_reference_is_the_formula():
    x, r, w = (
        torch.randn(2, 3, 4, dtype=torch.float64),
        torch.randn(2, 3, 4, dtype=torch.float64),
        torch.rand(4).double(),
    )
    h, stream = add_norm(x, r, w, 1e-5)
    assert_close(stream, x + r, "stream")
    assert_close(h, stream / (stream.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w, "h")
