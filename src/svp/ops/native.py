"""Loads the compiled library: plain C functions, one file for every Python and torch."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch  # before the library: both then share torch's libgomp

from svp.errors import SvpError

ABI = 1  # must equal ABI of csrc/interface.cpp
ENV = "SVP_ISA"  # forces a level: avx512, avx2 or generic
LEVELS = ("generic", "avx2", "avx512")
HERE = Path(__file__).parent


def _load() -> tuple[ctypes.CDLL | None, str]:
    ending = {"win32": "svp_kernels.dll", "darwin": "libsvp_kernels.dylib"}.get(sys.platform, "libsvp_kernels.so")
    path = next((p for p in (HERE / ending, *_installed(ending)) if p.is_file()), None)
    if path is None:
        return None, "the C++ part was not built: install again with a C++17 compiler and CMake at hand"
    try:
        found = ctypes.CDLL(str(path))
    except OSError as err:
        return None, f"{path.name} cannot be loaded: {err}"
    found.svp_abi.restype = ctypes.c_int
    if found.svp_abi() != ABI:
        return None, f"{path.name} is of another version (interface {found.svp_abi()}, expected {ABI}): install again"
    found.svp_isa.restype = ctypes.c_int
    found.svp_set_isa.argtypes = [ctypes.c_int]
    return found, ""


def _installed(name: str) -> list[Path]:
    """Where an editable install puts the library: the package folder of site-packages."""
    return [Path(entry) / "svp" / "ops" / name for entry in sys.path if entry]


library, reason = _load()
available = library is not None


def isa() -> str:
    """The instruction-set level that answers: "avx512", "avx2", "generic"; "" without the library."""
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


_forked = False


def threads() -> int:
    """How many threads a kernel may use: torch's number, one in a forked child (a second region there would hang)."""
    return 1 if _forked else torch.get_num_threads()


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
if available and os.environ.get(ENV):
    set_isa(os.environ[ENV])
