"""What holds for every test: one thread, the folder of shared material, no network, NaN in fresh memory."""

import os
import signal
import socket
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from svp.ops import native

REMOTE = (socket.AF_INET, socket.AF_INET6)


@pytest.fixture(scope="session")
def shared():
    """The folder with golden files and pictures beside the checkout (SVP_SHARED names another); skips without it."""
    folder = Path(os.environ.get("SVP_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"{folder} is absent: it holds real pictures that are not part of this repository")
    return folder


def pytest_configure(config):
    """One thread here and in the processes that tests start: several test processes share the cores. Seeded examples."""
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ):  # started in the background of a shell: children would be deaf
        signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    settings.register_profile("svp", deadline=None, derandomize=True)
    settings.load_profile("svp")


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(monkeypatch):
    """What our ops ask torch for holds NaN: an element that a kernel forgets is found."""
    fresh = torch.Tensor.new_empty

    def new_empty(self, *args, **options):
        t = fresh(self, *args, **options)
        return t.fill_(float("nan")) if t.is_floating_point() else t

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(native, "KEEP_FLOATS", 0)  # rooms are fresh, too
    monkeypatch.setattr(native, "_kept", threading.local())


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Only this machine may be spoken to: code that reaches for the network fails at once."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in REMOTE and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(params=native.levels() or ["none"])
def isa(request):
    """Each instruction-set level of this machine in turn."""
    if not native.available:
        pytest.skip(native.reason)
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)
