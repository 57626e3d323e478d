"""What several tests share: golden files, tolerances, small pictures."""

import json
from pathlib import Path

import torch
from safetensors import safe_open

GOLDEN = Path(__file__).parent / "golden"


def golden(folder, case):
    """(config, {key: float64 tensor}) of tests/golden/FOLDER/CASE.safetensors."""
    with safe_open(GOLDEN / folder / f"{case}.safetensors", "pt") as f:
        return json.loads(f.metadata()["config"]), {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118


def cases(folder, *patterns):
    """Names of the golden files that match; of each pattern there must be some."""
    found = [[path.stem for path in (GOLDEN / folder).glob(f"{pattern}.safetensors")] for pattern in patterns]
    assert all(found), (
        f"no golden file in {folder} for {[p for p, names in zip(patterns, found, strict=True) if not names]}"
    )
    return sorted(name for names in found for name in names)


def starting(tensors, prefix):
    """The tensors under a prefix, the prefix removed."""
    return {key[len(prefix) :]: t for key, t in tensors.items() if key.startswith(prefix)}


def assert_close(got, want, name, tolerance=1e-10):
    """Largest difference relative to the largest entry of `want` (absolute where that is zero)."""
    assert got is not None, f"{name}: no value"
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)} is not {tuple(want.shape)}"
    scale = want.abs().max().item() if want.numel() else 0.0
    worst = (got.detach().to(want.dtype) - want).abs().max().item() if want.numel() else 0.0
    assert worst <= tolerance * (scale or 1.0), f"{name}: off by {worst:.3e} of {scale:.3e}"


# float32 through the fast kernel, as the golden READMEs have it: outputs, gradients (relative to the largest entry)
FLOAT32 = {"vim": (2e-5, 1e-4), "svp": (5e-5, 2e-4), "peft": (2e-4, 2e-4)}


def precisions(folder):
    """(dtype, kernel, output tolerance, gradient tolerance) to run each golden case in."""
    return [(torch.float64, "reference", 1e-10, 1e-10), (torch.float32, "auto", *FLOAT32[folder])]
