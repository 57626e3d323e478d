"""Does a LoRA act on a Mamba block? The package peft, which wraps layers, beside the LoRA of this package, layer by layer.

One block at a time, rank 4, matrices that do not start at zero, one target layer at a time: how far the output moves when the
adapter is switched on, and whether its numbers get a gradient. Where the block is another package's (transformers, mambapy),
it is measured if that package is installed.

    python benchmarks/peft_compare.py [--json docs/results/peft.json]

Vim as published cannot be installed from a package index, so its block is rebuilt here as its fast path reads: raw weights
go to the fused functions and no layer is called. It is first compared with our own mixer on the same tensors.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import svp
from svp.backbones.vim import Mixer, mixer_alone
from svp.errors import SvpError
from svp.ops import causal_conv1d, selective_scan

D, TOKENS, RANK = 32, 17, 4
TARGETS = ("in_proj", "x_proj", "dt_proj", "out_proj", "conv1d")
OURS = {"in_proj": "in_proj", "x_proj": "x_proj", "dt_proj": "dt", "out_proj": "out_proj"}  # peft's word: our target
SIZES = dict(d_state=8, d_conv=4, expand=2, dt_rank=4, scan_type="v2", layer_scale=None, bias=False, conv_bias=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        import peft  # noqa: F401
    except ImportError:
        sys.exit("nothing to compare: peft is not installed (pip install peft)")
    warnings.filterwarnings("ignore")
    check()
    rows = [
        row("peft", name, lambda target, make=make: wrapped(make, target))
        for name, make in NETWORKS.items()
        if available(name)
    ]
    rows.append(row("svp", "Vim of this package", ours))
    versions = {name: installed(name) for name in ("peft", "transformers", "mambapy", "torch")}
    for r in rows:
        cells = "  ".join(f"{target} {cell['said']}" for target, cell in r["cells"].items())
        print(f"{r['tool']:<5} on {r['network']:<42} {cells}")
    print("  ".join(f"{name} {found}" for name, found in versions.items()))
    if options.json:
        options.json.write_text(json.dumps({"lora": rows, "rank": RANK, "versions": versions}, indent=1) + "\n")


# -- the blocks --------------------------------------------------------------------------------------------------------


class PublishedMixer(Mixer):
    """Vim's block as its released fast path computes it: the layers hold weights, their forward is never called."""

    def forward(self, h: Tensor) -> Tensor:
        b, l, d = h.shape
        xz = (self.in_proj.weight @ h.reshape(b * l, d).T).view(-1, b, l).permute(1, 2, 0)  # (b, l, 2e)
        y = fused(self, xz, "") + fused(self, xz.flip(1), "_b").flip(1)
        return F.linear(y / 2, self.out_proj.weight, self.out_proj.bias)


def fused(mod: nn.Module, xz: Tensor, twin: str) -> Tensor:
    """mamba_inner_fn_no_out_proj: what it is given are weights."""
    conv, x_proj, dt_proj = (getattr(mod, name + twin) for name in ("conv1d", "x_proj", "dt_proj"))
    A = -torch.exp(mod.A_b_log if twin else mod.A_log)
    x, z = xz.chunk(2, dim=-1)
    u = causal_conv1d(x, conv.weight[:, 0], conv.bias, activation="silu")
    r, n = dt_proj.weight.shape[1], A.shape[1]
    code, B, C = F.linear(u, x_proj.weight).split([r, n, n], dim=-1)
    delta = F.linear(code, dt_proj.weight)
    y = selective_scan(u, delta, A, B, C, getattr(mod, f"D{twin}"), delta_bias=dt_proj.bias, delta_softplus=True)
    return y * F.silu(z)


def published() -> nn.Module:
    return PublishedMixer(D, **SIZES)


def transformers_mamba() -> nn.Module:
    from transformers import MambaConfig, MambaModel

    config = MambaConfig(hidden_size=D, state_size=8, num_hidden_layers=1, vocab_size=8, use_cache=False)
    return MambaModel(config)


def mambapy_block() -> nn.Module:
    from mambapy.mamba import Mamba, MambaConfig

    return Mamba(MambaConfig(d_model=D, n_layers=1, d_state=8))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "Vim's block as published (fused path)": published,
    "transformers MambaModel (plain PyTorch path)": transformers_mamba,
    "mambapy Mamba": mambapy_block,
}
PACKAGES = {transformers_mamba: "transformers", mambapy_block: "mambapy"}


def available(name: str) -> bool:
    package = PACKAGES.get(NETWORKS[name])
    return package is None or installed(package) != "-"


def installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def check() -> None:
    """The rebuilt block computes what our mixer does on the same tensors; nothing is reported of a wrong one."""
    torch.manual_seed(0)
    block, x = published().double(), torch.randn(2, TOKENS, D, dtype=torch.float64)
    with torch.no_grad():
        want = mixer_alone(block, x, kernel="reference")
        error = ((block(x) - want).abs().max() / want.abs().max()).item()
    if error > 1e-12:
        sys.exit(f"the rebuilt block is off by {error:.1e}")
    print(f"rebuilt block against our mixer in float64: off by {error:.1e} of the largest entry")


# -- the measurement ---------------------------------------------------------------------------------------------------


def row(tool: str, network: str, measure: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return {"tool": tool, "network": network, "cells": {target: measure(target) for target in TARGETS}}


def wrapped(make: Callable[[], nn.Module], target: str) -> dict[str, Any]:
    """peft's LoRA on one layer of a block."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    try:
        model = get_peft_model(make(), LoraConfig(r=RANK, target_modules=[target], init_lora_weights=False)).eval()
    except (ValueError, TypeError, NotImplementedError) as err:
        return {"said": "refused", "why": str(err).split("\n")[0][:200]}
    x = torch.randn(2, TOKENS, D)

    def run() -> Tensor:
        out = model(inputs_embeds=x) if hasattr(model.base_model.model, "embeddings") else model(x)
        return out if isinstance(out, Tensor) else out[0]

    with torch.no_grad(), model.disable_adapter():
        off = run()
    return verdict(run, off, [p for p in model.parameters() if p.requires_grad])


def ours(target: str) -> dict[str, Any]:
    """Our LoRA on one layer of every block of a small Vim; on conv1d, where a product of matrices is none, partial tuning."""
    torch.manual_seed(0)
    net = svp.create_backbone("vim_tiny", embed_dim=D, depth=1, d_state=8, patch_size=8, img_size=32)
    method: Any = (
        ("lora", dict(rank=RANK, targets=(OURS[target],))) if target in OURS else ("partial", dict(parts=(target,)))
    )
    try:
        model = svp.adapt(net, method, num_classes=2).eval()
    except SvpError as err:
        return {"said": "refused", "why": err.problem}
    with torch.no_grad():
        for p in model.method.parameters():
            p += 0.1 * torch.randn_like(p)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), model.disabled():
        off = model.features(x)
    return verdict(lambda: model.features(x), off, [p for p in model.method.parameters() if p.requires_grad])


def verdict(run: Callable[[], Tensor], off: Tensor, trained: list[nn.Parameter]) -> dict[str, Any]:
    """Whether the output moves with the adapter on, and its numbers get a gradient."""
    on = run()
    change = ((on - off).abs().max() / off.abs().max()).item()
    if on.requires_grad:
        on.square().sum().backward()
    has_gradient = all(p.grad is not None and bool(p.grad.any()) for p in trained)
    said = "acts" if change > 0 and has_gradient else "no effect" if change == 0 and not has_gradient else "in part"
    return {"said": said, "change": change, "gradient": has_gradient, "trained": sum(p.numel() for p in trained)}


if __name__ == "__main__":
    main()
