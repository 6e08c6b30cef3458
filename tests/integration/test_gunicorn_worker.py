"""Our worker of gunicorn: whom it leaves connections to, and what is left of them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import attrs
import pytest

TESTS = Path(__file__).parents[1]
PATIENCE_S = 20.0
GRACE_S = 3.0
"""So long gunicorn keeps what a connection was about."""
WORKER = "external_agents.adapters.rest.worker.Worker"
REQUEST = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"


@attrs.frozen
class Running:
    port: int
    master: int

    @property
    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.master}/task/{self.master}/children").read_text()
        return [int(pid) for pid in children.split()]

    def connect(self) -> socket.socket:
        """A connection that has been answered once."""
        opened = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)
        opened.sendall(REQUEST)
        assert opened.recv(65_536).startswith(b"HTTP/1.1 200")
        return opened


@pytest.fixture
def running() -> Iterator[Running]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        command = [sys.executable, "-m", "gunicorn", "-k", WORKER, "--workers", "2"]
        command += ["--bind", f"fd://{listener.fileno()}", "--no-control-socket", "--asgi-lifespan", "on"]
        command += ["--http-parser", "fast"]
        command += ["--pythonpath", str(TESTS), "connection_census:app"]
        server = subprocess.Popen(command, pass_fds=[listener.fileno()], stderr=subprocess.PIPE, text=True)
    try:
        found = Running(port, server.pid)
        deadline = time.monotonic() + PATIENCE_S
        while len(found.workers) < 2 or min(map(connections_of, found.workers)) < 0:
            assert time.monotonic() < deadline, "the workers did not come"
            time.sleep(0.05)
        found.connect().close()
        time.sleep(1)  # Both serve.
        yield found
    finally:
        server.send_signal(signal.SIGTERM)
        _, log = server.communicate(timeout=PATIENCE_S)
    assert "Traceback" not in log, log


def connections_of(pid: int) -> int:
    """Its sockets; -1: it is not there."""
    try:
        descriptors = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return -1
    return sum(target.startswith("socket:") for target in descriptors)


def test_connections_that_come_together_are_shared_among_the_workers(running: Running) -> None:
    before = [connections_of(pid) for pid in running.workers]
    count = 100
    with ExitStack() as stack:
        opened = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in opened:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", running.port))
        for one in opened:
            one.setblocking(True)
            one.settimeout(PATIENCE_S)
            one.sendall(REQUEST)
        for one in opened:
            assert one.recv(65_536).startswith(b"HTTP/1.1 200")
        shares = [connections_of(pid) - had for pid, had in zip(running.workers, before, strict=True)]
    assert sum(shares) == count
    assert min(shares) >= count // 5, shares


def test_a_connection_that_is_over_leaves_nothing(running: Running) -> None:
    for _ in range(100):
        running.connect().close()
    time.sleep(GRACE_S + 1)
    with running.connect() as last:
        last.sendall(REQUEST)
        _, _, known = last.recv(65_536).partition(b"\r\n\r\n")
    assert int(known) <= 3, f"{known} of 100 connections are still known"
