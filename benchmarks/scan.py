"""How much faster is the compiled selective scan than plain PyTorch, and how far from what the machine can do?

One direction of a Vim mixer: delta projection (rank 24), softplus, scan, skip term and gate, forward and with the
backward of a frozen backbone (A, D, delta's weight and bias need no gradient). Every candidate does the whole of it.

    python benchmarks/scan.py [--json FILE] [--threads 1 2] [--tokens 197 785 3136] [--states 16 1] [--repeats 15]

Then with each number of states (Mamba's 16, VMamba's 1) at every instruction-set level of the machine, on one thread.

ours    selective_scan(kernel="cpu")
loop    the best plain loop we know: selective_scan(kernel="reference"), `unbind` and the exponential inside the loop
pscan   the parallel scan of the package mambapy, where it is installed
floor   the exponentials (once forward, twice with backward; softplus' logarithm counts as one), the multiply-adds of the
        recurrence and beside it, and the projection, each at the rate measured in the same run; or the least bytes at the
        rate of a copy, if those take longer
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from svp.ops import native, selective_scan
from svp.ops.floor import least, probes, scan_parts
from svp.ops.timing import interleaved, timed

BATCH, CHANNELS, TOKENS, STATES, RANK = 8, 768, 197, 16, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[197, 785, 3136])
    parser.add_argument("--states", type=int, nargs="+", default=[STATES, 1])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    if not native.available:
        sys.exit(f"nothing to measure: {native.reason}")
    report: dict = {"machine": machine(), "shape": [BATCH, CHANNELS, TOKENS, STATES], "rank": RANK, "runs": []}
    print("  ".join(f"{key} {value}" for key, value in report["machine"].items()))
    print(
        f"shape (b, e, l, n) = {(BATCH, CHANNELS, TOKENS, STATES)}, float32, delta of rank {RANK} included everywhere"
    )
    report["errors"] = check(Inputs(2, TOKENS))
    print("checked against float64: " + ", ".join(f"{name} {error:.1e}" for name, error in report["errors"].items()))
    for threads in options.threads:
        torch.set_num_threads(threads)
        for backward in (False, True):
            print()
            report["runs"].append(compare(threads, backward, options.repeats))
    torch.set_num_threads(options.threads[0])
    report["levels"] = [
        by_level(level, states, options.threads[0], backward, options.repeats)
        for level in native.levels() for states in options.states for backward in (False, True)
    ]  # fmt: skip
    report["kept_memory"] = native.keep_freed_memory()
    for threads in options.threads:
        torch.set_num_threads(threads)
        report[f"tokens_{threads}"] = by_tokens(threads, options.tokens, options.repeats)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


class Inputs:
    """What a mixer hands its scan: halves of xz, columns of one projection's output."""

    def __init__(self, batch: int, tokens: int, dtype: torch.dtype = torch.float32, states: int = STATES):
        g = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g).to(dtype)

        self.u, self.z = normal(batch, tokens, 2 * CHANNELS).chunk(2, -1)
        self.dt, self.B, self.C = normal(batch, tokens, RANK + 2 * states).split([RANK, states, states], -1)
        self.weight = normal(CHANNELS, RANK) * RANK**-0.5
        self.A = -torch.arange(1, states + 1, dtype=dtype).repeat(CHANNELS, 1)
        self.D, self.delta_bias = torch.ones(CHANNELS, dtype=dtype), normal(CHANNELS) - 4
        self.dy = normal(batch, tokens, CHANNELS)

    def to(self, dtype: torch.dtype) -> Inputs:
        other = object.__new__(Inputs)
        other.__dict__ = {name: t.to(dtype) for name, t in self.__dict__.items()}
        return other

    def run(self, scan: Callable, backward: bool) -> dict[str, Tensor]:
        leaves = {name: getattr(self, name).detach().requires_grad_(backward) for name in ("u", "z", "dt", "B", "C")}
        delta = F.linear(leaves["dt"], self.weight)
        y = scan(leaves["u"], delta, self.A, leaves["B"], leaves["C"], self.D, leaves["z"], self.delta_bias)
        if not backward:
            return {"y": y}
        y.backward(self.dy)
        return {"y": y.detach(), **{f"d{name}": t.grad for name, t in leaves.items()}}


def ours(u, delta, A, B, C, D, z, delta_bias):
    return selective_scan(u, delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=True, kernel="cpu")


def loop(u, delta, A, B, C, D, z, delta_bias):
    return selective_scan(u, delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=True, kernel="reference")


def pscan(u, delta, A, B, C, D, z, delta_bias):
    from mambapy.pscan import pscan as scan

    delta = F.softplus(delta + delta_bias)
    h = scan(torch.exp(delta[..., None] * A), (delta * u)[..., None] * B[:, :, None])  # (b, l, e, n)
    return ((h @ C[..., None]).squeeze(3) + D * u) * F.silu(z)


def candidates() -> dict[str, Callable]:
    found = {"ours": ours, "loop": loop}
    try:
        importlib.metadata.version("mambapy")
    except importlib.metadata.PackageNotFoundError:
        print("mambapy is not installed: pscan is left out")
    else:
        found["pscan"] = pscan
    return found


def check(inputs: Inputs) -> dict[str, float]:
    """Largest differences from the float64 loop, relative to the largest entry; no speed is printed for a wrong answer."""
    want = inputs.to(torch.float64).run(loop, backward=True)
    errors = {}
    for candidate, scan in candidates().items():
        got = inputs.run(scan, backward=True)
        for name, t in want.items():
            error = float((got[name].double() - t).abs().max() / t.abs().max())
            if not error < 1e-5:
                sys.exit(f"{candidate} is wrong: {name} is off by {error:.1e}")
            errors[candidate] = max(errors.get(candidate, 0.0), error)
    return errors


def by_level(level: str, states: int, threads: int, backward: bool, repeats: int) -> dict:
    before = native.isa()
    native.set_isa(level)
    try:
        print(f"\n{level}, {states} state{'s' * (states > 1)}: ", end="")
        found = compare(threads, backward, max(3, repeats // 3), states, {"ours": ours, "loop": loop})
    finally:
        native.set_isa(before)
    return {"level": level, "states": states, **found}


def compare(
    threads: int, backward: bool, repeats: int, states: int = STATES, scans: dict[str, Callable] | None = None
) -> dict:
    inputs = Inputs(BATCH, TOKENS, states=states)
    scans = candidates() if scans is None else scans
    functions = {name: lambda scan=scan: inputs.run(scan, backward) for name, scan in scans.items()}
    rates = probes()
    projections = {
        "projection": lambda: F.linear(inputs.dt, inputs.weight),
        "projection backward": lambda: inputs.dy @ inputs.weight,
    }
    calls = {**functions, **{name: probe.call for name, probe in rates.items()}, **projections}
    seconds = {name: t.wall for name, t in interleaved(calls, repeats, seldom=("pscan",)).items()}
    best = {name: min(times) for name, times in seconds.items()}
    rate = {name: probe.work / best[name] for name, probe in rates.items()}
    parts = scan_parts(BATCH * CHANNELS * TOKENS, states, backward, rate)
    parts["projection"] = best["projection"] + (best["projection backward"] if backward else 0)
    parts_ms, floor = {name: part * 1e3 for name, part in parts.items()}, least(parts) * 1e3
    print(f"{'forward + backward' if backward else 'forward'}, {threads} thread{'s' * (threads > 1)}")
    rows = {}
    for name in functions:
        times = seconds[name] * 2 if len(seconds[name]) == 1 else seconds[name]
        median, spread = statistics.median(times), statistics.quantiles(times, n=4)
        rows[name] = {"min_ms": best[name] * 1e3, "median_ms": median * 1e3, "iqr_ms": (spread[2] - spread[0]) * 1e3}
        rows[name]["over_ours"] = best[name] / best["ours"]
        print(f"  {name:6}{best[name] * 1e3:9.2f} ms   median {median * 1e3:9.2f}   iqr {rows[name]['iqr_ms']:7.2f}   "
              f"{rows[name]['over_ours']:6.1f} x ours")  # fmt: skip
    print(f"  floor {floor:9.2f} ms   = " + ", ".join(f"{name} {ms:.2f}" for name, ms in parts_ms.items())
          + f"; loop / floor {best['loop'] * 1e3 / floor:.1f}, ours / floor {best['ours'] * 1e3 / floor:.2f}")  # fmt: skip
    return {"threads": threads, "backward": backward, "candidates": rows, "floor_ms": floor, "floor_parts_ms": parts_ms}


def by_tokens(threads: int, tokens: list[int], repeats: int) -> list[dict]:
    print(
        f"\nours by tokens, {threads} thread{'s' * (threads > 1)}: microseconds a token, forward | forward + backward"
    )
    rows = []
    for length in tokens:
        inputs = Inputs(BATCH, length)
        row: dict = {"tokens": length}
        for backward in (False, True):
            inputs.run(ours, backward)
            best = min(timed(lambda: inputs.run(ours, backward))[0] for _ in range(max(3, repeats // 3)))  # noqa: B023
            row["with_backward_us" if backward else "forward_us"] = best / length * 1e6
        rows.append(row)
        print(f"  {length:6}{row['forward_us']:9.1f} |{row['with_backward_us']:9.1f}")
    return rows


def machine() -> dict[str, str]:
    cpu = next(
        (l.split(":")[1].strip() for l in _lines("/proc/cpuinfo") if l.startswith("model name")), platform.processor()
    )
    flags = next((l for l in _lines("/proc/cpuinfo") if l.startswith("flags")), "")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return {
        "cpu": cpu, "avx512": str("avx512f" in flags).lower(), "level": native.isa(), "torch": torch.__version__,
        "python": platform.python_version(), "system": platform.system(), "commit": commit.stdout.strip() or "unknown",
    }  # fmt: skip


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


if __name__ == "__main__":
    main()
