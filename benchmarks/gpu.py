"""How fast are the scan and a whole SVP training step on this GPU, beside what it can do at most?

    python benchmarks/gpu.py [--batch 96] [--sizes 224 512] [--repeats 20] [--json FILE]

scan    one direction of Vim-S (768 channels, 16 states), forward, and with the backward of a frozen backbone:
        ours; the reference under torch.compile; mamba_ssm where it can be imported, with the turning into its layout
step    forward, backward and optimiser: Vim-S with SVP by our kernel; timm's ViT-S with 50 deep prompts
floor   of the scan: its exponentials at 16 a clock and multiprocessor, or its least bytes at the given rate; published
        peaks (--terabytes, default an H200's 4.3), not measured here

It checks outputs and gradients against the reference first and prints no speed for a wrong answer. --dry runs tiny
shapes once, on the CPU too under TRITON_INTERPRET=1: it measures nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import svp
from svp.ops import gpu, selective_scan
from svp.ops.compare import compare

CHANNELS, STATES, PROMPTS = 768, 16, 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 512])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--terabytes", type=float, default=4.3, help="memory rate a second, for the floor")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, once")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    why = gpu.missing()
    if why is not None or (gpu.interpreted() and not options.dry):
        sys.exit(f"nothing to measure: {why or 'the interpreter is on'}")
    device = "cpu" if gpu.interpreted() else "cuda"
    shape = (1, 5, 3, 2) if options.dry else (2, 197, CHANNELS, STATES)
    report: dict = {"machine": machine(device), "batch": options.batch, "errors": {}, "scan": [], "step": []}
    for op in ("selective_scan", "causal_conv1d"):
        found = compare(op, "triton", device, shape)
        if not found.is_right:
            sys.exit(f"{op} is wrong: {found.worst} is off by {found.error:.1e}")
        report["errors"][op] = found.error
    for dtype in (torch.float32, torch.bfloat16):
        for size in [32] if options.dry else options.sizes:
            tokens = 3 if options.dry else (size // 16) ** 2 + 1
            report["scan"].append(scans(device, dtype, tokens, options))
            if not options.dry:  # a network takes the interpreter minutes; tests/ops/test_triton.py runs one
                report["step"].append(steps(device, dtype, size, options))
    text = json.dumps(report, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


def scans(device: str, dtype: torch.dtype, tokens: int, options: argparse.Namespace) -> dict:
    batch, channels, n = (1, 3, 2) if options.dry else (options.batch, CHANNELS, STATES)
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device, dtype)

    u, delta = normal(batch, tokens, channels), normal(batch, tokens, channels)
    B, C = normal(batch, tokens, 24 + 2 * n).split([24, n, n], -1)[1:]
    A = -torch.arange(1, n + 1, device=device).float().repeat(channels, 1)
    D, bias, dy = (
        torch.ones(channels, device=device),
        torch.full((channels,), -4.0, device=device),
        normal(batch, tokens, channels),
    )

    def ours(u, delta, B, C, kernel="triton"):
        return selective_scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True, kernel=kernel)

    candidates: dict[str, Callable] = {"ours": ours}
    if not options.dry:
        candidates["compiled reference"] = torch.compile(lambda *t: ours(*t, kernel="reference"))
    if not options.dry and importlib.util.find_spec("mamba_ssm"):
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        def turn(t: Tensor) -> Tensor:
            return t.mT.contiguous()

        candidates["mamba_ssm"] = lambda u, delta, B, C: (
            selective_scan_fn(turn(u), turn(delta), A, turn(B), turn(C), D, delta_bias=bias, delta_softplus=True).mT
        )
    rows: dict = {}
    for name, scan in candidates.items():

        def both(scan=scan):
            leaves = [t.detach().requires_grad_() for t in (u, delta, B, C)]
            scan(*leaves).backward(dy)

        with torch.no_grad():
            forward = timed(lambda scan=scan: scan(u, delta, B, C), device, options)
        rows[name] = {"forward": forward, "forward_backward": timed(both, device, options)}
    elements, size = batch * tokens * channels, u.element_size()
    floor = {"bytes_ms": 3 * elements * size / options.terabytes / 1e9}  # u, delta, y
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        floor["exponentials_ms"] = elements * n / (16 * p.multi_processor_count * getattr(p, "clock_rate", 1.98e6))
    return {"dtype": str(dtype), "tokens": tokens, "candidates": rows, "floor_forward": floor}


def steps(device: str, dtype: torch.dtype, size: int, options: argparse.Namespace) -> dict:
    """Milliseconds and pictures a second of a training step; bf16 by autocast, the state stays float32."""
    import timm

    images = torch.randn(options.batch, 3, size, size, device=device)
    labels = torch.randint(200, (options.batch,), device=device)
    vim = svp.create_backbone("vim_small", img_size=size, kernel="triton").to(device)
    ours = svp.adapt(vim, "svp", num_classes=200).to(device)
    vit = Prompted(timm.create_model("vit_small_patch16_224", img_size=size, num_classes=200)).to(device)
    rows = {}
    for name, model in {"vim_small + svp": ours, f"vit_small + {PROMPTS} deep prompts": vit}.items():
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

        def step(model=model, optimizer=optimizer):
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        found = timed(step, device, options)
        rows[name] = found | {"images_per_second": options.batch / found["median_ms"] * 1e3}
    return {"dtype": str(dtype), "size": size, "candidates": rows}


class Prompted(torch.nn.Module):
    """timm's ViT, frozen, with fresh prompts put behind the class token of every block."""

    def __init__(self, vit: torch.nn.Module):
        super().__init__()
        self.vit = vit.requires_grad_(False)
        vit.head.requires_grad_(True)
        self.prompts = torch.nn.Parameter(0.02 * torch.randn(len(vit.blocks), PROMPTS, vit.embed_dim))

    def forward(self, images: Tensor) -> Tensor:
        x = self.vit._pos_embed(self.vit.patch_embed(images))
        for block, prompts in zip(self.vit.blocks, self.prompts, strict=True):
            x = torch.cat([x[:, :1], prompts.to(x.dtype).expand(len(x), -1, -1), x[:, 1:]], 1)
            x = block(x)
            x = torch.cat([x[:, :1], x[:, 1 + PROMPTS :]], 1)
        return self.vit.forward_head(self.vit.norm(x))


def timed(function: Callable[[], object], device: str, options: argparse.Namespace) -> dict[str, float]:
    """Median and quartiles after a warm-up. The clock of the host around whole calls: launches count."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = []
    for round_ in range(1 if options.dry else options.repeats + 3):
        wait()
        start = time.perf_counter()
        function()
        wait()
        if round_ >= 3 or options.dry:
            seconds.append(time.perf_counter() - start)
    low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {"median_ms": median * 1e3, "iqr_ms": (high - low) * 1e3}


def machine(device: str) -> dict[str, str]:
    import triton

    name = torch.cuda.get_device_name() if device == "cuda" else "Triton's interpreter"
    return {"gpu": name, "torch": torch.__version__, "triton": triton.__version__, "cuda": str(torch.version.cuda)}


if __name__ == "__main__":
    main()
