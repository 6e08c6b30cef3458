"""Our worker of gunicorn: whom it leaves connections to, and what is left of them."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PATIENCE_S = 20.0
WORKER = "external_agents.adapters.rest.worker.Worker"
REQUEST = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"


@pytest.fixture
def port() -> Iterator[int]:
    """Of two workers that both serve."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        command = [sys.executable, "-m", "gunicorn", "-k", WORKER, "--workers", "2", "--http-parser", "fast"]
        command += ["--bind", f"fd://{listener.fileno()}", "--no-control-socket", "--asgi-lifespan", "on"]
        command += ["--pythonpath", str(TESTS), "connection_census:app"]
        server = subprocess.Popen(command, pass_fds=[listener.fileno()], stderr=subprocess.PIPE, text=True)
    try:
        seen: set[int] = set()
        deadline = time.monotonic() + PATIENCE_S
        while len(seen) < 2:
            assert time.monotonic() < deadline, "the workers did not come"
            with connect(port) as connection:
                seen.add(ask(connection)[0])
        yield port
    finally:
        server.send_signal(signal.SIGTERM)
        _, log = server.communicate(timeout=PATIENCE_S)
    assert "Traceback" not in log, log


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)


def ask(connection: socket.socket) -> tuple[int, int]:
    """Which process serves it, and how many connections that one knows."""
    connection.sendall(REQUEST)
    head, _, body = connection.recv(65_536).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    pid, known = body.split()
    return int(pid), int(known)


def test_connections_that_come_together_are_shared_among_the_workers(port: int) -> None:
    count = 100
    with ExitStack() as stack:
        opened = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in opened:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        for one in opened:
            one.settimeout(PATIENCE_S)
        shares = Counter(ask(one)[0] for one in opened)
    assert len(shares) == 2
    assert min(shares.values()) >= count // 5, shares


def test_a_connection_that_is_over_leaves_nothing(port: int) -> None:
    for _ in range(100):
        with connect(port) as connection:
            ask(connection)
    deadline = time.monotonic() + PATIENCE_S
    with connect(port) as last:
        # gunicorn gives what a connection was about three seconds to end.
        while (known := ask(last)[1]) > 3:
            assert time.monotonic() < deadline, f"{known} of 100 connections are still known"
