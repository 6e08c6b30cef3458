"""The child that serves the API: its socket, its start, its end."""

from __future__ import annotations

import http.client
import os
import queue
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs

from external_agents.adapters.postgres.embedded.child_process import ChildProcess, Launch
from external_agents.adapters.rest.gunicorn_server import APP, BACKLOG, GunicornOptions
from external_agents.adapters.telemetry.worker_files import CHILD_EXIT, FOLDER_VARIABLE
from external_agents.domain.errors import ExternalAgentsError

GRACEFUL_TIMEOUT_S = 135
GROUP_TIMEOUT_S = 5.0
READY_POLL_S = 0.05
PROBE_TIMEOUT_S = 2.0


class ServeError(ExternalAgentsError):
    """`serve` cannot start, or cannot go on; the message says what happened and what to change."""


@attrs.frozen(kw_only=True)
class Serving:
    """Where and with what to serve; port 0 takes a free one. `workers` are gunicorn's processes."""

    host: str = "127.0.0.1"
    port: int = 8080
    workers: int = attrs.field(factory=lambda: os.cpu_count() or 1)
    app: str = APP


@contextmanager
def bound(serving: Serving) -> Iterator[socket.socket]:
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
def started(
    serving: Serving, listener: socket.socket, metrics: Path, events: queue.SimpleQueue[str]
) -> Iterator[ChildProcess]:
    """`metrics` is the workers' folder for them."""
    options = GunicornOptions(
        listener_fd=listener.fileno(),
        workers=serving.workers,
        graceful_timeout_s=GRACEFUL_TIMEOUT_S,
        app=serving.app,
        child_exit=CHILD_EXIT,
    )
    launch = Launch(
        argv=options.command(),
        death_signal=signal.SIGKILL,
        inherited_fds=(listener.fileno(),),
        env={**os.environ, FOLDER_VARIABLE: str(metrics)},
    )
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


def answers(host: str, port: int) -> bool:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  asked, not bound
    connection = http.client.HTTPConnection(reachable, port, timeout=PROBE_TIMEOUT_S)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
