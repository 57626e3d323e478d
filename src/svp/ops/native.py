"""Loads the compiled library: plain C functions, one file for every Python and torch."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch  # before the library: both then share torch's libgomp
from torch import Tensor

from svp.errors import SvpError

ABI = 5  # must equal ABI of csrc/interface.cpp
ENV = "SVP_ISA"  # forces a level by name
# the generic source is written in vectors of 4, which are NEON's on arm64
LEVELS = ("neon" if platform.machine().lower() in ("arm64", "aarch64") else "generic", "avx2", "avx512")
HERE = Path(__file__).parent
FILE = {"win32": "svp_kernels.dll", "darwin": "libsvp_kernels.dylib"}.get(sys.platform, "libsvp_kernels.so")
NOT_BUILT = "the C++ part was not built: install again with a C++17 compiler and CMake at hand"


def _load() -> tuple[ctypes.CDLL | None, str]:
    path = next((p for p in (HERE / FILE, *_installed(FILE)) if p.is_file()), None)
    if path is None:
        return None, NOT_BUILT
    try:
        found = ctypes.CDLL(str(path))
        found.svp_abi.restype = found.svp_isa.restype = ctypes.c_int
        found.svp_set_isa.argtypes = [ctypes.c_int]
    except (OSError, AttributeError) as err:
        return None, f"{path.name} cannot be loaded: {err}"
    if found.svp_abi() != ABI:
        return None, f"{path.name} is of another version (interface {found.svp_abi()}, expected {ABI}): install again"
    return found, ""


def _installed(name: str) -> list[Path]:
    """Where an editable install puts the library: the package folder of site-packages."""
    return [Path(entry) / "svp" / "ops" / name for entry in sys.path if entry]


library, reason = _load()
available = library is not None


def isa() -> str:
    """The instruction-set level that answers: "avx512", "avx2", "generic" or "neon"; "" without the library."""
    return LEVELS[library.svp_isa()] if library is not None else ""


def set_isa(level: str) -> None:
    """Use this level from now on; raises SvpError when the machine or the build does not have it."""
    if library is None:
        raise SvpError(f"the level {level!r} cannot be chosen: {reason}", "svp doctor", kind="env")
    if level not in LEVELS or library.svp_set_isa(LEVELS.index(level)) != 0:
        raise SvpError(
            f"the instruction-set level {level!r} is not to be had here", f"one of {', '.join(levels())}", kind="env"
        )


def levels() -> list[str]:
    """The levels that this machine and build have, the plainest first."""
    if library is None:
        return []
    before, found = library.svp_isa(), []
    for index, name in enumerate(LEVELS):
        if library.svp_set_isa(index) == 0:
            found.append(name)
    library.svp_set_isa(before)
    return found


# -- calling it --------------------------------------------------------------------------------------------------------


class Rows(ctypes.Structure):  # kernels.h: Rows
    _fields_ = [("data", ctypes.c_void_p), ("b", ctypes.c_int64), ("l", ctypes.c_int64), ("g", ctypes.c_int64)]


def fields(*groups: tuple[type, str]) -> list[tuple[str, type]]:
    """The _fields_ of a structure, several names of one type at a time."""
    return [(name, kind) for kind, names in groups for name in names.split()]


class Call:
    """The arguments of one call: a structure that is filled by name; keeps the tensors alive until it has run."""

    def __init__(self, args: ctypes.Structure):
        self.args = args
        self.alive: list[Tensor] = []

    def put(self, **tensors: Tensor | None) -> None:
        """Sets pointers, and for rows (b, l, …) the strides too. The last axis of rows must be dense, others wholly."""
        for name, t in tensors.items():
            if t is None:
                continue
            if isinstance(getattr(self.args, name), Rows):
                t = t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()
                groups = t.stride(2) if t.dim() == 4 else 0
                setattr(self.args, name, Rows(t.data_ptr(), t.stride(0), t.stride(1), groups))
            else:
                t = t.contiguous()
                setattr(self.args, name, t.data_ptr())
            self.alive.append(t)

    def run(self, name: str) -> None:
        function = getattr(library, name)
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_int
        if function(ctypes.addressof(self.args)) != 0:
            raise MemoryError("the kernel's scratch memory could not be had")


_kept = threading.local()
KEEP_FLOATS = 2**24  # of a thread; what is larger is not kept


def room(*shapes: Sequence[int]) -> tuple[Tensor, ...]:
    """float32 tensors for the steps inside one op, dense, their values arbitrary; the thread's next call gets the same memory.

    Fresh memory costs a page fault every 4 KB, as much as some of the steps themselves.
    """
    line = 16  # floats of a cache line; one more between two tensors, so that walking both does not hit the same sets
    starts, end = [], 0
    for shape in shapes:
        starts.append(end)
        end += (math.prod(shape) + line - 1) // line * line + line
    flat = getattr(_kept, "flat", None)
    if flat is None or len(flat) < end:
        with torch.inference_mode(False):  # a later call may be outside of it
            flat = torch.zeros((), dtype=torch.float32, device="cpu").new_empty(end)
        if end <= KEEP_FLOATS:
            _kept.flat = flat
    return tuple(flat[i : i + math.prod(shape)].view(shape) for i, shape in zip(starts, shapes, strict=True))


def keep_freed_memory() -> bool:
    """Asks the C library to keep what is freed for the next tensor, for the whole process; False where it cannot be asked.

    By default glibc gives large blocks back at once, and each fresh page then costs a fault: up to a third of a step on a
    virtual machine. Programs may choose this (training, benchmarks); importing svp.ops does not.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    trim, mmap, most, heap = -1, -3, 2**31 - 1, 32 * 2**20  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    return bool(mallopt(trim, most)) and bool(mallopt(mmap, most) or mallopt(mmap, heap))  # older ones take no more


_forked = False


def threads(work: Tensor) -> int:
    """How many threads a kernel may use: torch's number; one for little work, and in a forked child, where a second
    parallel region would hang."""
    return 1 if _forked or work.numel() < 20_000 else torch.get_num_threads()


def _after_fork() -> None:
    global _forked
    _forked = True
    torch.set_num_threads(1)  # torch's products between our kernels would hang as well


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
if available and os.environ.get(ENV):
    set_isa(os.environ[ENV])
