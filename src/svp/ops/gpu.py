"""What a Triton kernel needs of this machine."""

from __future__ import annotations

import os
import shutil
from functools import cache

import torch

INTERPRET = "TRITON_INTERPRET"  # Triton's own variable: kernels run in Python, on tensors of the CPU
CAPABILITY = (8, 0)  # the oldest that Triton supports


def interpreted() -> bool:
    """Whether Triton's interpreter is on. Triton asks when a kernel's file is loaded: set it before that."""
    return os.environ.get(INTERPRET, "").lower() in ("1", "true", "yes", "on", "y")


def missing() -> str | None:
    """Why no Triton kernel can run here, or None."""
    if interpreted():
        return None
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device answers"
    found = torch.cuda.get_device_capability()
    if found < CAPABILITY:
        return f"the GPU is of compute capability {found[0]}.{found[1]}, Triton needs {CAPABILITY[0]}.{CAPABILITY[1]}"
    if not _compiler(os.environ.get("CC"), os.environ.get("PATH")):
        return "Triton needs a C compiler to launch what it compiled: install gcc, or name one in CC"
    return None


@cache  # every call of an op asks, and looking through PATH takes longer than launching a kernel
def _compiler(named: str | None, path: str | None) -> str | None:
    """A C compiler: the one that CC names, or one on PATH."""
    return named or shutil.which("gcc", path=path) or shutil.which("clang", path=path)
