"""Ctrl-C and SIGTERM, held back until a run has saved itself."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Signals:
    """Remembers Ctrl-C and SIGTERM until the current step is done, then delivers them to whoever handled them before."""

    KINDS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.caught: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            heard = [kind for kind in self.KINDS if signal.getsignal(kind) is not signal.SIG_IGN]  # nohup: stay deaf
            self.before = {kind: signal.signal(kind, self.catch) for kind in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self.before.items():
            signal.signal(kind, handler)
        self.before = {}

    def catch(self, kind: int, frame: FrameType | None) -> None:
        if self.caught is not None:  # asked twice: do not wait
            self.deliver()
        self.caught = kind

    def deliver(self) -> None:
        self.__exit__()
        kind = self.caught or signal.SIGTERM
        signal.raise_signal(kind)
        raise KeyboardInterrupt if kind == signal.SIGINT else SystemExit(143)  # whoever handled it has returned
