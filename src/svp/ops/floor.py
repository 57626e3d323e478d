"""What a selective scan costs at least on this machine: exponentials, multiply-adds and bytes, at rates measured here."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from svp.ops import native

# per element of (b, l, e, n): h, its input, y; the backward pass: h and its input again, dC, then g, dx, dB, a g, dd twice
FORWARD_FMA, BACKWARD_FMA = 3, 9
# per element of (b, l, e): delta u, D u, z's SiLU and its product; the backward pass: delta u and D u again, SiLU and its slope 4,
# dy, dz 2, du 2, ddelta 2
FORWARD_BESIDE_FMA, BACKWARD_BESIDE_FMA = 4, 13
# float32 numbers per (b, l, e): u, delta, z, y; with the backward pass also dy, du, ddelta, dz, states
FORWARD_NUMBERS, STEP_NUMBERS = 4, 16
# exponentials of (b, l, e) beside those of the states: softplus, its logarithm (counted as one), and the SiLU of a gate
BESIDE = 3
SIDE = 768  # of the square matrices whose product gives the rate of multiply-adds


class Probe(NamedTuple):
    """A call that is to be timed, and how much work of one kind it does."""

    work: float
    call: Callable[[], object]


def probes(device: str = "cpu") -> dict[str, Probe]:
    """Calls that show the machine's rates, to be timed in turn with what is measured against them."""
    square, product = torch.rand(SIDE, SIDE, device=device), torch.empty(SIDE, SIDE, device=device)
    source, target = torch.rand(1 << 24, device=device), torch.empty(1 << 24, device=device)
    found = {
        "multiply-adds": Probe(float(SIDE**3), lambda: torch.mm(square, square, out=product)),
        "copy": Probe(2.0 * source.nbytes, lambda: target.copy_(source)),
    }
    if device == "cpu":
        found["exponentials"] = _exponentials()
    return found


def _exponentials() -> Probe:
    p, rounds = torch.linspace(0, 8, 2048), 500
    if native.library is None:
        wide, out = torch.linspace(-8, 0, 1 << 16), torch.empty(1 << 16)
        return Probe(float(wide.numel()), lambda: torch.exp(wide, out=out))
    run = native.library.svp_exponentials
    run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    # measured on one thread: the others do as many
    return Probe(float(p.numel() * rounds * torch.get_num_threads()), lambda: run(p.data_ptr(), p.numel(), rounds))


def gpu_exponentials(device: str) -> float | None:
    """Exponentials a second of a GPU's special-function units (16 a clock and multiprocessor), None where unknown."""
    p: Any = torch.cuda.get_device_properties(device)
    clock = getattr(p, "clock_rate", None)  # kHz
    return 16.0 * p.multi_processor_count * clock * 1e3 if clock else None


def scan_parts(values: float, states: int, backward: bool, rates: dict[str, float]) -> dict[str, float]:
    """Seconds that each part of a scan takes alone. values: b l e, over directions; rates: work a second, by probe.

    The backward pass computes the exponentials again instead of keeping them.
    """
    elements, passes = values * states, 2 if backward else 1
    fma = FORWARD_FMA + (BACKWARD_FMA if backward else 0)
    beside = FORWARD_BESIDE_FMA + (BACKWARD_BESIDE_FMA if backward else 0)
    work = {
        "exponentials": passes * (elements + BESIDE * values),
        "multiply-adds": fma * elements + beside * values,
        "copy": 4.0 * values * (STEP_NUMBERS if backward else FORWARD_NUMBERS),
    }
    names = {"copy": "bytes"}
    return {names.get(name, name): amount / rates[name] for name, amount in work.items() if name in rates}


def least(parts: dict[str, float]) -> float:
    """Arithmetic one after another, bytes beside it: the longer of both."""
    return max(sum(value for name, value in parts.items() if name != "bytes"), parts.get("bytes", 0.0))
