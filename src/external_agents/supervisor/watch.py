"""Waiting for what happens to the two children."""

from __future__ import annotations

import queue
import signal
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from external_agents.adapters.postgres.embedded import EmbeddedPostgres, EmbeddedPostgresError
from external_agents.adapters.postgres.embedded.child_process import ChildProcess
from external_agents.supervisor.gunicorn import GRACEFUL_TIMEOUT_S, READY_POLL_S, ServeError, answers

START_TIMEOUT_S = 60.0
DRAIN_MARGIN_S = 10.0
"""For gunicorn to end by itself after its own graceful timeout."""
WATCH_S = 0.25
RESTART_DELAYS_S = (0.0, 0.5, 1.0, 2.0, 4.0)
RESTARTS_MAX = 5
RESTARTS_WITHIN_S = 60.0


class Watch:
    """Sees the API up, the database up again when it dies, and gunicorn to its end."""

    def __init__(
        self,
        gunicorn: ChildProcess,
        server: EmbeddedPostgres | None,
        events: queue.SimpleQueue[str],
        tell: Callable[[str], None],
    ) -> None:
        self._gunicorn = gunicorn
        self._server = server
        self._events = events
        self._tell = tell
        self._restarts: deque[float] = deque(maxlen=RESTARTS_MAX)
        self._drain_deadline: float | None = None

    def until_ready(self, host: str, port: int) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not answers(host, port):
            self._wait(READY_POLL_S)
            if (status := self._gunicorn.poll()) is not None:
                raise ServeError(f"The API did not start (gunicorn ended with {status}): the lines above say why.")
            if time.monotonic() > deadline:
                raise ServeError(f"The API did not answer GET /healthz with 200 within {START_TIMEOUT_S:.0f} s.")

    def until_ended(self) -> int:
        while (status := self._gunicorn.poll()) is None:
            if self._wait(WATCH_S) == "drain":
                self._tell("Draining: what is running may finish. Another signal ends it at once.")
                self._drain_deadline = time.monotonic() + GRACEFUL_TIMEOUT_S + DRAIN_MARGIN_S
                self._gunicorn.send(signal.SIGTERM)
            if self._drain_deadline is not None and time.monotonic() > self._drain_deadline:
                self._tell("What was still running has been cut off.")
                return 1
        if self._drain_deadline is None:
            raise ServeError(f"The API's server ended by itself (gunicorn, with {status}): start it again.")
        return 0 if status == 0 else 1

    def _wait(self, timeout_s: float) -> str | None:
        """The next event within that time, after seeing to the database."""
        event = None
        with suppress(queue.Empty):
            event = self._events.get(timeout=timeout_s)
        if self._server is not None and (status := self._server.poll()) is not None:
            self._tell(f"The embedded PostgreSQL ended by itself (with {status}) and is started again.")
            self._restart(self._server)
        return event

    def _restart(self, server: EmbeddedPostgres) -> None:
        now = time.monotonic()
        if len(self._restarts) == RESTARTS_MAX and now - self._restarts[0] < RESTARTS_WITHIN_S:
            raise ServeError(f"The embedded PostgreSQL ended {RESTARTS_MAX + 1} times within a minute: see its log.")
        self._restarts.append(now)
        for delay_s in RESTART_DELAYS_S:
            time.sleep(delay_s)
            try:
                server.start()
            except EmbeddedPostgresError as error:
                last = error
            else:
                return
        raise ServeError(f"The embedded PostgreSQL could not be started again: {last}")
