"""
`serve`: a small process with two children, gunicorn and the embedded PostgreSQL, that starts, watches and ends them.

PostgreSQL is not gunicorn's child, for gunicorn's master reaps every child of its process, and a database that died
under it would die unseen. Both run in sessions of their own, so a terminal's Ctrl-C comes here alone, and both get a
signal from the kernel when this process ends, however it ends. PostgreSQL starts first and stops last.
"""

from __future__ import annotations

import http.client
import os
import queue
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

import attrs

from external_agents.adapters.postgres.child_process import ChildProcess, Launch
from external_agents.adapters.postgres.embedded import EmbeddedPostgres, EmbeddedPostgresError, owned, shared
from external_agents.adapters.rest.gunicorn_server import APP, BACKLOG, GunicornOptions
from external_agents.domain.errors import ExternalAgentsError

START_TIMEOUT_S = 60.0
GRACEFUL_TIMEOUT_S = 135
DRAIN_MARGIN_S = 10.0
"""For gunicorn to end by itself after its own graceful timeout."""
GROUP_TIMEOUT_S = 5.0
WATCH_S = 0.25
READY_POLL_S = 0.05
PROBE_TIMEOUT_S = 2.0
RESTART_DELAYS_S = (0.0, 0.5, 1.0, 2.0, 4.0)
RESTARTS_MAX = 5
RESTARTS_WITHIN_S = 60.0
ENDED_AT_ONCE = 130


class ServeError(ExternalAgentsError):
    """`serve` cannot start, or cannot go on; the message says what happened and what to change."""


@attrs.frozen(kw_only=True)
class Serving:
    """Where and with what to serve; port 0 takes a free one. `workers` are gunicorn's processes."""

    host: str = "127.0.0.1"
    port: int = 8080
    workers: int = attrs.field(factory=lambda: os.cpu_count() or 1)
    app: str = APP


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def supervise(
    *,
    home: Path | None,
    database_url: str | None,
    serving: Serving,
    before_serving: Callable[[str], None],
    on_ready: Callable[[str], None],
    tell: Callable[[str], None] = to_stderr,
) -> int:
    """
    Serve until a signal or a fault ends it; on return nothing that was started here is left. Main thread only.

    `home` has the embedded database, which is used when there is no `database_url`. `before_serving` gets the
    database's URL (migrations belong there), `on_ready` the address (`http://127.0.0.1:8080`) as soon as the API
    answers, `tell` what an operator should know meanwhile. The first SIGINT or SIGTERM drains, a second one ends at
    once; one that comes before the API answers ends at once too.

    Returns:
        0 after draining, or when stopped before it served; 1 when the drain was cut off; 130 after a second signal.

    Raises:
        ServeError, EmbeddedPostgresError: It cannot start or cannot go on. What `before_serving` raises goes through.
    """
    events: queue.SimpleQueue[str] = queue.SimpleQueue()
    signals = _Signals(events)
    with signals.caught():
        try:
            with ExitStack() as stack:
                listener = stack.enter_context(_bound(serving))
                server = None
                if database_url is None:
                    assert home is not None, "without a database URL, HOME has the database"
                    server = stack.enter_context(owned(home))
                before_serving(server.url if server is not None else str(database_url))
                if server is not None:
                    assert home is not None
                    stack.enter_context(shared(home, server))
                gunicorn = stack.enter_context(_gunicorn(serving, listener, events))
                watch = _Watch(gunicorn, server, events, tell)
                host, port = listener.getsockname()[:2]
                listener.close()  # gunicorn has it now, and stops listening when it drains
                watch.until_ready(host, port)
                with signals.serving():
                    on_ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
                    return watch.until_ended()
        except _Interrupted:
            return ENDED_AT_ONCE if signals.served else 0


class _Interrupted(BaseException):
    """Raised by a signal that must not wait, wherever the main thread stands."""


class _Signals:
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
            raise _Interrupted


class _Watch:
    """Waits for what happens to the two children, and acts on it."""

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
        while not _answers(host, port):
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


@contextmanager
def _bound(serving: Serving) -> Iterator[socket.socket]:
    """The API's socket, bound here so that a port in use is told in one line, and before anything else is started."""
    where = f"{serving.host}, port {serving.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            serving.host, serving.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ServeError(f"Cannot listen on {where}: {error.strerror}. Choose another with --host.") from error
    with listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError as error:
            raise ServeError(
                f"Cannot listen on {where}: {error.strerror}. Choose another with --host or --port."
            ) from error
        yield listener


@contextmanager
def _gunicorn(serving: Serving, listener: socket.socket, events: queue.SimpleQueue[str]) -> Iterator[ChildProcess]:
    options = GunicornOptions(
        listener_fd=listener.fileno(), workers=serving.workers, graceful_timeout_s=GRACEFUL_TIMEOUT_S, app=serving.app
    )
    launch = Launch(argv=options.command(), death_signal=signal.SIGKILL, inherited_fds=(listener.fileno(),))
    child = ChildProcess(launch, on_end=lambda: events.put("ended"))
    try:
        yield child
    finally:
        _end_group(child)


def _end_group(leader: ChildProcess) -> None:
    """Kill what is left of the leader and of its workers, and wait until they are gone."""
    leader.end()
    with suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)
    deadline = time.monotonic() + GROUP_TIMEOUT_S
    while _lives(leader.pid) and time.monotonic() < deadline:
        time.sleep(READY_POLL_S)


def _lives(group: int) -> bool:
    """Whether a process of this group still runs; one that nobody has reaped does not."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, its_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return True
    return False


def _answers(host: str, port: int) -> bool:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  asked, not bound
    connection = http.client.HTTPConnection(reachable, port, timeout=PROBE_TIMEOUT_S)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
