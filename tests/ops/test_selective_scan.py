"""The scan's kernels against its reference in float64, and what must hold of any of them."""

import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.inputs import LAID, compare, compare_halves, run_with_grads, scan_inputs
from support import assert_close
from svp.errors import SvpError
from svp.ops import native, selective_scan, selective_scan_fn

compiled = pytest.mark.skipif(not native.available, reason=native.reason)


def scan(delta_softplus=True, **options):
    """selective_scan as the networks call it."""
    return selective_scan(delta_softplus=delta_softplus, **options)


def compare_scans(inputs, frozen=(), **options):
    compare(scan, inputs, "cpu", frozen, **{"return_last_state": True} | options)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "b,l,e,n,groups",
    [
        (2, 63, 6, 4, 1), (1, 197, 70, 16, 1), (1, 33, 130, 6, 2), (1, 20, 300, 5, 1),
        # one state has a walk of its own
        (1, 1, 1, 1, 1), (2, 2, 64, 1, 1), (1, 3, 7, 1, 1), (2, 5, 300, 1, 1), (2, 17, 65, 1, 1), (1, 37, 40, 1, 4),
        (2, 64, 192, 1, 1), (1, 65, 400, 1, 2), (2, 197, 48, 1, 4),
    ],
)  # fmt: skip
def test_kernel_is_the_reference(isa, b, l, e, n, groups, reverse):
    compare_scans(scan_inputs(b, l, e, n, groups), reverse=reverse)


@compiled
@settings(max_examples=60)
@given(
    b=st.integers(0, 2), l=st.sampled_from([0, 1, 2, 15, 16, 17, 64, 65, 196, 197]), e=st.integers(1, 40),
    n=st.sampled_from([1, 4, 16]), groups=st.sampled_from([1, 1, 2]), seed=st.integers(0, 99), softplus=st.booleans(),
    reverse=st.booleans(), leave_out=st.sets(st.sampled_from(["D", "z", "delta_bias", "h0", "offset", "bias"])),
    frozen=st.sets(st.sampled_from(["A", "D", "delta_bias", "h0", "offset", "bias", "z", "u"])),
)  # fmt: skip
def test_any_shape(b, l, e, n, groups, seed, softplus, reverse, leave_out, frozen):
    inputs = scan_inputs(b, l, e * groups, n, groups, seed, leave_out)
    if not softplus:
        inputs["delta"] = inputs["delta"].abs() * 0.3
        inputs.pop("delta_bias", None)
    compare_scans(inputs, frozen & set(inputs), delta_softplus=softplus, reverse=reverse)


@pytest.mark.parametrize("n", [3, 1])
@pytest.mark.parametrize(
    "name,value", [("A", -1e4), ("A", -1e30), ("A", -1e-8), ("A", 0.0), ("A", 0.5), ("delta", -100.0), ("delta", 30.0)]
)
def test_extreme_values(isa, name, value, n):
    inputs = scan_inputs(1, 19, 5, n)
    inputs[name][..., ::2] = value
    compare_scans(inputs, frozen=("A",))


def test_softplus_around_its_threshold(isa):
    inputs = scan_inputs(1, 64, 4, 2, leave_out=("delta_bias",))
    inputs["delta"] = torch.linspace(-40, 40, 64, dtype=torch.float64)[None, :, None].repeat(1, 1, 4)
    compare_scans(inputs, frozen=("A",))


@pytest.mark.parametrize("n", [4, 1])
def test_a_nan_comes_out(isa, n):
    inputs = {name: t.float() for name, t in scan_inputs(1, 5, 20, n).items()}
    inputs["delta"][0, 2, 3] = float("nan")
    y = selective_scan(**inputs, delta_softplus=True, kernel="cpu")
    assert y[0, 2:, 3].isnan().all()
    assert y[0, :2].isfinite().all() and y[0, :, :3].isfinite().all()


@pytest.mark.parametrize("n", [16, 1])
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(isa, threads, n):
    inputs = scan_inputs(3, 50, 300, n)
    try:
        torch.set_num_threads(1)
        want = run_with_grads(scan, inputs, torch.float32, "cpu", return_last_state=True)
        torch.set_num_threads(threads)
        got = run_with_grads(scan, inputs, torch.float32, "cpu", return_last_state=True)
    finally:
        torch.set_num_threads(1)
    for name, t in want.items():
        assert torch.equal(got[name], t), name


@compiled
@pytest.mark.parametrize("n", [4, 1])
@pytest.mark.parametrize("names", [("u", "z"), ("delta", "B", "C"), ("u", "delta", "B", "z"), ("y",)], ids="+".join)
@pytest.mark.parametrize("how", LAID)
def test_however_the_tensors_lie(how, names, n):
    compare_scans(scan_inputs(2, 21, 34, n), laid=dict.fromkeys(names, LAID[how]))


@compiled
@pytest.mark.parametrize("n", [4, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype, n):
    compare_halves(scan, scan_inputs(1, 30, 8, n), "cpu", dtype)
    compare_halves(scan, scan_inputs(2, 30, 8, n), "cpu", dtype, wide=("A", "delta"), return_last_state=True)


@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_an_empty_sequence_keeps_its_state(kernel):
    inputs = {name: t.float() for name, t in scan_inputs(2, 0, 5, 4).items()}
    y, last = scan(**inputs, return_last_state=True, kernel=kernel)
    assert y.shape == (2, 0, 5)
    assert torch.equal(last, inputs["h0"])


@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_one_start_for_all_pictures(kernel):
    inputs = {name: t.float() for name, t in scan_inputs(3, 7, 5, 4).items()}
    shared = inputs["h0"][:1].clone().requires_grad_()
    each = inputs["h0"][:1].repeat(3, 1, 1).requires_grad_()
    a, b = (scan(**inputs | {"h0": h0}, kernel=kernel) for h0 in (shared, each))
    assert torch.equal(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    assert_close(shared.grad, each.grad.sum(0, keepdim=True), "dh0", 1e-6)


@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_two_halves_are_the_whole(kernel):
    """The last state of the first half is h0 of the second; no token sees a later one."""
    inputs = {name: t.float() for name, t in scan_inputs(2, 40, 6, 4).items()}
    whole = scan(**inputs, kernel=kernel)
    cut = {name: t[:, :23] if t.dim() == 3 and name != "h0" else t for name, t in inputs.items()}
    rest = {name: t[:, 23:] if t.dim() == 3 and name != "h0" else t for name, t in inputs.items()}
    first, state = scan(**cut, return_last_state=True, kernel=kernel)
    second = scan(**rest | {"h0": state}, kernel=kernel)
    assert_close(torch.cat([first, second], 1), whole, "y", 1e-6)


@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_reverse_is_a_flip_on_both_sides(kernel):
    inputs = {name: t.float() for name, t in scan_inputs(2, 18, 6, 4).items()}
    flipped = {name: t.flip(1) if t.dim() == 3 and name != "h0" else t for name, t in inputs.items()}
    want = scan(**flipped, kernel=kernel).flip(1)
    assert_close(scan(**inputs, reverse=True, kernel=kernel), want, "y", 1e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_of_the_reference(reverse):
    inputs = {name: t.requires_grad_() for name, t in scan_inputs(1, 4, 2, 2).items()}

    def both(*t):
        given = dict(zip(inputs, t, strict=True))
        return selective_scan(**given, delta_softplus=True, return_last_state=True, reverse=reverse)

    assert torch.autograd.gradcheck(both, list(inputs.values()))


def test_second_derivatives_of_the_reference():
    inputs = {name: t.requires_grad_() for name, t in scan_inputs(1, 2, 1, 2).items()}
    assert torch.autograd.gradgradcheck(lambda *t: scan(**dict(zip(inputs, t, strict=True))), list(inputs.values()))


def test_gradients_of_a_complex_reference():
    inputs = scan_inputs(1, 3, 2, 2, leave_out=("offset", "h0", "bias"))
    inputs["A"] = torch.complex(inputs["A"], torch.ones(2, 2, dtype=torch.float64))
    for name in ("B", "C"):
        inputs[name] = torch.complex(inputs[name], inputs[name].flip(1))
    leaves = [t.requires_grad_() for t in inputs.values()]
    assert torch.autograd.gradcheck(lambda *t: scan(**dict(zip(inputs, t, strict=True))), leaves)


@compiled
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck looks at it itself
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("leave_out", [(), ("D", "z", "delta_bias", "h0", "offset", "bias")])
def test_the_op_is_what_torch_expects(leave_out, reverse):
    import_module("svp.ops.selective_scan.cpu")  # registers the op

    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "h0", "offset", "bias")
    inputs = scan_inputs(2, 18, 5, 4, 1, leave_out=leave_out)
    inputs["B"], inputs["C"] = inputs["B"][:, :, None], inputs["C"][:, :, None]
    args = [inputs[name].float().requires_grad_() if name in inputs else None for name in names]
    torch.library.opcheck(torch.ops.svp.scan_cpu.default, (*args, True, reverse, True))
    plain = [t if t is None else t.detach() for t in args]
    torch.library.opcheck(torch.ops.svp.scan_cpu.default, (*plain, True, reverse, False))
    y, last, states = torch.ops.svp.scan_cpu(*plain, True, reverse, True)
    for dlast, needs in ((last, [t is not None for t in (plain[i] for i in (2, 5, 7, 8, 9, 10))]), (None, [False] * 6)):
        torch.library.opcheck(torch.ops.svp.scan_cpu_backward.default, (y, dlast, states, *plain, True, reverse, needs))


@compiled
def test_a_second_derivative_is_refused_in_words():
    inputs = {name: t.float().requires_grad_() for name, t in scan_inputs(1, 5, 3, 2).items()}
    (grad,) = torch.autograd.grad(scan(**inputs, kernel="cpu").sum(), inputs["u"], create_graph=True)
    with pytest.raises(SvpError, match="second derivatives"):
        grad.sum().backward()


@compiled
def test_compiles_whole_and_exports():
    inputs = {name: t.float() for name, t in scan_inputs(2, 18, 5, 4).items()}

    class Net(torch.nn.Module):
        def forward(self, u, delta, A, B, C):
            return selective_scan(u * 2, delta, A, B, C, delta_softplus=True) + 1

    args = tuple(inputs[name] for name in ("u", "delta", "A", "B", "C"))
    want = Net()(*args)
    compiled_net = torch.compile(Net(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled_net(*args), want)
    trained = [t.clone().requires_grad_() for t in args]
    compiled_net(*trained).sum().backward()
    same = [t.clone().requires_grad_() for t in args]
    Net()(*same).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(trained, same, strict=True))
    program = torch.export.export(Net(), args)
    assert any("scan_cpu" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(*args), want)


@compiled
def test_works_under_gradient_checkpointing():
    inputs = {name: t.float().requires_grad_() for name, t in scan_inputs(1, 20, 5, 4).items()}
    scan(**inputs, kernel="cpu").square().sum().backward()
    want = {name: t.grad.clone() for name, t in inputs.items()}
    for t in inputs.values():
        t.grad = None
    y = torch.utils.checkpoint.checkpoint(lambda: scan(**inputs, kernel="cpu"), use_reentrant=False)
    y.square().sum().backward()
    assert all(torch.equal(t.grad, want[name]) for name, t in inputs.items())


FORK = """
import os, sys, torch
from svp.ops import selective_scan
torch.set_num_threads(2)
args = [torch.rand(8, 64, 512), torch.rand(8, 64, 512), -torch.rand(512, 4), torch.rand(8, 64, 4), torch.rand(8, 64, 4)]
want = selective_scan(*args, kernel="cpu")
pid = os.fork()
if pid == 0:
    got = selective_scan(*args, kernel="cpu")
    os._exit(0 if got[0, 0].tolist() == want[0, 0].tolist() else 3)  # torch's own parallel regions would hang here
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@compiled
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_answers():
    done = subprocess.run(
        [sys.executable, "-c", FORK], timeout=120, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert done.returncode == 0


@pytest.mark.parametrize(
    "change,message",
    [
        ({"A": torch.zeros(4, 2)}, r"u is \(1, 3, 5\) and A is \(4, 2\)"),
        ({"delta": torch.zeros(1, 3, 4)}, r"delta is \(1, 3, 4\)"),
        ({"B": torch.zeros(1, 2, 2)}, "B is"),
        ({"C": torch.zeros(1, 3, 2, 2)}, "divisor of 5"),
        ({"h0": torch.zeros(2, 5, 2)}, "h0 is"),
        ({"D": torch.zeros(4)}, r"D is \(4,\), expected \(5,\)"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    inputs = {name: t.float() for name, t in scan_inputs(1, 3, 5, 2, leave_out=("h0",)).items()}
    with pytest.raises(SvpError, match=message):
        selective_scan(**inputs | change)


def test_a_complex_A_or_constants_leave_the_kernel():
    inputs = {name: t.float() for name, t in scan_inputs(1, 3, 5, 2, leave_out=("offset", "h0")).items()}
    with pytest.raises(SvpError, match="A is complex"):
        selective_scan(**inputs | {"A": inputs["A"].to(torch.complex64)}, kernel="cpu")
    with pytest.raises(SvpError, match="B or C is constant"):
        selective_scan(**inputs | {"B": torch.zeros(5, 2)}, kernel="cpu")


def test_the_drop_in_returns_the_other_layout():
    inputs = {name: t.float() for name, t in scan_inputs(2, 7, 5, 4, leave_out=("h0", "offset", "bias")).items()}
    turned = {name: t.mT for name, t in inputs.items() if t.dim() == 3}
    want = selective_scan(**inputs, delta_softplus=True)
    got = selective_scan_fn(**inputs | turned, delta_softplus=True)
    assert_close(got.mT, want, "y", 1e-6)
