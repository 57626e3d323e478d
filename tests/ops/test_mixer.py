"""The mixer's core on its kernels against its reference in float64, and what must hold of any of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.inputs import LAID, compare, compare_halves, run_with_grads
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


def core(kernel, xz, **t):
    """The mixer of named tensors."""
    pair = [Direction(*(t.get(f"{name}{k}") for name in Direction._fields)) for k in (0, 1)]
    return mixer(xz, *pair, scale=0.5, kernel=kernel)


def compare_mixers(inputs, frozen=(), **options):
    compare(core, inputs, "cpu", frozen, tolerances=(1e-5, 1e-5), **options)


def on_cpu(inputs):
    return run_with_grads(core, inputs, torch.float32, "cpu")


@pytest.mark.parametrize("leave_out", [(), OPTIONAL, ("h0", "past", "offset", "bias", "x_proj_bias")])
@pytest.mark.parametrize(
    "b,l,e,n", [(1, 1, 1, 1), (2, 37, 70, 16), (2, 63, 65, 4), (3, 17, 300, 5), (1, 197, 192, 16), (2, 66, 70, 1)]
)
def test_kernel_is_the_reference(isa, b, l, e, n, leave_out):
    compare_mixers(random_inputs(b, l, e, n, leave_out=leave_out))


@compiled
@settings(max_examples=40)
@given(
    b=st.integers(0, 3), l=st.sampled_from([0, 1, 2, 15, 16, 17, 33]), e=st.integers(1, 80), n=st.integers(1, 9),
    r=st.integers(1, 4), taps=st.sampled_from([1, 3, 4, 5]), seed=st.integers(0, 99), shared=st.booleans(),
    leave_out=st.sets(st.sampled_from(OPTIONAL)), frozen=st.sets(st.sampled_from(FIELDS)),
)  # fmt: skip
def test_any_shape(b, l, e, n, r, taps, seed, shared, leave_out, frozen):
    inputs = random_inputs(b, l, e, n, r, taps, seed, leave_out, shared or b == 0)
    compare_mixers(inputs, frozen & set(inputs))


@compiled
@pytest.mark.parametrize("shared", [True, False])
def test_pictures_in_groups_are_the_same(monkeypatch, shared):
    inputs = random_inputs(5, 20, 30, 4, shared=shared)
    want = on_cpu(inputs)
    monkeypatch.setattr(mixer_cpu, "GROUP_BYTES", 2 * 4 * 20 * 30)  # two pictures a group, one left over
    got = on_cpu(inputs)
    for name, t in want.items():
        assert_close(got[name], t, name, 2e-6)


def test_threads_change_nothing_but_the_products(isa):
    inputs = random_inputs(3, 50, 300, 4)
    try:
        torch.set_num_threads(1)
        want = on_cpu(inputs)
        torch.set_num_threads(3)
        got = on_cpu(inputs)
    finally:
        torch.set_num_threads(1)
    for name, t in want.items():
        assert_close(got[name], t, name, 2e-6)


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_tensors_are_widened_inside(dtype):
    compare_halves(core, random_inputs(2, 20, 32, 4), "cpu", dtype)
    compare_halves(core, random_inputs(2, 20, 32, 4, leave_out=OPTIONAL), "cpu", dtype, wide=("A0", "A1"))


@compiled
@pytest.mark.parametrize("names", [("xz",), ("x_proj0", "dt_proj1"), ("y",)], ids="+".join)
@pytest.mark.parametrize("how", LAID)
def test_however_the_tensors_lie(how, names):
    compare_mixers(random_inputs(2, 20, 32, 4), laid=dict.fromkeys(names, LAID[how]))


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
    compiled_run = torch.compile(lambda t: core("auto", **t), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled_run(inputs), core("cpu", **inputs))


@compiled
def test_memory_used_in_inference_mode_can_be_used_after_it(monkeypatch):
    monkeypatch.setattr(native, "KEEP_FLOATS", 2**24)
    inputs = {name: t.float() for name, t in random_inputs(2, 9, 10, 3).items()}
    with torch.inference_mode():
        want = core("cpu", **inputs)
    got = on_cpu(inputs)["y"]
    assert torch.equal(got, want)


@compiled
def test_threads_of_python_do_not_share_memory(monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr(native, "KEEP_FLOATS", 2**24)
    cases = [random_inputs(2, 30, 64, 8, seed=seed) for seed in range(4)]
    want = [on_cpu(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, alone in zip(pool.map(on_cpu, cases), want, strict=True):
                assert all(torch.equal(got[name], t) for name, t in alone.items())


def test_a_named_kernel_answers_or_says_why_not():
    inputs = random_inputs(1, 5, 4, 2)
    with pytest.raises(SvpError, match="float64"):
        core("cpu", **inputs)
    with pytest.raises(SvpError, match="xz is"):
        core("reference", **inputs | {"xz": inputs["xz"][..., 1:]})
    assert [row.name for row in KERNELS] == ["cpu", "composed"]


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_the_environment_chooses_for_all_its_steps(name, monkeypatch):
    if name == "cpu" and not native.available:
        pytest.skip(native.reason)
    inputs = {key: t.float() for key, t in random_inputs(1, 5, 4, 2).items()}
    want = core(name, **inputs)
    monkeypatch.setenv("SVP_KERNEL", name)
    assert torch.equal(core("auto", **inputs), want)
    monkeypatch.setenv("SVP_KERNEL", "typo")
    with pytest.raises(SvpError, match="typo"):
        core("auto", **inputs)


@compiled
def test_second_derivatives_are_refused():
    inputs = {name: t.float().requires_grad_() for name, t in random_inputs(1, 5, 4, 2).items()}
    y = core("cpu", **inputs)
    (grad,) = torch.autograd.grad(y.sum(), inputs["xz"], create_graph=True)
    with pytest.raises(SvpError, match="second derivatives"):
        grad.sum().backward()
