"""
`serve`: a small process with two children, gunicorn and the embedded PostgreSQL, that starts, watches and ends them.

PostgreSQL is not gunicorn's child, for gunicorn's master reaps every child of its process, and a database that died
under it would die unseen. Both run in sessions of their own, so a terminal's Ctrl-C comes here alone, and both get a
signal from the kernel when this process ends, however it ends. PostgreSQL starts first and stops last.
"""

from __future__ import annotations

import queue
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from external_agents.adapters.postgres.embedded import owned, shared
from external_agents.adapters.rest.metrics_server import metrics_served_in_thread
from external_agents.adapters.telemetry.worker_files import WorkerFiles
from external_agents.supervisor.gunicorn import ServeError, Serving, bound, started
from external_agents.supervisor.metrics_folder import metrics_folder
from external_agents.supervisor.signals import Interrupted, Signals
from external_agents.supervisor.watch import Watch

__all__ = ["ServeError", "Serving", "supervise", "to_stderr", "url_of"]

ENDED_AT_ONCE = 130


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def url_of(listener: socket.socket) -> str:
    """`http://127.0.0.1:8080`"""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def supervise(
    *,
    home: Path | None,
    database_url: str | None,
    serving: Serving,
    before_serving: Callable[[str], None],
    on_ready: Callable[[str], None],
    metrics_listener: socket.socket | None = None,
    tell: Callable[[str], None] = to_stderr,
) -> int:
    """
    Serve until a signal or a fault ends it; on return nothing that was started here is left. Main thread only.

    `home` has the embedded database, which is used when there is no `database_url`. `before_serving` gets the
    database's URL (migrations belong there), `on_ready` the address (`http://127.0.0.1:8080`) as soon as the API
    answers, `tell` what an operator should know meanwhile. `metrics_listener` listens for `/metrics` alone: this
    process shows them there until all has ended, and closes it. The first SIGINT or SIGTERM drains, a second one ends
    at once; one that comes before the API answers ends at once too.

    Returns:
        0 after draining, or when stopped before it served; 1 when the drain was cut off; 130 after a second signal.

    Raises:
        ServeError, EmbeddedPostgresError: It cannot start or cannot go on. What `before_serving` raises goes through.
    """
    events: queue.SimpleQueue[str] = queue.SimpleQueue()
    signals = Signals(events)
    with signals.caught():
        try:
            with ExitStack() as stack:
                listener = stack.enter_context(bound(serving))
                server = None
                if database_url is None:
                    assert home is not None, "without a database URL, HOME has the database"
                    server = stack.enter_context(owned(home))
                before_serving(server.url if server is not None else str(database_url))
                if server is not None:
                    assert home is not None
                    stack.enter_context(shared(home, server))
                metrics = stack.enter_context(metrics_folder())
                if metrics_listener is not None:
                    stack.enter_context(metrics_served_in_thread(metrics_listener, WorkerFiles(metrics).exposition))
                gunicorn = stack.enter_context(started(serving, listener, metrics, events))
                watch = Watch(gunicorn, server, events, tell)
                address = url_of(listener)
                host, port = listener.getsockname()[:2]
                listener.close()  # gunicorn has it now, and stops listening when it drains
                watch.until_ready(host, port)
                with signals.serving():
                    on_ready(address)
                    return watch.until_ended()
        except Interrupted:
            return ENDED_AT_ONCE if signals.served else 0
