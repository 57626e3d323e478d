"""What a run asks of the machine and says about it: device, precision, workers, memory, versions."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from svp.errors import SvpError, unknown
from svp.extras import own_version

Amp = Literal["auto", "off", "bf16", "fp16"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def device_named(name: str = "auto") -> torch.device:
    """auto: cuda, else mps, else cpu; a named device that is not there is an error that says what is."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as err:
        raise unknown("device", name, ["auto", "cpu", "cuda", "mps"]) from err
    missing = None
    if device.type == "cuda" and not torch.cuda.is_available():
        missing = "this torch was built without CUDA" if torch.version.cuda is None else "no NVIDIA GPU answers"
    elif device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        missing = f"there are {torch.cuda.device_count()}: cuda:0 to cuda:{torch.cuda.device_count() - 1}"
    elif device.type == "mps" and not torch.backends.mps.is_available():
        missing = "only Macs with Apple silicon have it"
    elif device.type not in ("cpu", "cuda", "mps"):
        missing = "svp runs on cpu, cuda and mps"
    if missing:
        raise SvpError(f"the device {name} is not available: {missing}", "--device auto, or cpu", "env")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device


def precision(amp: Amp, recipe_amp: str | None, device: torch.device) -> str:
    """ "off", "bf16" or "fp16": what is asked for by name, else what the recipe names, else off on the CPU, bf16 on CUDA."""
    if amp not in ("auto", "off", *DTYPES):
        raise unknown("precision", amp, ["auto", "off", "bf16", "fp16"])
    if amp == "auto":
        able = device.type == "cuda" and torch.cuda.is_bf16_supported()
        amp = recipe_amp or ("bf16" if able else "off")  # type: ignore[assignment]
    if amp == "fp16" and device.type != "cuda":
        raise SvpError(f"precision fp16 needs a GPU, the device is {device.type}", "--amp off, or bf16", "env")
    return amp


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager:
    """The precision of forward passes; scans keep float32 whatever it is."""
    if amp == "off":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[amp])


def default_workers(device: torch.device) -> int:
    """On a GPU up to 4. On the CPU none: the network needs the cores, and pictures are decoded once."""
    return 0 if device.type == "cpu" else min(4, cpus())


def cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory so far: of the GPU where there is one, else of this process; None where nobody counts it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):  # a child's ru_maxrss begins with the size of its parent
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak_memory(device: torch.device) -> None:
    """Count the peak anew, where the system lets it (Linux, CUDA), so that one run's does not stand in the next one's row."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")


def is_out_of_memory(err: BaseException) -> bool:
    words = ("out of memory", "can't allocate memory", "not enough memory", "DefaultCPUAllocator")
    return isinstance(err, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(err, RuntimeError) and any(word in str(err) for word in words)
    )


@contextlib.contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """torch's deterministic algorithms inside, its former setting after."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def versions() -> dict[str, str]:
    """Of what decides the numbers."""
    import numpy
    import PIL

    return {
        "svp": own_version(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
    }


@functools.cache  # of the code that was loaded: files may change while a run goes on
def git_revision() -> str | None:
    """The commit of a source checkout of this package, "-dirty" where files differ; None for an installed one."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def kernel_name(backbone: Any, device: torch.device) -> str:
    """Which selective scan answers for this backbone; "none" for one without scans."""
    from svp.ops.dispatch import environment, table

    has_scans = any(block.n for block in backbone.site().blocks)
    if not has_scans:
        return "none"
    wanted = environment() if backbone.kernel == "auto" else backbone.kernel
    if wanted != "auto":
        return wanted
    return next((row.name for row in table("selective_scan", device.type) if row.chosen), "none")


# -- several processes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Team:
    """The processes of one run, as torchrun started them; alone: one."""

    rank: int = 0
    size: int = 1
    ours: bool = False  # whether we opened the process group, and so close it

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, items: Any) -> Any:
        """This process's consecutive part of a batch; equal parts where the batch allows it."""
        n = len(items)
        return items[self.rank * n // self.size : (self.rank + 1) * n // self.size]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over processes, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values

    def agree(self, tensors: Iterable[torch.Tensor]) -> None:
        """Every process takes the first one's values, in place."""
        if self.size > 1:
            for t in tensors:
                torch.distributed.broadcast(t, 0)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, on every process."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, value)
        return found

    def close(self) -> None:
        if self.ours:
            torch.distributed.destroy_process_group()


def join_team(device: torch.device) -> Team:
    """The team that torchrun's environment, or an open process group, describes."""
    dist = torch.distributed
    if not dist.is_available():
        return Team()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL speaks from the current one
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "RANK" not in os.environ:
            return Team()
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return Team(dist.get_rank(), dist.get_world_size(), True)
    return Team(dist.get_rank(), dist.get_world_size())
