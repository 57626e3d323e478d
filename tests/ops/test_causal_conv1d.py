"""The convolution's kernels against its reference in float64, and what must hold of any of them."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.inputs import LAID, OUT, compare, compare_halves, conv_inputs, run_with_grads
from support import assert_close
from svp.errors import SvpError
from svp.ops import causal_conv1d, causal_conv1d_fn, native

compiled = pytest.mark.skipif(not native.available, reason=native.reason)


def compare_convs(inputs, frozen=(), **options):
    compare(causal_conv1d, inputs, "cpu", frozen, tolerances=(OUT, OUT), **options)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    "b,l,e,taps", [(1, 1, 1, 4), (2, 2, 70, 4), (2, 63, 65, 4), (1, 197, 17, 3), (1, 40, 3, 1), (1, 70, 33, 7)]
)
def test_kernel_is_the_reference(isa, b, l, e, taps, activation, reverse):
    compare_convs(conv_inputs(b, l, e, taps), activation=activation, reverse=reverse)


@compiled
@settings(max_examples=60)
@given(
    b=st.integers(0, 2), l=st.sampled_from([0, 1, 2, 3, 4, 15, 16, 17, 31, 32, 33, 35, 196, 197]), e=st.integers(1, 80),
    taps=st.sampled_from([1, 2, 3, 4, 4, 5]), seed=st.integers(0, 99), silu=st.booleans(), reverse=st.booleans(),
    leave_out=st.sets(st.sampled_from(["bias", "past"])), frozen=st.sets(st.sampled_from(["weight", "bias", "past"])),
)  # fmt: skip
def test_any_shape(b, l, e, taps, seed, silu, reverse, leave_out, frozen):
    inputs = conv_inputs(b, l, e, taps, seed, leave_out)
    compare_convs(inputs, frozen & set(inputs), activation="silu" if silu else None, reverse=reverse)


@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_it_is_torchs_convolution(kernel):
    t = {name: t.float() for name, t in conv_inputs(2, 11, 6, 4, leave_out=("past",)).items()}
    want = F.conv1d(t["x"].mT, t["weight"][:, None], t["bias"], padding=3, groups=6)[..., :11].mT
    assert_close(causal_conv1d(**t, kernel=kernel), want, "y", 1e-6)


@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_reverse_is_a_flip_on_both_sides(kernel):
    t = {name: t.float() for name, t in conv_inputs(2, 11, 6, 4).items()}
    want = causal_conv1d(**t | {"x": t["x"].flip(1)}, kernel=kernel).flip(1)
    assert_close(causal_conv1d(**t, reverse=True, kernel=kernel), want, "y", 1e-6)


def test_threads_change_nothing(isa):
    inputs = conv_inputs(3, 50, 300, 4)
    try:
        torch.set_num_threads(1)
        want = run_with_grads(causal_conv1d, inputs, torch.float32, "cpu", activation="silu")
        torch.set_num_threads(3)
        got = run_with_grads(causal_conv1d, inputs, torch.float32, "cpu", activation="silu")
    finally:
        torch.set_num_threads(1)
    for name, t in want.items():
        assert torch.equal(got[name], t), name


@compiled
@pytest.mark.parametrize("name", ["x", "y"])
@pytest.mark.parametrize("how", LAID)
def test_however_the_tensors_lie(how, name):
    compare_convs(conv_inputs(2, 11, 34, 4), laid={name: LAID[how]}, activation="silu")


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    compare_halves(causal_conv1d, conv_inputs(2, 11, 34, 4), "cpu", dtype, activation="silu")
    compare_halves(causal_conv1d, conv_inputs(2, 11, 34, 4), "cpu", dtype, wide=("weight", "bias"))


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_of_the_reference(reverse):
    inputs = {name: t.requires_grad_() for name, t in conv_inputs(1, 4, 2, 3).items()}

    def conv(*t):
        return causal_conv1d(**dict(zip(inputs, t, strict=True)), activation="silu", reverse=reverse)

    assert torch.autograd.gradcheck(conv, list(inputs.values()))
    assert torch.autograd.gradgradcheck(conv, list(inputs.values()))  # the kernel's refusal points here


@compiled
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck looks at it itself
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("leave_out", [(), ("bias", "past")])
def test_the_op_is_what_torch_expects(leave_out, reverse):
    import_module("svp.ops.causal_conv1d.cpu")  # registers the op

    inputs = conv_inputs(2, 11, 5, 4, leave_out=leave_out)
    args = [
        inputs[name].float().requires_grad_() if name in inputs else None for name in ("x", "weight", "bias", "past")
    ]
    torch.library.opcheck(torch.ops.svp.conv_cpu.default, (*args, True, reverse))
    dy = torch.randn(2, 11, 5)
    plain = [t if t is None else t.detach() for t in args]
    for needs in ([True, "past" in inputs], [False, False]):
        torch.library.opcheck(torch.ops.svp.conv_cpu_backward.default, (dy, *plain, True, reverse, needs))


@compiled
def test_compiles_whole_and_exports():
    t = {name: t.float() for name, t in conv_inputs(2, 11, 5, 4).items()}

    class Net(torch.nn.Module):
        def forward(self, x, weight, bias, past):
            return causal_conv1d(x * 2, weight, bias, activation="silu", past=past, reverse=True) + 1

    args = tuple(t.values())
    want = Net()(*args)
    compiled_net = torch.compile(Net(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled_net(*args), want)
    trained, same = ([t.clone().requires_grad_() for t in args] for _ in range(2))
    compiled_net(*trained).sum().backward()
    Net()(*same).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(trained, same, strict=True))
    program = torch.export.export(Net(), args)
    assert any("conv_cpu" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(*args), want)


@compiled
def test_a_second_derivative_is_refused_in_words():
    t = {name: t.float().requires_grad_() for name, t in conv_inputs(1, 5, 3, 4).items()}
    (grad,) = torch.autograd.grad(causal_conv1d(**t, kernel="cpu").sum(), t["x"], create_graph=True)
    with pytest.raises(SvpError, match="second derivatives"):
        grad.sum().backward()


def test_the_drop_in_knows_states_and_both_places_of_the_activation():
    t = {name: t.float() for name, t in conv_inputs(2, 11, 6, 4).items()}
    want = causal_conv1d(**t, activation="silu")
    x = t["x"].mT
    got, final = causal_conv1d_fn(
        x, t["weight"], t["bias"], initial_states=t["past"], return_final_states=True, activation="silu"
    )
    assert_close(got.mT, want, "y", 1e-6)
    assert torch.equal(final, x[..., -3:])
    assert torch.equal(
        causal_conv1d_fn(x, t["weight"], t["bias"], "silu"),
        causal_conv1d_fn(x, t["weight"], t["bias"], activation="silu"),
    )
    with pytest.raises(SvpError, match="seq_idx"):
        causal_conv1d_fn(x, t["weight"], t["bias"], seq_idx=torch.zeros(2, 11))


def test_wrong_shapes_are_named():
    x = torch.zeros(1, 3, 5)
    with pytest.raises(SvpError, match="weight"):
        causal_conv1d(x, torch.zeros(4, 4))
    with pytest.raises(SvpError, match="past"):
        causal_conv1d(x, torch.zeros(5, 4), past=torch.zeros(1, 5, 4))
    with pytest.raises(SvpError, match="relu"):
        causal_conv1d(x, torch.zeros(5, 4), activation="relu")
