"""The Triton kernels against the reference: on a GPU where there is one, else in Triton's interpreter, in a process of its
own (test_in_the_interpreter); and what the compiler makes of them for GPUs that are not here."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import svp
import test_matrix
from ops.inputs import (
    GRAD,
    OUT,
    compare,
    compare_halves,
    conv_inputs,
    run_with_grads,
    scan_inputs,
    sum_inputs,
    sums,
)
from support import assert_close
from svp.errors import SvpError
from svp.ops import causal_conv1d, gpu, selective_scan
from svp.ops.add_norm import Term, add_norm
from svp.ops.dispatch import table

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

INTERPRETED = gpu.interpreted()
DEVICE = "cpu" if INTERPRETED else "cuda"
HERE = INTERPRETED or gpu.missing() is None
runs = pytest.mark.skipif(not HERE, reason=f"{gpu.missing()}; test_in_the_interpreter runs it without a GPU")
on_gpu = pytest.mark.skipif(INTERPRETED or not HERE, reason="needs a GPU: too large for the interpreter")
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
OPTIONAL = ("D", "z", "delta_bias", "h0", "offset", "bias")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(INTERPRETED, reason="this is it")
def test_in_the_interpreter():
    env = os.environ | {gpu.INTERPRET: "1", "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


# -- the scan ----------------------------------------------------------------------------------------------------------


def on_device(op, inputs, dtypes=torch.float32, **options):
    return run_with_grads(op, inputs, dtypes, "triton", device=DEVICE, **options)


def compare_scans(inputs, frozen=(), **options):
    options = {"delta_softplus": True, "return_last_state": True} | options
    compare(selective_scan, inputs, "triton", frozen, device=DEVICE, **options)


@runs
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "b,l,e,n,groups", [(1, 1, 1, 1, 1), (2, 19, 3, 2, 1), (1, 3, 66, 1, 2), (1, 16, 2, 3, 1), (1, 33, 1, 1, 1)]
)
def test_the_scan_is_the_reference(b, l, e, n, groups, reverse):
    compare_scans(scan_inputs(b, l, e, n, groups), reverse=reverse)


@runs
@pytest.mark.parametrize("left_out", [*((name,) for name in OPTIONAL), OPTIONAL], ids="+".join)
def test_what_is_optional_may_be_left_out(left_out):
    compare_scans(scan_inputs(1, 11, 2, 2, leave_out=left_out), frozen=("A",))


@runs
@pytest.mark.parametrize("frozen", [("A", *OPTIONAL), ("A", "D", "delta_bias"), ("u", "delta", "B", "C", "z")])
def test_what_is_frozen_gets_no_gradient(frozen):
    compare_scans(scan_inputs(1, 11, 2, 2), frozen=frozen, reverse=True)


@runs
def test_delta_may_be_ready():
    inputs = scan_inputs(1, 11, 2, 2, leave_out=("delta_bias",))
    inputs["delta"] = inputs["delta"].abs() * 0.3
    compare_scans(inputs, delta_softplus=False)


@runs
def test_one_of_two_outputs_may_be_used():
    inputs = scan_inputs(1, 11, 2, 2)
    compare_scans(inputs, return_last_state=False)
    names = ("u", "delta", "A", "B", "C", "h0")
    compare(
        lambda **t: selective_scan(**t, return_last_state=True)[1], {k: inputs[k] for k in names}, "triton", ("C",),
        device=DEVICE,
    )  # fmt: skip


@runs
def test_groups_of_B_and_C_may_differ():
    inputs = scan_inputs(1, 3, 6, 1, 2)
    compare_scans(inputs | {"C": scan_inputs(1, 3, 6, 1, 3)["C"]})


@runs
@pytest.mark.filterwarnings("ignore:overflow encountered")  # of numpy, which the interpreter computes with
@pytest.mark.parametrize("name,value", [("A", -1e30), ("A", 0.0), ("delta", -100.0), ("delta", 30.0)])
def test_extreme_values(name, value):
    inputs = scan_inputs(1, 5, 2, 2)
    inputs[name][..., ::2] = value
    compare_scans(inputs, frozen=("A",))


@runs
def test_small_steps_are_exact():
    """A delta of 1e-6 is one: log(1 + exp(x)) by itself would have an error of a tenth of it."""
    ones = {name: torch.ones(1, 64, 1, device=DEVICE) for name in ("u", "B", "C")}
    delta = torch.linspace(-20, 25, 64, device=DEVICE)[None, :, None]
    y = selective_scan(
        **ones, delta=delta, A=torch.full((1, 1), -1e30, device=DEVICE), delta_softplus=True, kernel="triton"
    )
    want = torch.nn.functional.softplus(delta.double())
    assert ((y - want) / want).abs().max() < 5e-6


@runs
def test_a_nan_comes_out():
    inputs = {name: t.to(DEVICE, torch.float32) for name, t in scan_inputs(1, 5, 3, 2).items()}
    inputs["delta"][0, 2, 1] = float("nan")
    y = selective_scan(**inputs, delta_softplus=True, kernel="triton")
    assert y[0, 2:, 1].isnan().all()
    assert y[0, :2].isfinite().all() and y[0, :, ::2].isfinite().all()


@runs
def test_views_are_read_in_place():
    """Column halves of a wider tensor, a transposed one, rows repeated by stride 0, states that are not neighbours."""
    inputs = {name: t.to(DEVICE, torch.float32) for name, t in scan_inputs(2, 9, 3, 2).items()}
    want = selective_scan(**inputs, kernel="triton")
    both = torch.cat([inputs["u"], inputs["z"]], dim=-1)
    views = inputs | {"u": both[..., :3], "z": both[..., 3:]}
    views |= {name: inputs[name].mT.contiguous().mT for name in ("delta", "B", "A")}
    assert torch.equal(selective_scan(**views, kernel="triton"), want)
    repeated = inputs | {name: inputs[name][:1, :1].expand_as(inputs[name]) for name in ("u", "B", "z", "delta")}
    dense = {name: t.clone() for name, t in repeated.items()}
    assert torch.equal(selective_scan(**repeated, kernel="triton"), selective_scan(**dense, kernel="triton"))


@runs
@pytest.mark.parametrize("aligned", [True, False])
def test_states_are_loaded_together_where_they_lie_so(aligned):
    """B and C as columns of one projection's output, as Vim has them; a row of 24 numbers is a multiple of 16 bytes."""
    inputs = scan_inputs(1, 5, 2, 8)
    wide = torch.zeros(1, 5, 24 if aligned else 23, dtype=torch.float64)
    wide[..., 4:12], wide[..., 12:20] = inputs["B"], inputs["C"]
    want = selective_scan(**inputs)
    moved = {name: t.to(DEVICE, torch.float32) for name, t in (inputs | {"wide": wide}).items()}
    wide = moved.pop("wide")
    for reverse in (False, True):
        want = selective_scan(**inputs, reverse=reverse)
        got = selective_scan(**moved | {"B": wide[..., 4:12], "C": wide[..., 12:20]}, reverse=reverse, kernel="triton")
        assert_close(got.double().cpu(), want, "y", OUT)


@runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    options = dict(wide=("A", "delta"), device=DEVICE, delta_softplus=True)
    compare_halves(selective_scan, scan_inputs(1, 11, 2, 2), "triton", dtype, **options)
    inputs = {name: t.to(DEVICE, dtype) for name, t in scan_inputs(1, 11, 2, 2).items()}
    _, last = selective_scan(**inputs, delta_softplus=True, return_last_state=True, kernel="triton")
    assert last.dtype == torch.float32


@runs
def test_an_empty_sequence_keeps_its_state():
    inputs = {name: t.to(DEVICE, torch.float32).requires_grad_() for name, t in scan_inputs(2, 0, 5, 4).items()}
    y, last = selective_scan(**inputs, return_last_state=True, kernel="triton")
    assert y.shape == (2, 0, 5) and torch.equal(last, inputs["h0"])
    last.sum().backward()
    assert torch.equal(inputs["h0"].grad, torch.ones_like(last)) and not inputs["A"].grad.any()
    none = {name: t.to(DEVICE, torch.float32) for name, t in scan_inputs(0, 3, 5, 4).items()}
    assert selective_scan(**none, kernel="triton").shape == (0, 3, 5)


@runs
def test_one_start_for_all_pictures():
    inputs = scan_inputs(2, 5, 2, 2)
    compare_scans(inputs | {"h0": inputs["h0"][:1]})


@runs
@pytest.mark.parametrize("l,e", [(5, 3), pytest.param(197, 768, marks=on_gpu)])
def test_two_runs_give_the_same_bits(l, e):
    inputs = scan_inputs(2, l, e, 2)
    first, second = (on_device(selective_scan, inputs, delta_softplus=True) for _ in "12")
    for name, t in first.items():
        assert torch.equal(second[name], t), name


@on_gpu
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "b,l,e,n", [(8, 197, 768, 16), (2, 1025, 384, 16), (3, 50, 100, 64), (2, 40, 64, 200), (2, 50, 96, 5)]
)
def test_the_scan_at_full_size(b, l, e, n, reverse):
    compare_scans(scan_inputs(b, l, e, n), reverse=reverse)


# -- the convolution ---------------------------------------------------------------------------------------------------


def compare_convs(inputs, frozen=(), **options):
    compare(causal_conv1d, inputs, "triton", frozen, tolerances=(OUT, OUT), device=DEVICE, **options)


@runs
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    "b,l,e,taps",
    [(1, 1, 1, 4), (2, 2, 3, 4), (1, 19, 70, 4), (1, 17, 5, 3), (1, 20, 3, 1), (1, 9, 3, 7), (1, 0, 3, 4), (0, 3, 3, 4),
     pytest.param(8, 197, 768, 4, marks=on_gpu)],
)  # fmt: skip
def test_the_convolution_is_the_reference(b, l, e, taps, activation, reverse):
    compare_convs(conv_inputs(b, l, e, taps), activation=activation, reverse=reverse)


@runs
@pytest.mark.parametrize("left_out", [("bias",), ("past",), ("bias", "past")])
@pytest.mark.parametrize("frozen", [(), ("weight", "bias"), ("past",)])
def test_parts_of_the_convolution(left_out, frozen):
    frozen = tuple(name for name in frozen if name not in left_out)
    compare_convs(conv_inputs(2, 5, 3, 4, leave_out=left_out), frozen, activation="silu")


@runs
def test_the_convolution_reads_views_and_one_past():
    t = conv_inputs(2, 11, 34, 4)
    compare_convs(t | {"past": t["past"][:1]})
    t = {name: v.to(DEVICE, torch.float32) for name, v in t.items()}
    want = causal_conv1d(**t, kernel="triton")
    wide = torch.cat([t["x"], t["x"]], -1)
    assert torch.equal(causal_conv1d(**t | {"x": wide[..., 34:]}, kernel="triton"), want)
    assert torch.equal(causal_conv1d(**t | {"x": t["x"].mT.contiguous().mT}, kernel="triton"), want)


@runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_convolution_of_halves(dtype):
    compare_halves(causal_conv1d, conv_inputs(1, 11, 5, 4), "triton", dtype, device=DEVICE, activation="silu")


# -- sum and norm ------------------------------------------------------------------------------------------------------


def compare_sums(acts, skip, inputs, frozen=(), scale=()):
    # one scale for all channels has as its gradient one sum of terms of both signs
    tolerances = (OUT, 2e-4 if scale == (1,) else GRAD)
    compare(sums(acts, skip), inputs, "triton", frozen, tolerances=tolerances, device=DEVICE)


@runs
@pytest.mark.parametrize("leave_out,skip", [((), (4,)), ((), (0, 8)), (("residual",), ())])
@pytest.mark.parametrize("scale", [(5,), (1,), ()])
@pytest.mark.parametrize("acts", [(), ("silu",), ("silu", "none"), ("gelu", "silu", "none", "silu")])
def test_sum_and_norm_are_the_reference(acts, scale, leave_out, skip):
    compare_sums(acts, skip, sum_inputs(2, 9, 5, len(acts), scale, leave_out), scale=scale)


@runs
@pytest.mark.parametrize(
    "b,l,d", [(1, 1, 1), (0, 3, 4), (2, 0, 4), (1, 17, 130), pytest.param(8, 197, 384, marks=on_gpu)]
)
def test_sum_and_norm_of_any_shape(b, l, d):
    compare_sums(("silu", "none"), (0,) if l else (), sum_inputs(b, l, d, 2, (d,)), ("weight",))


@runs
def test_sum_and_norm_read_views_and_halves():
    """Two summands that are halves of one product, x and they in half precision: what a training step under bf16 has."""
    g = torch.Generator().manual_seed(0)
    x, both = (torch.randn(2, 9, d, generator=g).to(torch.bfloat16).double() for d in (6, 12))
    residual, weight, scale = (torch.randn(s, generator=g).double() for s in ((2, 9, 6), (6,), (6,)))
    found = {}
    for kernel, device, wide, half in (
        ("reference", "cpu", torch.float64, torch.float64), ("triton", DEVICE, torch.float32, torch.bfloat16)
    ):  # fmt: skip
        leaves = [t.to(device, half, copy=True).requires_grad_() for t in (x, both)]
        leaves += [t.to(device, wide, copy=True).requires_grad_() for t in (residual, weight, scale)]
        first, second = leaves[1].split(6, -1)
        terms = Term(first, leaves[4], "silu"), Term(second, leaves[4])
        h, stream = add_norm(leaves[0], leaves[2], leaves[3], 1e-5, terms=terms, skip=(4,), kernel=kernel)
        (h * stream).sum().backward()
        assert h.dtype == stream.dtype == wide
        assert [t.grad.dtype for t in leaves] == [t.dtype for t in leaves]
        found[kernel] = [t.detach().double().cpu() for t in (h, stream, *(leaf.grad for leaf in leaves))]
    for i, (got, want) in enumerate(zip(found["triton"], found["reference"], strict=True)):
        assert_close(got, want, f"tensor {i}", GRAD if i in (0, 1, 4, 5, 6) else 4 * torch.finfo(torch.bfloat16).eps)


# -- as torch's operators ----------------------------------------------------------------------------------------------

NAMES = ("u", "delta", "A", "B", "C", *OPTIONAL)


def scan_args(*shape, leave_out=(), device=DEVICE):
    inputs = scan_inputs(*shape, leave_out=leave_out)
    inputs["B"], inputs["C"] = inputs["B"][:, :, None], inputs["C"][:, :, None]
    return [inputs[name].to(device, torch.float32) if name in inputs else None for name in NAMES]


@runs
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck looks at it itself
@pytest.mark.parametrize("leave_out", [(), OPTIONAL])
def test_the_ops_are_what_torch_expects(leave_out):
    for op in ("selective_scan", "causal_conv1d", "add_norm"):
        importlib.import_module(f"svp.ops.{op}.triton")  # registers it
    check, ops = torch.library.opcheck, torch.ops.svp
    plain = scan_args(1, 3, 2, 1, leave_out=leave_out)
    check(
        ops.scan_triton.default, ([t if t is None else t.clone().requires_grad_() for t in plain] + [True, True, True])
    )
    y, last, states = ops.scan_triton(*plain, True, True, True)
    dlast, needs = (None, [False] * 6) if leave_out else (last, [True] * 6)
    check(ops.scan_triton_backward.default, (y, dlast, states, *plain, True, True, needs))
    inputs = conv_inputs(2, 3, 3, 4, leave_out=() if not leave_out else ("bias", "past"))
    conv = [inputs[k].to(DEVICE, torch.float32) if k in inputs else None for k in ("x", "weight", "bias", "past")]
    check(ops.conv_triton.default, ([t if t is None else t.clone().requires_grad_() for t in conv] + [True, True]))
    check(ops.conv_triton_backward.default, (conv[0], *conv, True, True, [not leave_out] * 2))
    x, add, pre, scale, weight = (torch.randn(s, device=DEVICE) for s in ((1, 3, 4), (1, 3, 4), (1, 3, 4), (4,), (4,)))
    given = (None, None, None) if leave_out else (add, pre, scale)
    trained = [t if t is None else t.requires_grad_() for t in (x, *given, None, None, weight)]
    check(ops.add_norm_triton.default, (*trained, 1e-5, [True, False], [1]))


@runs
def test_compiles_whole():
    conv = {name: t.to(DEVICE, torch.float32) for name, t in conv_inputs(1, 5, 2, 4).items()}
    args = [t for t in scan_args(1, 5, 2, 2, leave_out=OPTIONAL) if t is not None]

    def net(u, *rest):
        return selective_scan(
            causal_conv1d(u, conv["weight"], kernel="triton") * 2, *rest, delta_softplus=True, kernel="triton"
        )

    whole = torch.compile(net, fullgraph=True, backend="aot_eager")
    trained, same = ([t.clone().requires_grad_() for t in args] for _ in range(2))
    y, want = whole(*trained), net(*same)
    assert torch.equal(y, want)
    y.sum().backward()
    want.sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(trained, same, strict=True))


@runs
def test_a_second_derivative_is_refused_in_words():
    u, *rest = [t for t in scan_args(1, 3, 2, 1, leave_out=OPTIONAL) if t is not None]
    y = selective_scan(u.requires_grad_(), *rest, kernel="triton")
    (grad,) = torch.autograd.grad(y.sum(), u, create_graph=True)
    with pytest.raises(SvpError, match="second derivatives"):
        grad.sum().backward()


# -- a whole network ---------------------------------------------------------------------------------------------------


@runs
@pytest.mark.parametrize("method", [m if m == "svp" else pytest.param(m, marks=on_gpu) for m in test_matrix.VIM])
def test_a_network_is_that_of_the_reference(method):
    net = svp.create_backbone("vim_nano", kernel="reference", depth=2, img_size=32, embed_dim=12, d_state=2)
    model = test_matrix.stir(test_matrix.made("vim", method, net)).eval()
    image = torch.randn(1, 3, *model.preprocessing.crop, generator=torch.Generator().manual_seed(0))
    found = {}
    for net.kernel in ("reference", "triton"):
        device = DEVICE if net.kernel == "triton" else "cpu"
        model.to(device).zero_grad()
        logits = model(image.to(device))
        logits.square().sum().backward()
        grads = {name: p.grad.cpu().clone() for name, p in model.named_parameters() if p.requires_grad}
        found[net.kernel] = {"logits": logits.detach().cpu()} | grads
    for name, t in found["reference"].items():
        assert_close(found["triton"][name], t, name, 1e-4)


# -- reasons -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="there it takes tensors of the CPU")
def test_a_named_kernel_says_why_it_cannot():
    with pytest.raises(SvpError, match=r"triton: it needs cuda, the tensors are on cpu"):
        causal_conv1d(torch.zeros(1, 2, 3), torch.zeros(3, 4), kernel="triton")


@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d"])
def test_the_table_names_it_first(op, monkeypatch):
    row = table(op, DEVICE)[0]
    assert row.name == "triton" and (row.reason is None) == HERE
    monkeypatch.setenv(gpu.INTERPRET, "0")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert table(op, "cuda")[0].reason == "this torch is built without CUDA"


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"is_available": lambda: False}, "no CUDA device answers"),
        ({"get_device_capability": lambda: (6, 1)}, "of compute capability 6.1, Triton needs 8.0"),
        ({}, "needs a C compiler"),
    ],
)
def test_what_is_missing_is_said(change, reason, monkeypatch):
    monkeypatch.setenv(gpu.INTERPRET, "0")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, function in {"is_available": lambda: True, "get_device_capability": lambda: (9, 0), **change}.items():
        monkeypatch.setattr(torch.cuda, name, function)
    assert reason in gpu.missing()


def test_an_absent_package_is_named(monkeypatch):
    from svp.ops import dispatch

    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "svp.ops.causal_conv1d.triton", raising=False)
    assert dispatch.missing("svp.ops.causal_conv1d.triton:conv") == "triton is not installed"


# -- what the compiler makes of them -----------------------------------------------------------------------------------


class Launches:
    """Stands in for a kernel: keeps what it would be launched with, and compiles it for a GPU that need not be here."""

    POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}

    def __init__(self, kernel):
        self.kernel, self.made = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.made.append((args, options))

    def compiled(self, capability):
        """(registers, bytes of spilling, bytes of shared memory, exchanges between lanes) of the one launch."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        ((args, options),) = self.made
        names = self.kernel.arg_names
        given = dict(zip(names, args, strict=False)) | {k: v for k, v in options.items() if k in names}
        fixed = {k: v for k, v in given.items() if v is None or k in options}
        kinds = {
            k: "constexpr" if k in fixed else self.POINTERS[given[k].dtype] if torch.is_tensor(given[k])
            else "fp32" if isinstance(given[k], float) else "i32"
            for k in names
        }  # fmt: skip
        whole = [k for k, v in given.items() if torch.is_tensor(v) and v.data_ptr() % 16 == 0]
        source = ASTSource(self.kernel, kinds, fixed, {(names.index(k),): [["tt.divisibility", 16]] for k in whole})
        found = triton.compile(
            source, GPUTarget("cuda", capability, 32), {k: v for k, v in options.items() if k not in names}
        )
        return *usage(found.asm["cubin"]), found.metadata.shared, found.asm["ptx"].count("shfl.")


def usage(cubin):
    """(registers, bytes of stack, which only spilling needs) of a compiled kernel, as cuobjdump reads them."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    file = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    file.write_bytes(cubin)
    text = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True)
    return tuple(int(re.search(rf"{word}:(\d+)", text.stdout + text.stderr)[1]) for word in ("REG", "STACK"))


@pytest.fixture
def launches(monkeypatch, tmp_path):
    """launches(op, name): the kernel `name` of an op, replaced by a recorder. Nothing is taken from Triton's cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def replaced(op, name):
        module = importlib.import_module(f"svp.ops.{op}.triton")
        recorder = Launches(getattr(module, name))
        monkeypatch.setattr(module, name, recorder)
        return module, recorder

    return replaced


def scan_launch(launches, name, n, dtype, given, trained, reverse):
    """Records a launch of the scan's forward or backward, with B and C as columns of one projection, as Vim has them."""
    module, recorder = launches("selective_scan", name)
    b, l, e = 1, 20, 64
    leave_out = set(OPTIONAL) - set(given)
    t = dict(zip(NAMES, scan_args(b, l, e, n, leave_out=leave_out, device="cpu"), strict=True))
    wide = torch.zeros(b, l, 1, 24 + 2 * n)
    t |= {"B": wide[..., 24 : 24 + n], "C": wide[..., 24 + n :]}
    t |= {k: t[k].to(dtype) for k in ("u", "delta", "B", "C", "z") if t[k] is not None}
    if name == "_forward":
        module.forward(*t.values(), True, reverse, True)
    else:
        needs = [k in trained for k in ("A", "D", "delta_bias", "h0", "offset", "bias")]
        states = torch.empty(module.saved_shape(t["u"], t["A"], t["B"]))
        module.backward(torch.zeros(b, l, e, dtype=dtype), None, states, *t.values(), True, reverse, needs)
    return recorder


VIM = ("D", "delta_bias")  # what a Vim gives beside u, delta, A, B, C
ALL = ("A", *OPTIONAL)
WHERE = [pytest.param(80, marks=pytest.mark.slow), 90]


@compiles
@pytest.mark.parametrize("capability", WHERE)
@pytest.mark.parametrize(
    "name,n,dtype,given,trained,reverse",
    [
        pytest.param("_forward", 16, torch.float32, VIM, (), False, id="forward"),
        pytest.param("_forward", 16, torch.bfloat16, VIM, (), True, id="forward-bf16", marks=pytest.mark.slow),
        pytest.param("_forward", 16, torch.float16, OPTIONAL, (), False, id="forward-all-fp16", marks=pytest.mark.slow),
        pytest.param("_forward", 1, torch.float32, OPTIONAL, (), False, id="forward-n1", marks=pytest.mark.slow),
        pytest.param("_backward", 16, torch.float32, VIM, (), False, id="frozen"),
        pytest.param("_backward", 16, torch.bfloat16, VIM, (), True, id="frozen-bf16", marks=pytest.mark.slow),
        pytest.param("_backward", 16, torch.float32, VIM, ("A", *VIM), True, id="trained", marks=pytest.mark.slow),
        pytest.param("_backward", 16, torch.float32, ("D", "delta_bias", "offset", "h0"), ("offset", "h0"), False, id="offset", marks=pytest.mark.slow),
        pytest.param("_backward", 16, torch.float32, (*VIM, "z"), (), False, id="gated", marks=pytest.mark.slow),
        pytest.param("_backward", 16, torch.float16, OPTIONAL, ALL, True, id="all-fp16", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_the_scan_compiles_and_does_not_spill(launches, capability, name, n, dtype, given, trained, reverse):
    registers, stack, shared, exchanges = scan_launch(launches, name, n, dtype, given, trained, reverse).compiled(
        capability
    )
    assert name == "_backward" or exchanges == 0  # a lane has all states of its channel
    print(f"sm_{capability}: {registers} registers, {stack} bytes of stack, {shared} bytes of shared memory")
    # with everything at once two registers on a new GPU, on an old one several: it has fewer for what all lanes share
    assert shared <= 2048 and stack <= ((8 if len(trained) == len(ALL) else 0) if capability >= 90 else 64)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("n", [5, 64, 256])
@pytest.mark.parametrize("name", ["_forward", "_backward"])
def test_any_number_of_states_compiles(launches, name, n):
    print(scan_launch(launches, name, n, torch.float32, OPTIONAL, ALL, False).compiled(90))


@compiles
@pytest.mark.parametrize("capability", WHERE)
@pytest.mark.parametrize("given", [(), ("bias", "past")])
@pytest.mark.parametrize("taps", [4, pytest.param(7, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["_forward", "_backward"])
def test_the_convolution_compiles_and_does_not_spill(launches, capability, given, taps, name):
    module, recorder = launches("causal_conv1d", name)
    t = {k: v.float() for k, v in conv_inputs(1, 20, 64, taps).items()}
    args = t["x"].to(torch.bfloat16), t["weight"], *(t[k] if k in given else None for k in ("bias", "past")), True, True
    if name == "_forward":
        module.forward(*args)
    else:
        module.backward(args[0], *args, [bool(given)] * 2)
    registers, stack, shared, _ = recorder.compiled(capability)
    print(f"sm_{capability}: {registers} registers, {stack} bytes of stack, {shared} bytes of shared memory")
    assert stack == 0 or taps > 4


@compiles
@pytest.mark.parametrize("capability", WHERE)
@pytest.mark.parametrize("width", [384, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["_forward", "_backward"])
def test_sum_and_norm_compile_and_do_not_spill(launches, capability, width, name):
    module, recorder = launches("add_norm", name)
    x, pre = (torch.zeros(1, 9, width, dtype=torch.bfloat16) for _ in range(2))
    stream, scale = torch.zeros(1, 9, width), torch.zeros(width)
    rest = pre, scale, pre, scale[:1], scale, 1e-5, [True, False], [4]
    if name == "_forward":
        module.forward(x, stream, *rest)
    else:
        module.backward(stream, stream, stream, *rest, True)
    registers, stack, shared, _ = recorder.compiled(capability)
    print(f"sm_{capability}: {registers} registers, {stack} bytes of stack, {shared} bytes of shared memory")
    assert stack == 0
