"""`svp doctor`: what this machine has, which kernel answers and how well, what is missing and how to get it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from svp.cli.words import JSON, Page, columns, examples
from svp.errors import SvpError
from svp.extras import own_version, version

CORE = ("torch", "torchvision", "timm", "numpy", "pillow", "safetensors", "pyyaml", "click", "rich", "scikit-learn", "matplotlib", "pyarrow")  # fmt: skip
EXTRAS = {"clip": ("open_clip",)}
COMPILERS = {"win32": ("cl", "clang-cl"), "darwin": ("c++", "clang++")}
GET_COMPILER = {
    "win32": "install Visual Studio Build Tools with C++",
    "darwin": "xcode-select --install",
    "linux": "sudo apt install g++, or sudo dnf install gcc-c++",
}
OPS = ("selective_scan", "causal_conv1d")
TORCH_FIRST = "pip install --force-reinstall torch torchvision, both in one command and from one index"


@click.command(
    cls=Page, epilog=examples("svp doctor", "svp doctor --json | jq .problems", "SVP_ISA=generic svp doctor")
)
@JSON
def command(as_json: bool) -> None:
    """Show what this machine has: versions, kernels, their error and speed.

    Exits with 1 where something is broken that svp needs; a kernel that is merely absent is no problem.
    """
    found = examine()
    if as_json:
        from svp.cli.words import print_json

        print_json(found)
    else:
        show(found)
    if found["problems"]:
        click.get_current_context().exit(1)


def examine() -> dict[str, Any]:
    """All findings: versions, machine, kernels, comparisons, missing parts (with a command), problems (with a cure)."""
    found: dict[str, Any] = {"versions": versions(), "machine": machine(), "missing": extras(), "problems": []}
    found["problems"] += imports()
    if any(p["part"] == "torch" for p in found["problems"]):
        return found
    found["machine"] |= torch_machine()
    found["versions"]["torch"] = built("torch")
    try:
        from svp.ops import native
    except SvpError as err:  # SVP_ISA names a level that is not there
        found["problems"].append({"part": "SVP_ISA", "problem": err.problem, "cure": err.hint})
        return found
    found["library"] = {
        "built": native.available, "levels": native.levels(), "level": native.isa(), "reason": native.reason or None,
        "SVP_ISA": os.environ.get("SVP_ISA"), "SVP_KERNEL": os.environ.get("SVP_KERNEL"),
    }  # fmt: skip
    found["weights"] = shipped()
    found["kernels"] = kernels()
    found["comparisons"] = comparisons(found["kernels"])
    found["problems"] += [
        {"part": f"{c['op']}/{c['kernel']}", "problem": f"its error is {c['error']:.1e} of the largest entry of {c['worst']}",
         "cure": "--kernel reference is right; please report this"}
        for c in found["comparisons"] if not c["is_right"]
    ]  # fmt: skip
    for op in OPS:
        if not any(row["chosen"] for row in found["kernels"] if row["op"] == op):
            words = os.environ.get("SVP_KERNEL")
            found["problems"].append(
                {"part": op, "problem": f"no kernel answers: SVP_KERNEL is {words}", "cure": "unset SVP_KERNEL"}
            )
            break
    if not native.available:
        found["missing"].append({"part": "the fast CPU kernels", "why": native.reason, "get": get_kernels()})
    return found


# -- versions ----------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str | None]:
    """Of the packages as they are installed, without importing them; None: absent."""
    return {
        "svp": own_version(),
        "python": platform.python_version(),
        **{name: version(name) for name in CORE},
    }


def built(name: str) -> str:
    """The version with its build (+cpu, +cu130), which metadata may leave out."""
    return str(importlib.import_module(name).__version__)


def imports() -> list[dict[str, str]]:
    """What is needed and cannot be imported, or does not belong together."""
    found = []
    for name in CORE:
        if version(name) is None and name not in ("torch", "torchvision"):
            found.append({"part": name, "problem": f"{name} is not installed", "cure": f"pip install {name}"})
    for name in ("torch", "torchvision"):
        problem = trouble(name)
        if problem:
            found.append({"part": name, "problem": problem, "cure": TORCH_FIRST})
            break
    return found


def trouble(name: str) -> str | None:
    """Why torch or torchvision cannot be used, in a sentence with both versions, or None."""
    torch, vision = version("torch"), version("torchvision")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as err:
        if err.name == name:
            return f"{name} is not installed"
        return f"{name} needs {err.name}, which is not installed"
    except Exception as err:  # a library that does not load, an operator that the other version lacks
        first = str(err).strip().split("\n")[0]
        if name == "torchvision":
            return f"torchvision {vision} does not work with torch {torch}: {first}"
        return f"torch {torch} cannot be loaded: {first}"
    if name == "torchvision" and not is_built_for(torch, vision):
        return f"torchvision {vision} was built for another torch than {torch}"
    return None


def is_built_for(torch: str | None, vision: str | None) -> bool:
    """Whether the torchvision that is installed asks for this torch, and both are of one build (cpu, cu130 …)."""
    builds = [text.partition("+")[2] for text in (torch or "", vision or "")]
    if all(builds) and builds[0] != builds[1]:
        return False
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for line in importlib.metadata.requires("torchvision") or []:
            wanted = re.match(r"torch\s*\(?==\s*([\w.]+)", line)
            if wanted and torch and torch.partition("+")[0] != wanted[1].partition("+")[0]:
                return False
    return True


def extras() -> list[dict[str, str]]:
    """Optional packages that are absent."""
    return [
        {
            "part": f"extra {extra}",
            "why": f"{', '.join(absent)} not installed",
            "get": f'pip install "svp-vision[{extra}]"',
        }
        for extra, names in EXTRAS.items()
        if (absent := [name for name in names if importlib.util.find_spec(name) is None])
    ]


def get_kernels() -> str:
    """The command that builds the compiled library here."""
    first = [] if any(map(shutil.which, COMPILERS.get(sys.platform, ("c++", "g++", "clang++")))) else [
        GET_COMPILER.get(sys.platform, "install a C++17 compiler")
    ]  # fmt: skip
    root = Path(__file__).resolve().parents[3]
    if (root / "CMakeLists.txt").is_file() and version("svp-vision") is None:
        first += [] if shutil.which("cmake") else ["pip install cmake"]
        build = "cmake -S . -B build/dev && cmake --build build/dev && cmake --install build/dev --prefix src"
        return "; then ".join([*first, f"in {root}: {build}"])
    return "; then ".join([*first, "pip install --force-reinstall --no-deps --no-binary svp-vision svp-vision"])


# -- the machine -------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    from svp.data.kept import memory_bytes

    return {"system": f"{platform.system()} {platform.release()}", "cpu": cpu_name(), "architecture": platform.machine(),
            "memory_bytes": memory_bytes()}  # fmt: skip


def torch_machine() -> dict[str, Any]:
    import torch

    from svp.training.machine import cpus

    gpus = [
        {"name": p.name, "memory_bytes": p.total_memory}
        for p in (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    ]
    if torch.backends.mps.is_available():
        gpus.append({"name": "Apple GPU (mps)", "memory_bytes": None})
    return {"cores": cpus(), "threads": torch.get_num_threads(), "cuda": torch.version.cuda, "gpus": gpus}


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# -- kernels -----------------------------------------------------------------------------------------------------------


def shipped() -> list[str]:
    """The backbones whose weights are in the package."""
    from svp.backbones.create import shipped_weights
    from svp.registry import list_backbones

    return [name for name in list_backbones() if shipped_weights(name)]


def kernels() -> list[dict[str, Any]]:
    """Every kernel of every op, on every kind of device that is here: chosen, or the reason why not."""
    import torch

    from svp.ops.dispatch import table

    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    return [
        {"op": op, "device": device, "kernel": row.name, "chosen": row.chosen, "reason": row.reason}
        for device in devices for op in OPS for row in table(op, device)
    ]  # fmt: skip


def comparisons(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Error and speed of every fast kernel that can answer."""
    from svp.ops.compare import COMPOSED, compare

    fast = [
        (row["device"], row["op"], row["kernel"])
        for row in rows
        if row["reason"] is None and row["kernel"] != "reference"
    ]
    scans = [(device, kernel) for device, op, kernel in fast if op == "selective_scan"]
    fast += [(device, op, kernel) for device, kernel in scans for op in COMPOSED.get(kernel, ())]
    made = [(device, compare(op, kernel, device)) for device, op, kernel in fast]
    return [{**c._asdict(), "device": device, "is_right": c.is_right} for device, c in made]


# -- printing ----------------------------------------------------------------------------------------------------------


def show(found: dict[str, Any]) -> None:
    m = found["machine"]
    known = [f"{name} {number or 'absent'}" for name, number in found["versions"].items()]
    rows = [
        ("versions", ", ".join(known[:5])),
        ("", ", ".join(known[5:])),
        ("system", f"{m['system']}, {m['architecture']}"),
    ]
    rows.append(("cpu", m["cpu"] + (f", {m['cores']} cores, torch uses {m['threads']}" if "cores" in m else "")))
    if m["memory_bytes"]:
        rows.append(("memory", size(m["memory_bytes"])))
    if "gpus" in m:
        gpus = [g["name"] + (f", {size(g['memory_bytes'])}" if g["memory_bytes"] else "") for g in m["gpus"]]
        rows.append(
            ("gpu", "; ".join(gpus) or ("none answers" if m["cuda"] else "none: this torch is built without CUDA"))
        )
    if "library" in found:
        rows += library_rows(found["library"])
        rows.append(("weights", f"in the package: {', '.join(found['weights']) or 'none'}"))
    click.echo("\n".join(f"{name:<11}{text}" for name, text in rows))
    if "kernels" in found:
        click.echo("\n" + columns(["op", "device", "kernel", ""], [
            [r["op"], r["device"], r["kernel"], "answers" if r["chosen"] else r["reason"] or "can answer, if named with --kernel"]
            for r in found["kernels"]
        ]))  # fmt: skip
    if found.get("comparisons"):
        from svp.ops.compare import SHAPE

        heads = ["op", "kernel", "largest error", "time", "reference", "faster"]
        click.echo("\n" + columns(heads, [
            [c["op"], c["kernel"], f"{c['error']:.1e} ({c['worst']})", f"{1000 * c['seconds']:.2f} ms",
             f"{1000 * c['reference_seconds']:.1f} ms", f"{c['reference_seconds'] / c['seconds']:.1f} x"]
            for c in found["comparisons"]
        ], right=heads[3:]))  # fmt: skip
        click.echo(
            f"(b, l, e, n) = {SHAPE}, float32, forward and backward; errors against float64, of a tensor's largest entry"
        )
    for row in found["missing"]:
        click.echo(f"\nmissing: {row['part']} ({row['why']})\n  get it: {row['get']}")
    for row in found["problems"]:
        click.echo(f"\nproblem: {row['problem']}\n  cure: {row['cure']}")
    if not found["problems"]:
        click.echo("\nall that is needed works")


def library_rows(library: dict[str, Any]) -> list[tuple[str, str]]:
    if not library["built"]:
        rows = [("library", f"absent: {library['reason']}")]
    else:
        others = [level for level in library["levels"] if level != library["level"]]
        rows = [
            ("library", f"{library['level']} answers" + (f"; also {', '.join(others)} (SVP_ISA=…)" if others else ""))
        ]
    return rows + [(name, f"{library[name]} (environment)") for name in ("SVP_ISA", "SVP_KERNEL") if library[name]]


def size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
