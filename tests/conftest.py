"""What holds for every test: the folder of shared material, no network."""

import os
import socket
from pathlib import Path

import pytest

REMOTE = (socket.AF_INET, socket.AF_INET6)


@pytest.fixture(scope="session")
def shared():
    """The folder with golden files and pictures beside the checkout (SVP_SHARED names another); skips without it."""
    folder = Path(os.environ.get("SVP_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"{folder} is absent: it holds real pictures that are not part of this repository")
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Only this machine may be spoken to: code that reaches for the network fails at once."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in REMOTE and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
