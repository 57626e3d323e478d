"""The mixer's core on its kernels against its reference in float64, and what must hold of any of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support import assert_close
from svp.errors import SvpError
from svp.ops import native
from svp.ops.mixer import KERNELS, Direction, mixer
from svp.ops.mixer import cpu as mixer_cpu

compiled = pytest.mark.skipif(not native.available, reason=native.reason)
OPTIONAL = ("conv_bias", "x_proj_bias", "dt_bias", "D", "h0", "past", "offset", "bias")
FIELDS = [f"{name}{k}" for k in (0, 1) for name in Direction._fields]


def random_inputs(b, l, e, n, r=3, taps=4, seed=0, leave_out=(), shared=True):
    """xz and the tensors of both directions by name; shared: one start state for all pictures."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    inputs, own = {"xz": normal(b, l, 2 * e)}, 1 if shared else b
    for k in (0, 1):
        pair = Direction(
            normal(e, taps) / 2, normal(e), normal(r + 2 * n, e) / e**0.5, normal(r + 2 * n), normal(e, r) / r**0.5,
            normal(e) - 1, -torch.exp(normal(e, n) / 2), normal(e), normal(own, e, n), normal(own, e, taps - 1),
            normal(e, n), normal(e),
        )  # fmt: skip
        inputs |= {f"{name}{k}": t for name, t in pair._asdict().items() if name not in leave_out}
    return inputs


def run(tensors, kernel):
    pair = [Direction(*(tensors.get(f"{name}{k}") for name in Direction._fields)) for k in (0, 1)]
    return mixer(tensors["xz"], *pair, scale=0.5, kernel=kernel)


def run_with_grads(inputs, dtype, kernel, frozen=()):
    leaves = {name: t.detach().to(dtype, copy=True).requires_grad_(name not in frozen) for name, t in inputs.items()}
    y = run(leaves, kernel)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)
    (y * weight).sum().backward()
    return {"y": y.detach(), **{f"d{name}": t.grad for name, t in leaves.items() if name not in frozen}}


def compare(inputs, frozen=()):
    want = run_with_grads(inputs, torch.float64, "reference", frozen)
    got = run_with_grads(inputs, torch.float32, "cpu", frozen)
    for name, t in want.items():
        if t is None:  # without tokens the reference does not touch it
            assert not got[name].any(), name
        else:
            assert_close(got[name].double(), t, name, 1e-5)


@pytest.mark.parametrize("leave_out", [(), OPTIONAL, ("h0", "past", "offset", "bias", "x_proj_bias")])
@pytest.mark.parametrize(
    "b,l,e,n", [(1, 1, 1, 1), (2, 37, 70, 16), (2, 63, 65, 4), (3, 17, 300, 5), (1, 197, 192, 16), (2, 66, 70, 1)]
)
def test_kernel_is_the_reference(isa, b, l, e, n, leave_out):
    compare(random_inputs(b, l, e, n, leave_out=leave_out))


@compiled
@settings(max_examples=40)
@given(
    b=st.integers(0, 3), l=st.sampled_from([0, 1, 2, 15, 16, 17, 33]), e=st.integers(1, 80), n=st.integers(1, 9),
    r=st.integers(1, 4), taps=st.sampled_from([1, 3, 4, 5]), seed=st.integers(0, 99), shared=st.booleans(),
    leave_out=st.sets(st.sampled_from(OPTIONAL)), frozen=st.sets(st.sampled_from(FIELDS)),
)  # fmt: skip
def test_any_shape(b, l, e, n, r, taps, seed, shared, leave_out, frozen):
    inputs = random_inputs(b, l, e, n, r, taps, seed, leave_out, shared or b == 0)
    compare(inputs, frozen & set(inputs))


@compiled
@pytest.mark.parametrize("shared", [True, False])
def test_pictures_in_groups_are_the_same(monkeypatch, shared):
    inputs = random_inputs(5, 20, 30, 4, shared=shared)
    want = run_with_grads(inputs, torch.float32, "cpu")
    monkeypatch.setattr(mixer_cpu, "GROUP_BYTES", 2 * 4 * 20 * 30)  # two pictures a group, one left over
    got = run_with_grads(inputs, torch.float32, "cpu")
    for name, t in want.items():
        assert_close(got[name], t, name, 2e-6)


def test_threads_change_nothing_but_the_products(isa):
    inputs = random_inputs(3, 50, 300, 4)
    try:
        torch.set_num_threads(1)
        want = run_with_grads(inputs, torch.float32, "cpu")
        torch.set_num_threads(3)
        got = run_with_grads(inputs, torch.float32, "cpu")
    finally:
        torch.set_num_threads(1)
    for name, t in want.items():
        assert_close(got[name], t, name, 2e-6)


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_tensors_are_widened_inside(dtype):
    inputs = {name: t.to(dtype) for name, t in random_inputs(2, 20, 32, 4).items()}
    want = run({name: t.float() for name, t in inputs.items()}, "cpu")
    got = run(inputs, "cpu")
    assert got.dtype == dtype and torch.equal(got, want.to(dtype))


@compiled
def test_a_view_of_a_larger_tensor_is_taken_as_it_lies():
    inputs = random_inputs(2, 20, 32, 4)
    wide = torch.randn(2, 23, 70, dtype=torch.float64)
    wide[:, 2:22, 3:67] = inputs["xz"]
    view = run({name: t.float() for name, t in inputs.items()} | {"xz": wide.float()[:, 2:22, 3:67]}, "cpu")
    assert torch.equal(view, run({name: t.float() for name, t in inputs.items()}, "cpu"))


@compiled
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck looks at it itself
def test_it_obeys_the_rules_of_torch_ops():
    inputs = {name: t.float() for name, t in random_inputs(2, 9, 10, 3, leave_out=("h0", "past")).items()}
    flat = [inputs.get(name) for name in ["xz", *FIELDS]]
    for t in flat:
        if t is not None:
            t.requires_grad_()
    torch.library.opcheck(torch.ops.svp.mixer_cpu.default, (*flat, 0.5, True))


@compiled
def test_one_graph_under_the_compiler():
    inputs = {name: t.float() for name, t in random_inputs(2, 9, 10, 3).items()}
    compiled_run = torch.compile(lambda t: run(t, "auto"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled_run(inputs), run(inputs, "cpu"))


@compiled
def test_memory_used_in_inference_mode_can_be_used_after_it(monkeypatch):
    monkeypatch.setattr(native, "KEEP_FLOATS", 2**24)
    inputs = {name: t.float() for name, t in random_inputs(2, 9, 10, 3).items()}
    with torch.inference_mode():
        want = run(inputs, "cpu")
    got = run_with_grads(inputs, torch.float32, "cpu")["y"]
    assert torch.equal(got, want)


@compiled
def test_threads_of_python_do_not_share_memory(monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr(native, "KEEP_FLOATS", 2**24)
    cases = [random_inputs(2, 30, 64, 8, seed=seed) for seed in range(4)]
    want = [run_with_grads(case, torch.float32, "cpu") for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, alone in zip(
                pool.map(lambda c: run_with_grads(c, torch.float32, "cpu"), cases), want, strict=True
            ):
                assert all(torch.equal(got[name], t) for name, t in alone.items())


def test_a_named_kernel_answers_or_says_why_not():
    inputs = random_inputs(1, 5, 4, 2)
    with pytest.raises(SvpError, match="float64"):
        run(inputs, "cpu")
    with pytest.raises(SvpError, match="xz is"):
        run(inputs | {"xz": inputs["xz"][..., 1:]}, "reference")
    assert [row.name for row in KERNELS] == ["cpu", "composed"]


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_the_environment_chooses_for_all_its_steps(name, monkeypatch):
    if name == "cpu" and not native.available:
        pytest.skip(native.reason)
    inputs = {key: t.float() for key, t in random_inputs(1, 5, 4, 2).items()}
    want = run(inputs, name)
    monkeypatch.setenv("SVP_KERNEL", name)
    assert torch.equal(run(inputs, "auto"), want)
    monkeypatch.setenv("SVP_KERNEL", "typo")
    with pytest.raises(SvpError, match="typo"):
        run(inputs, "auto")


@compiled
def test_second_derivatives_are_refused():
    inputs = {name: t.float().requires_grad_() for name, t in random_inputs(1, 5, 4, 2).items()}
    y = run(inputs, "cpu")
    (grad,) = torch.autograd.grad(y.sum(), inputs["xz"], create_graph=True)
    with pytest.raises(SvpError, match="second derivatives"):
        grad.sum().backward()
