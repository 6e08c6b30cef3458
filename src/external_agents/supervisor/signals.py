"""What the signals of an operator mean to `serve`, and when."""

from __future__ import annotations

import queue
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """Raised by a signal that must not wait, wherever the main thread stands."""


class Signals:
    """
    SIGINT, SIGTERM and SIGHUP.

    The first one while serving is an event, `drain`. The next one, and any one while not serving, interrupts; after
    that they are ignored, for everything is ending already.
    """

    NAMES = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, events: queue.SimpleQueue[str]) -> None:
        self._events = events
        self._serving = False
        self._draining = False
        self._interrupted = False
        self.served = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        before = {name: signal.getsignal(name) for name in self.NAMES}
        for name in self.NAMES:
            if name != signal.SIGHUP or before[name] != signal.SIG_IGN:  # ignored by nohup, and so it stays
                signal.signal(name, self._on_signal)
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    @contextmanager
    def serving(self) -> Iterator[None]:
        self._serving = self.served = True
        try:
            yield
        finally:
            self._serving = False

    def _on_signal(self, _signum: int, _frame: FrameType | None) -> None:
        if self._serving and not self._draining:
            self._draining = True
            self._events.put("drain")
        elif not self._interrupted:
            self._interrupted = True
            raise Interrupted
