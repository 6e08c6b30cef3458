"""`serve` besieged: many connections that ask for nothing stop neither the others nor its end."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from http.client import HTTPConnection
from statistics import median

import httpx
import pytest

from agents import Reply
from external_agents.adapters.rest.body import DRAIN_S, GRACE_S
from external_agents.adapters.rest.connection import Patience
from serve import API, Serve, agent_document, agent_in_thread, bearer, eventually, home_folder, serving

pytestmark = pytest.mark.xdist_group("serve-metrics")

EACH = 64
SOON_S = 1.0
MARGIN_S = 30.0
LONGEST_S = max(Patience().head_s, GRACE_S + DRAIN_S) + MARGIN_S


class Siege:
    """Slow callers of every kind, as many of each."""

    def __init__(self, serve: Serve, stack: ExitStack) -> None:
        address = httpx.URL(serve.address)
        head = f"POST {API} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {serve.key}\r\n"
        head += "Content-Type: application/json\r\n"
        kinds = [
            (b"", b""),
            (b"GET /hea", b""),
            (head.encode(), b"X: y\r\n"),
            (f"{head}Content-Length: 100000\r\n\r\n".encode(), b" "),
            (f"{head}Transfer-Encoding: chunked\r\n\r\n".encode(), b"1\r\n \r\n"),
        ]
        self.began_s = time.monotonic()
        self.standing: dict[socket.socket, bytes] = {}
        for opening, drop in kinds * EACH:
            one = stack.enter_context(socket.create_connection((address.host, address.port or 0), timeout=20))
            one.sendall(opening)
            one.setblocking(False)
            self.standing[one] = drop

    def drip(self) -> None:
        """Each sends its next piece; those that were sent away are forgotten."""
        for one, drop in list(self.standing.items()):
            try:
                if not one.recv(65_536):
                    del self.standing[one]
                    continue
            except BlockingIOError:
                pass
            except ConnectionResetError:
                del self.standing[one]
                continue
            with suppress(OSError):
                one.sendall(drop)


@pytest.fixture
def serve() -> Iterator[Serve]:
    with home_folder() as home, serving(home, "--dev") as running:
        yield running


def answered_s(serve: Serve, path: str) -> float:
    """How long it takes to connect and to be answered."""
    began_s = time.monotonic()
    connection = HTTPConnection(httpx.URL(serve.address).netloc.decode(), timeout=LONGEST_S)
    connection.request("GET", path, headers=bearer(serve.key))
    answer = connection.getresponse()
    answer.read()
    connection.close()
    assert answer.status == 200
    return time.monotonic() - began_s


def test_the_others_are_answered_at_once_and_the_slow_ones_go(serve: Serve) -> None:
    with ExitStack() as stack:
        siege = Siege(serve, stack)
        waits_s = []
        while siege.standing:
            siege.drip()
            waits_s += [answered_s(serve, path) for path in ("/readyz", API) * 3]
            assert time.monotonic() - siege.began_s < LONGEST_S, siege.standing
            time.sleep(0.3)
        assert median(waits_s) < SOON_S
        assert time.monotonic() - siege.began_s > Patience().head_s / 2, "the siege was none"


def test_a_drain_waits_for_invocations_and_not_for_them(serve: Serve) -> None:
    with agent_in_thread(Reply(delay_s=3.0)) as agent, ExitStack() as stack:
        with serve.client() as client:
            made = client.post(API, json=agent_document(agent.url))
            path = f"{API}/{made.json()['id']}/invoke"
        answers: list[int] = []

        def invoke() -> None:
            with serve.client() as client:
                answers.append(client.post(path, json={}).status_code)

        caller = threading.Thread(target=invoke)
        caller.start()
        eventually(lambda: agent.connections, 20)
        Siege(serve, stack)
        serve.process.send_signal(signal.SIGTERM)
        assert serve.wait(LONGEST_S) == 0
        caller.join()
        assert answers == [200]
