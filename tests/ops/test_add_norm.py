"""Add and norm on its kernels against its reference in float64."""

from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.inputs import GRAD, LAID, OUT, compare, compare_halves, run_with_grads, sum_inputs, sums
from support import assert_close
from svp.errors import SvpError
from svp.ops import native
from svp.ops.add_norm import Term, add_norm

compiled = pytest.mark.skipif(not native.available, reason=native.reason)
SCALES = {"channel": (37,), "scalar": (1,), "none": ()}


def compare_sums(acts, skip, inputs, frozen=(), scale=(), **options):
    # one scale for all channels has as its gradient one sum of terms of both signs
    compare(sums(acts, skip), inputs, "cpu", frozen, tolerances=(OUT, 2e-4 if scale == (1,) else GRAD), **options)


@pytest.mark.parametrize("leave_out", [(), ("residual",)])
@pytest.mark.parametrize("skip", [(), (0,), (1, 3)])
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("acts", [(), ("silu",), ("silu", "none"), ("gelu", "silu", "none", "silu")])
def test_kernel_is_the_reference(isa, acts, scale, skip, leave_out):
    compare_sums(acts, skip, sum_inputs(2, 17, 37, len(acts), scale, leave_out), scale=scale)


@compiled
@settings(max_examples=40)
@given(b=st.integers(0, 3), l=st.integers(1, 40), d=st.integers(1, 90), frozen=st.booleans(), residual=st.booleans())
def test_any_shape(b, l, d, frozen, residual):
    inputs = sum_inputs(b, l, d, 2, (d,), () if residual else ("residual",))
    compare_sums(("silu", "none"), (l // 2,), inputs, ("weight",) if frozen else (), scale=(d,))


@compiled
@pytest.mark.parametrize("names", [("x", "residual"), ("pre0", "pre1"), ("y",)], ids="+".join)
@pytest.mark.parametrize("how", LAID)
def test_however_the_tensors_lie(how, names):
    inputs = sum_inputs(2, 17, 37, 2, (37,))
    compare_sums(("silu", "none"), (3,), inputs, laid=dict.fromkeys(names, LAID[how]))


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    inputs = sum_inputs(2, 17, 37, 2, (37,))
    compare_halves(sums(("silu", "none"), (3,)), inputs, "cpu", dtype, wide=("residual", "weight", "scale0", "scale1"))


@compiled
def test_a_term_of_zero_changes_no_bit():
    x, pre = torch.randn(2, 9, 40), torch.randn(2, 9, 40)
    plain = add_norm(x, x * 2, torch.ones(40), 1e-5)
    for with_zero in (Term(pre, torch.zeros(40), "silu"), Term(pre, torch.zeros(1), "none")):
        got = add_norm(x, x * 2, torch.ones(40), 1e-5, terms=(with_zero, with_zero))
        assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


@compiled
def test_threads_change_nothing():
    op, inputs = sums(("silu", "silu"), (98,)), sum_inputs(4, 197, 96, 2, (96,))
    try:
        torch.set_num_threads(1)
        want = run_with_grads(op, inputs, torch.float32, "cpu")
        torch.set_num_threads(3)
        got = run_with_grads(op, inputs, torch.float32, "cpu")
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(got[name], t) for name, t in want.items())


@compiled
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck looks at it itself
def test_it_obeys_the_rules_of_torch_ops():
    import_module("svp.ops.add_norm.cpu")  # registers the op

    x, pre, scale, weight = (torch.randn(s, requires_grad=True) for s in ((2, 5, 8), (2, 5, 8), (8,), (8,)))
    args = (x, x.detach() + 1, pre, scale, None, None, weight, 1e-5, [True, False], [2])
    torch.library.opcheck(torch.ops.svp.add_norm_cpu.default, args)


@compiled
def test_a_second_derivative_is_refused_in_words():
    x = torch.randn(1, 3, 4, requires_grad=True)
    h, _ = add_norm(x, None, torch.ones(4), 1e-5, kernel="cpu")
    (grad,) = torch.autograd.grad(h.sum(), x, create_graph=True)
    with pytest.raises(SvpError, match="second derivatives"):
        grad.sum().backward()


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
