"""What the machine has, and what is told when something is missing or does not belong together."""

import importlib
import json
import os
import re
import subprocess
import sys

import pytest

from svp.cli import doctor
from svp.ops import native

compiled = pytest.mark.skipif(not native.available, reason=native.reason)


def test_a_healthy_machine(svp):
    told = svp("doctor")
    assert told.code == 0 and told.out.rstrip().endswith("all that is needed works")
    for word in ("versions", "torch ", "cpu ", "selective_scan", "causal_conv1d", "reference", "answers"):
        assert word in told.out


@compiled
def test_the_findings_for_programs(svp):
    found = json.loads(svp("doctor", "--json").out)
    assert found["problems"] == [] and found["library"]["level"] in found["library"]["levels"]
    rows = {(row["op"], row["kernel"]): row for row in found["kernels"] if row["device"] == "cpu"}
    assert rows["selective_scan", "cpu"]["chosen"] and not rows["selective_scan", "reference"]["chosen"]
    assert {c["op"] for c in found["comparisons"]} == {"selective_scan", "causal_conv1d", "mixer", "add_norm"}
    assert all(
        c["is_right"] and c["error"] < 1e-5 and c["seconds"] > 0 and c["reference_seconds"] > 0
        for c in found["comparisons"]
    )


def test_the_environment_is_shown(svp, monkeypatch):
    monkeypatch.setattr(doctor, "comparisons", lambda rows: [])
    monkeypatch.setenv("SVP_KERNEL", "reference")
    told = svp("doctor")
    assert told.code == 0
    assert re.search(r"^SVP_KERNEL *reference \(environment\)$", told.out, re.MULTILINE)
    monkeypatch.setenv("SVP_KERNEL", "fast")
    told = svp("doctor")
    assert told.code == 1 and "SVP_KERNEL is fast" in told.out and "cure: unset SVP_KERNEL" in told.out


def test_without_the_compiled_library_the_way_to_it_is_told(svp, monkeypatch):
    monkeypatch.setattr(native, "available", False)
    monkeypatch.setattr(native, "library", None)
    monkeypatch.setattr(native, "reason", native.NOT_BUILT)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    told = svp("doctor")
    assert told.code == 0 and "library    absent: the C++ part was not built" in told.out
    assert "get it: " + doctor.GET_COMPILER.get(sys.platform, "install a C++17") in told.out
    assert "selective_scan  cpu     reference  answers" in told.out


def test_a_wrong_kernel_is_a_problem(svp, monkeypatch):
    bad = {"op": "selective_scan", "kernel": "cpu", "error": 0.5, "worst": "dA", "seconds": 1.0, "reference_seconds": 2.0,
           "device": "cpu", "is_right": False}  # fmt: skip
    monkeypatch.setattr(doctor, "comparisons", lambda rows: [bad])
    told = svp("doctor")
    assert told.code == 1 and "problem: its error is 5.0e-01 of the largest entry of dA" in told.out


def test_torch_and_torchvision_that_do_not_belong_together(svp, monkeypatch):
    load = importlib.import_module

    def broken(name, *package):
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        return load(name, *package)

    monkeypatch.setattr(doctor, "comparisons", lambda rows: [])
    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    told = svp("doctor")
    versions = f"torchvision {doctor.version('torchvision')} does not work with torch {doctor.version('torch')}"
    assert told.code == 1 and versions in told.out and "pip install --force-reinstall torch torchvision" in told.out


@pytest.mark.parametrize(
    "torch,vision,asks,fits",
    [
        ("2.14.1", "0.29.1", ["torch==2.14.1"], True),
        ("2.14.1+cpu", "0.29.1+cpu", ["torch==2.14.1"], True),
        ("2.15.0", "0.29.1", ["numpy", "torch==2.14.1"], False),
        ("2.14.1+cpu", "0.29.1+cu130", ["torch==2.14.1"], False),
        ("2.15.0", "0.29.1", ["torch (>=2.14.0)"], True),
    ],
)
def test_which_versions_belong_together(monkeypatch, torch, vision, asks, fits):
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: asks)
    assert doctor.is_built_for(torch, vision) is fits


def test_an_absent_package_is_named(svp, monkeypatch):
    monkeypatch.setattr(doctor, "CORE", (*doctor.CORE, "svp-no-such-package"))
    monkeypatch.setattr(doctor, "comparisons", lambda rows: [])
    told = svp("doctor")
    assert told.code == 1 and "svp-no-such-package is not installed" in told.out and "cure: pip install" in told.out


@compiled
def test_a_level_that_is_not_there_is_explained():
    code = "import sys; from svp.cli.main import run; sys.exit(run(['doctor']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"SVP_ISA": "avx9"},
    )
    assert done.returncode == 1
    assert "the instruction-set level 'avx9' is not to be had here" in done.stdout
