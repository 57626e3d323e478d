"""How fast is one direction of the scan on this GPU, beside what it can do at most?

    python benchmarks/gpu.py [--batch 96] [--sizes 224 512] [--json FILE]

Vim-S (768 channels, 16 states), forward, and with the backward of a frozen backbone, in float32 and bfloat16: ours; the
reference through torch.compile (--compile: minutes); mamba_ssm's where it can be imported, with the turning into its
layout and without. Beside them the bound: exponentials at 16 a clock and multiprocessor, or the bytes at the rate of a
copy that is measured in the same run. Whole steps are measured by `svp bench --device cuda`.

It checks outputs and gradients against the reference, and that two runs give the same bits, and prints no speed for a
wrong answer. --dry runs tiny shapes once, on the CPU too under TRITON_INTERPRET=1: it measures nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from svp.ops import floor, gpu, selective_scan
from svp.ops.compare import compare

CHANNELS, STATES, RANK = 768, 16, 24
COPY_BYTES = 2 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 512], help="sides of pictures in patches of 16")
    parser.add_argument("--states", type=int, default=STATES)
    parser.add_argument("--compile", action="store_true", help="also the reference through torch.compile")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, once")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    why = gpu.missing()
    if why is not None or (gpu.interpreted() and not options.dry):
        sys.exit(f"nothing to measure: {why or 'the interpreter is on'}")
    device = "cpu" if gpu.interpreted() else "cuda"
    shape = (1, 5, 3, 2) if options.dry else (2, 197, CHANNELS, options.states)
    report: dict = {"machine": machine(device), "batch": options.batch, "errors": {}, "scan": []}
    for op in ("selective_scan", "causal_conv1d", "add_norm"):
        found = compare(op, "triton", device, shape)
        if not found.is_right:
            sys.exit(f"{op} is wrong: {found.worst} is off by {found.error:.1e}")
        report["errors"][op] = found.error
    copied = None if options.dry else bytes_per_ms(device)
    for dtype in (torch.float32, torch.bfloat16):
        for size in [32] if options.dry else options.sizes:
            tokens = 3 if options.dry else (size // 16) ** 2 + 1
            report["scan"].append(scans(device, dtype, tokens, copied, options))
    text = json.dumps(report, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


def scans(device: str, dtype: torch.dtype, tokens: int, copied: float | None, options: argparse.Namespace) -> dict:
    batch, channels, n = (1, 3, 2) if options.dry else (options.batch, CHANNELS, options.states)
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device, dtype)

    u, delta, dy = (normal(batch, tokens, channels) for _ in range(3))
    B, C = normal(batch, tokens, RANK + 2 * n).split([RANK, n, n], -1)[1:]
    A = -torch.arange(1, n + 1, device=device).float().repeat(channels, 1)
    D, bias = torch.ones(channels, device=device), torch.full((channels,), -4.0, device=device)

    def ours(u, delta, B, C, kernel="triton"):
        return selective_scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True, kernel=kernel)

    def leaves(*tensors: Tensor) -> list[Tensor]:
        return [t.detach().requires_grad_() for t in tensors]

    def gradients() -> list[Tensor]:
        inputs = leaves(u, delta, B, C)
        return list(torch.autograd.grad(ours(*inputs), inputs, dy))

    if not all(map(torch.equal, gradients(), gradients())):
        sys.exit(f"two runs of the backward in {dtype} differ")
    candidates: dict[str, tuple[Callable, tuple[Tensor, ...], Tensor]] = {"ours": (ours, (u, delta, B, C), dy)}
    if options.compile and not options.dry:
        compiled = torch.compile(lambda *t: ours(*t, kernel="reference"))
        candidates["compiled reference"] = (compiled, (u, delta, B, C), dy)
    if not options.dry and importlib.util.find_spec("mamba_ssm"):
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        def turn(t: Tensor) -> Tensor:
            return t.mT.contiguous()

        def theirs(u, delta, B, C):
            return selective_scan_fn(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True)

        candidates["mamba_ssm"] = theirs, tuple(map(turn, (u, delta, B, C))), turn(dy)
        candidates["mamba_ssm, turned"] = lambda *t: theirs(*map(turn, t)).mT, (u, delta, B, C), dy
    rows: dict = {}
    for name, (scan, tensors, above) in candidates.items():

        def both(scan=scan, tensors=tensors, above=above):
            inputs = leaves(*tensors)
            torch.autograd.grad(scan(*inputs), inputs, above)

        with torch.no_grad():
            forward = timed(lambda scan=scan, tensors=tensors: scan(*tensors), options)
        rows[name] = {"forward": forward, "forward_backward": timed(both, options)}
    bound = {}
    if copied is not None:
        elements = batch * tokens * channels
        bound["bytes_ms"] = 3 * elements * u.element_size() / copied  # u, delta, y
        rate = floor.gpu_exponentials(device)
        if rate is not None:
            bound["exponentials_ms"] = elements * n / rate * 1e3
    return {"dtype": str(dtype), "tokens": tokens, "ms": rows, "bound_forward": bound}


def timed(function: Callable[[], object], options: argparse.Namespace) -> list[float]:
    """Milliseconds by the GPU's own events: median and quartiles, the cache emptied before each call."""
    if options.dry:
        function()
        return []
    from triton.testing import do_bench

    low, median, high = do_bench(function, warmup=50, rep=300, quantiles=[0.25, 0.5, 0.75])
    return [median, low, high]


def bytes_per_ms(device: str) -> float:
    from triton.testing import do_bench

    source = torch.rand(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / do_bench(lambda: target.copy_(source), warmup=50, rep=200, return_mode="median")


def machine(device: str) -> dict[str, str]:
    import triton

    name = torch.cuda.get_device_name() if device == "cuda" else "Triton's interpreter"
    return {"gpu": name, "torch": torch.__version__, "triton": triton.__version__, "cuda": str(torch.version.cuda)}


if __name__ == "__main__":
    main()
