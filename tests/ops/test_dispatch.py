"""Kernels are picked by stated reasons; a named one never falls back."""

import os
import subprocess
import sys
import types

import pytest
import torch

import svp
from svp.errors import SvpError
from svp.ops import dispatch, native, selective_scan
from svp.ops.dispatch import Kernel, pick, table

U, A = torch.zeros(1, 2, 3), -torch.ones(3, 4)
REFERENCE = Kernel("reference", "svp.ops.selective_scan.reference:scan", complex_A=True)


def scan(**options):
    return selective_scan(U, U, A, torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), **options)


@pytest.mark.parametrize(
    "row,reason",
    [
        (Kernel("k", "svp.ops.native:isa", device="cuda"), "it needs cuda"),
        (Kernel("k", "svp.ops.native:isa", dtypes=(torch.bfloat16,)), "the dtype is float32, it takes bfloat16"),
        (Kernel("k", "svp.ops.native:isa", max_state=3), "there are 4 states, it takes at most 3"),
    ],
)
def test_a_kernel_says_what_it_cannot(row, reason):
    assert reason in row.unfit(U, A)
    assert pick([row, REFERENCE], "auto", U, A) is REFERENCE.function()
    with pytest.raises(SvpError, match=reason) as caught:
        pick([row, REFERENCE], "k", U, A)
    assert caught.value.kind == "env"


def test_an_unknown_kernel_is_wrong_usage():
    with pytest.raises(SvpError, match="no kernel 'cpuu'") as caught:
        scan(kernel="cpuu")
    assert caught.value.exit_code == 2 and "cpu" in caught.value.hint


def test_the_environment_overrides_auto_only(monkeypatch):
    monkeypatch.setenv(dispatch.ENV, "nothing")
    with pytest.raises(SvpError, match="nothing"):
        scan()
    assert scan(kernel="reference").shape == U.shape


def test_a_missing_library_is_one_sentence(monkeypatch):
    monkeypatch.setattr(native, "available", False)
    monkeypatch.setattr(native, "reason", "the C++ part was not built")
    with pytest.raises(SvpError, match="the C\\+\\+ part was not built") as caught:
        scan(kernel="cpu")
    assert "\n" not in caught.value.problem
    assert scan().shape == U.shape
    rows = {row.name: row for row in table("selective_scan")}
    assert rows["reference"].chosen and rows["cpu"].reason == "the C++ part was not built"


def test_the_table_of_doctor():
    for op in ("selective_scan", "causal_conv1d"):
        rows = table(op)
        assert [row.chosen for row in rows].count(True) == 1 and rows[-1].reason is None
        cpu = next(row for row in rows if row.name == "cpu")
        assert cpu.chosen == native.available  # "auto" in float32 means the C++ kernel
        assert [row.name for row in rows] == ["triton", "cpu", "reference"] and "it needs cuda" in rows[0].reason
    (_, cpu, _) = table("selective_scan", dtype=torch.float64)
    assert "float64" in cpu.reason
    assert "it needs cpu" in table("selective_scan", device="cuda")[1].reason


@pytest.mark.skipif(not native.available, reason=native.reason)
@pytest.mark.parametrize("level", native.levels())
def test_a_level_is_forced_by_environment_and_an_op_loads_no_compiler(level):
    code = (
        "import sys, torch; from svp.ops import native, causal_conv1d\n"
        "causal_conv1d(torch.zeros(1, 2, 3), torch.zeros(3, 4)); print(native.isa(), 'torch._dynamo' in sys.modules)"
    )
    env = os.environ | {"SVP_ISA": level, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [level, "False"], done.stderr


@pytest.mark.skipif(not native.available, reason=native.reason)
def test_an_unknown_level_is_refused():
    with pytest.raises(SvpError, match="avx9"):
        native.set_isa("avx9")


def test_another_version_of_the_library_is_refused(monkeypatch):
    if not native.available:
        pytest.skip(native.reason)
    monkeypatch.setattr(native, "ABI", 999)
    library, reason = native._load()
    assert library is None and "another version" in reason


def test_a_broken_library_is_named(monkeypatch, tmp_path):
    name = native.FILE
    (tmp_path / name).write_bytes(b"not a library")
    monkeypatch.setattr(native, "HERE", tmp_path)
    library, reason = native._load()
    assert library is None and "cannot be loaded" in reason
    monkeypatch.setattr(native, "HERE", tmp_path / "nowhere")
    monkeypatch.setattr(sys, "path", [])
    assert native._load() == (None, native.NOT_BUILT)


def test_a_network_that_never_ran_compiles_whole(monkeypatch):
    monkeypatch.setattr(dispatch, "FUNCTIONS", types.ModuleType("nothing_is_loaded_yet"))
    net = svp.create_backbone("vim_nano", depth=2, img_size=32)
    model = svp.adapt(net, "svp", num_classes=3, probe=False).eval()
    images = torch.randn(1, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images), model(images))
