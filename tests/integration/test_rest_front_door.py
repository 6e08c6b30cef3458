"""What the server does with heads that are malformed, huge or slow, bodies that drip, and callers who do not listen."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path

import psutil
import pytest

from external_agents.adapters.rest.connection import HEAD_BYTES_MAX
from rest_api import AGENT, AGENTS, BODY_LIMIT_BYTES, SERVER_KEY

TESTS = Path(__file__).parents[1]
PATIENCE_S = 20.0
HASTE_S = 2.0
"""The worker's patience with heads and answers, and the application's with bodies."""

GET = b"GET /healthz HTTP/1.1\r\nHost: api.test\r\n"
POST = (
    f"POST {AGENTS} HTTP/1.1\r\nHost: api.test\r\nAuthorization: Bearer {SERVER_KEY}\r\n"
    "Content-Type: application/json\r\n"
).encode()
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[int, int]]:
    """Its port, and its worker's process."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        command = [sys.executable, "-m", "gunicorn", "-k", "hasty_worker.HastyWorker", "--keep-alive", "30"]
        command += ["--bind", f"fd://{listener.fileno()}", "--no-control-socket", "--asgi-lifespan", "on"]
        command += ["--pythonpath", str(TESTS), f"rest_api:server_app(body_grace_s={HASTE_S})"]
        process = subprocess.Popen(command, pass_fds=[listener.fileno()], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not exchange(port, GET + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 200"):
            assert time.monotonic() < deadline
        [worker] = psutil.Process(process.pid).children()
        yield port, worker.pid
    finally:
        process.terminate()
        _, log = process.communicate(timeout=PATIENCE_S)
    assert "Traceback" not in log, log
    assert "[ERROR]" not in log, log


@pytest.fixture
def port(server: tuple[int, int]) -> int:
    return server[0]


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)


def exchange(port: int, request: bytes) -> bytes:
    """All that the server sends until it closes."""
    with connect(port) as raw:
        raw.sendall(request)
        return rest_of(raw)


def rest_of(raw: socket.socket) -> bytes:
    answer = b""
    while piece := raw.recv(65_536):
        answer += piece
    return answer


def is_refusal(answer: bytes, status: int) -> bool:
    """Whether it is a problem, whole and alone, after which the connection is over."""
    head, _, body = answer.partition(b"\r\n\r\n")
    fields = {name.lower(): value for name, value in re.findall(r"\r\n([^:]+): ([^\r]*)", head.decode())}
    assert head.startswith(f"HTTP/1.1 {status} ".encode()), answer
    assert fields["connection"] == "close"
    assert fields["content-type"] == "application/problem+json"
    assert fields["cache-control"] == "no-store"
    assert fields["x-content-type-options"] == "nosniff"
    problem = json.loads(body)
    assert problem["status"] == status
    assert problem["type"].startswith("urn:external-agents:problem:")
    assert problem["title"]
    assert problem["detail"]
    return True


class TestWhatIsNoRequest:
    @pytest.mark.parametrize(
        "request_",
        [
            pytest.param(POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", id="both lengths"),
            pytest.param(POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", id="both, turned"),
            pytest.param(POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}", id="two lengths"),
            pytest.param(POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", id="two different lengths"),
            pytest.param(POST + b"Content-Length: 2, 2\r\n\r\n{}", id="a list of lengths"),
            pytest.param(POST + b"Content-Length: +2\r\n\r\n{}", id="a signed length"),
            pytest.param(POST + b"Content-Length: -1\r\n\r\n{}", id="a negative length"),
            pytest.param(POST + b"Content-Length: 0x2\r\n\r\n{}", id="a hexadecimal length"),
            pytest.param(POST + b"Content-Length: 18446744073709551618\r\n\r\n{}", id="a length beyond 64 bits"),
            pytest.param(POST + b"Content-Length: 00000000000000000002\r\n\r\n{}", id="a length with zeros"),
            pytest.param(POST + b"Content-Length : 2\r\n\r\n{}", id="a space before the colon"),
            pytest.param(POST + b"Content-Length:\r\n\r\n", id="no length"),
            pytest.param(POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", id="an unknown coding"),
            pytest.param(POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", id="a compressed coding"),
            pytest.param(POST + b"Transfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n", id="identity, chunked"),
            pytest.param(POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", id="chunked, identity"),
            pytest.param(POST + b"Transfer-Encoding: identity\r\n\r\n", id="identity"),
            pytest.param(
                POST + b"Transfer-Encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", id="two codings"
            ),
            pytest.param(POST + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n", id="a vertical tab"),
            pytest.param(
                POST.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", id="chunked in 1.0"
            ),
            pytest.param(CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n", id="a chunk's size in letters"),
            pytest.param(CHUNKED + b"0x2\r\n{}\r\n0\r\n\r\n", id="a chunk's size with a prefix"),
            pytest.param(CHUNKED + b"-2\r\n{}\r\n0\r\n\r\n", id="a negative chunk"),
            pytest.param(CHUNKED + b"\r\n{}\r\n0\r\n\r\n", id="a chunk without size"),
            pytest.param(CHUNKED + b"2 \r\n{}\r\n0\r\n\r\nGET", id="a space behind a chunk's size"),
            pytest.param(CHUNKED + b"2\r\n{}X0\r\n\r\n", id="a chunk that goes on"),
            pytest.param(CHUNKED + b"2\n{}\n0\n\n", id="chunks with bare line feeds"),
            pytest.param(CHUNKED + b"2;" + b"a" * 200_000 + b"\r\n{}\r\n0\r\n\r\n", id="a long extension of a chunk"),
            pytest.param(GET + b"X: a\r\n b\r\n\r\n", id="a folded line"),
            pytest.param(GET + b"X: a\r\n\tContent-Length: 5\r\n\r\n", id="a length in a folded line"),
            pytest.param(b"GET /healthz HTTP/1.1\r\n X: a\r\nHost: a\r\n\r\n", id="a fold of the first line"),
            pytest.param(b"GET /healthz HTTP/1.1\nHost: a\n\n", id="bare line feeds"),
            pytest.param(GET + b"X: a\nY: b\r\n\r\n", id="a bare line feed"),
            pytest.param(GET + b"X: a\rb\r\n\r\n", id="a bare carriage return"),
            pytest.param(GET + b"X: a\x00b\r\n\r\n", id="NUL in a value"),
            pytest.param(GET + b"X\x00: a\r\n\r\n", id="NUL in a name"),
            pytest.param(GET + b"X\r\n\r\n", id="no colon"),
            pytest.param(GET + b": a\r\n\r\n", id="no name"),
            pytest.param(GET + b"X Y: a\r\n\r\n", id="a space in a name"),
            pytest.param(b"GET /healthz HTTP/1.1\r\n\r\n", id="no Host"),
            pytest.param(GET + b"Host: other.test\r\n\r\n", id="two Hosts"),
            pytest.param(b"GET /healthz\r\n\r\n", id="HTTP/0.9"),
            pytest.param(b"GET /healthz HTTP/2.0\r\nHost: a\r\n\r\n", id="HTTP/2.0"),
            pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="the preface of HTTP/2"),
            pytest.param(b"GET healthz HTTP/1.1\r\nHost: a\r\n\r\n", id="no slash"),
            pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 300, id="TLS"),
        ],
    )
    def test_it_is_refused_and_nothing_behind_it_is_read(self, port: int, request_: bytes) -> None:
        assert is_refusal(exchange(port, request_ + GET + b"\r\n"), 400)
        for split in (1, len(request_) // 2, len(request_) - 1):
            with connect(port) as raw:
                raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                raw.sendall(request_[:split])
                time.sleep(0.02)
                raw.sendall(request_[split:] + GET + b"\r\n")
                assert is_refusal(rest_of(raw), 400)

    def test_another_protocol_is_not_waited_for(self, port: int) -> None:
        assert is_refusal(exchange(port, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"), 400)

    def test_a_chunk_larger_than_a_number_holds_is_no_small_one(self, port: int) -> None:
        """2**64 + 2 bytes: whoever counts with 64 bits sees two, and takes what follows for the next request."""
        answer = exchange(port, CHUNKED + b"10000000000000002\r\n{}\r\n0\r\n\r\n" + GET + b"\r\n")
        assert is_refusal(answer, 408)
        answer = exchange(port, CHUNKED + b"10000000000000002\r\n" + b"x" * (BODY_LIMIT_BYTES + 1))
        assert answer.startswith(b"HTTP/1.1 413 ")

    @pytest.mark.parametrize(
        ("request_", "status"),
        [
            (b"GET /" + b"a" * 5_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
            (b"A" * 5_000 + b" / HTTP/1.1\r\nHost: a\r\n\r\n", 414),
            (GET + b"".join(b"X-%d: y\r\n" % number for number in range(101)) + b"\r\n", 431),
            (GET + b"X: " + b"y" * 9_000 + b"\r\n\r\n", 431),
            (GET + b"X" * 9_000 + b": y\r\n\r\n", 431),
            (GET + b"".join(b"X-%d: " % number + b"y" * 8_000 + b"\r\n" for number in range(12)) + b"\r\n", 431),
            (GET + b"X: " + b"y" * 2 * HEAD_BYTES_MAX, 431),
            (b"GET /" + b"y" * 2 * HEAD_BYTES_MAX, 431),
            (CHUNKED + b"0\r\n" + b"X: y\r\n" * 10_000 + b"\r\n", 431),
        ],
    )
    def test_a_head_has_bounds(self, port: int, request_: bytes, status: int) -> None:
        assert is_refusal(exchange(port, request_), status)

    def test_a_head_without_end_takes_no_memory(self, server: tuple[int, int]) -> None:
        port, pid = server
        before = psutil.Process(pid).memory_info().rss
        sent = 0
        with connect(port) as raw:
            raw.sendall(b"GET /healthz HTTP/1.1\r\nX: ")
            with pytest.raises(OSError, match=r"reset|pipe"):  # noqa: PT012
                while sent < 500_000_000:
                    raw.sendall(b"y" * 1_000_000)
                    sent += 1_000_000
        assert sent < 64_000_000, "what follows a refusal is not read for long"
        assert psutil.Process(pid).memory_info().rss - before < 20_000_000

    def test_no_answer_tells_a_version(self, port: int) -> None:
        for request in (GET + b"Connection: close\r\n\r\n", b"?\r\n\r\n"):
            for name, value in re.findall(r"\r\n([^:]+): ([^\r]*)", exchange(port, request).decode()):
                assert name.lower() not in {"x-powered-by", "via"}
                assert name.lower() != "server" or not re.search(r"\d", value)

    def test_a_websocket_is_answered_like_anything_else(self, port: int) -> None:
        upgrade = b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        answer = exchange(port, GET.replace(b"/healthz", b"/nope") + upgrade + b"Connection: Upgrade, close\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 404 ")
        assert b"x-content-type-options: nosniff" in answer


class TestWhatIsOne:
    """The strictness costs nobody who speaks HTTP."""

    def test_in_any_pieces(self, port: int) -> None:
        body = json.dumps(AGENT).encode()
        plain = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
        chunked = CHUNKED + b"10;name=value\r\n" + body[:16] + b"\r\n%X\r\n" % (len(body) - 16) + body[16:]
        chunked += b"\r\n0\r\nX-Trailer: y\r\n\r\n"
        last = GET + b"Connection: close\r\n\r\n"
        conversation = plain + chunked + GET + b"\r\n" + chunked + plain + last
        for step in (len(conversation), 1_000, 97, 7):
            with connect(port) as raw:
                raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for start in range(0, len(conversation), step):
                    raw.sendall(conversation[start : start + step])
                statuses = re.findall(rb"HTTP/1\.1 (\d+) ", rest_of(raw))
            assert statuses == [b"201", b"201", b"200", b"201", b"201", b"200"], step

    def test_the_oldest_version_needs_no_host(self, port: int) -> None:
        assert exchange(port, b"GET /healthz HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.0 200")


SLOW = {
    "silent": (b"", b""),
    "half a request line": (b"GET /hea", b""),
    "a dripping head": (GET, b"X: y\r\n"),
    "a dripping body": (POST + b"Content-Length: 10000\r\n\r\n", b" "),
    "a body that stops": (POST + b"Content-Length: 10000\r\n\r\n{", b""),
    "dripping chunks": (CHUNKED, b"1\r\n \r\n"),
    "a dripping size of a chunk": (CHUNKED, b"0"),
}


class TestSlowCallers:
    @pytest.mark.parametrize(("opening", "drop"), SLOW.values(), ids=SLOW)
    def test_they_are_sent_away(self, port: int, opening: bytes, drop: bytes) -> None:
        began_s = time.monotonic()
        with connect(port) as raw:
            raw.sendall(opening)
            raw.settimeout(0.1)
            answer = b""
            while True:
                try:
                    piece = raw.recv(65_536)
                except TimeoutError:
                    assert time.monotonic() - began_s < PATIENCE_S
                    if not answer:
                        raw.sendall(drop)
                    continue
                if not piece:
                    break
                answer += piece
        assert time.monotonic() - began_s >= HASTE_S
        assert answer == b"" if not opening else is_refusal(answer, 408)

    def test_a_second_head_is_no_more_waited_for(self, port: int) -> None:
        """An idle connection stays; it has its time from the first byte on."""
        with connect(port) as raw:
            for _ in range(2):
                raw.sendall(GET + b"\r\n")
                assert raw.recv(65_536).startswith(b"HTTP/1.1 200")
                time.sleep(HASTE_S * 2)
            raw.sendall(GET[:20])
            began_s = time.monotonic()
            assert is_refusal(rest_of(raw), 408)
            assert HASTE_S - 1 < time.monotonic() - began_s < HASTE_S + 5

    def test_a_body_that_comes_at_a_fair_pace_is_taken(self, port: int) -> None:
        body = b" " * (BODY_LIMIT_BYTES - 1_000) + json.dumps(AGENT).encode()
        with connect(port) as raw:
            raw.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body))
            began_s = time.monotonic()
            for start in range(0, len(body), 2_000):
                raw.sendall(body[start : start + 2_000])
                time.sleep(0.3)
            assert time.monotonic() - began_s > HASTE_S
            assert raw.recv(65_536).startswith(b"HTTP/1.1 201 ")

    def test_whoever_does_not_take_his_answer_is_left(self, server: tuple[int, int]) -> None:
        port, pid = server
        connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        headers = {"Authorization": f"Bearer {SERVER_KEY}", "Content-Type": "application/json"}
        connection.request("POST", AGENTS, json.dumps(AGENT), headers)
        path = f"{AGENTS}/{json.load(connection.getresponse())['id']}"
        for _ in range(100):
            connection.request("POST", f"{path}/invoke", b'"' + b"x" * (BODY_LIMIT_BYTES - 2) + b'"', headers)
            assert connection.getresponse().read()
        connection.close()
        listing = f"GET {path}/invocations?limit=100 HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {SERVER_KEY}\r\n\r\n"

        def still_connected(peer: int) -> bool:
            return any(at.raddr and at.raddr.port == peer for at in psutil.Process(pid).net_connections("tcp"))

        with ExitStack() as stack:
            deaf = stack.enter_context(socket.socket())
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            deaf.connect(("127.0.0.1", port))
            deaf.sendall(listing.encode())
            time.sleep(HASTE_S / 2)
            assert still_connected(deaf.getsockname()[1])
            deadline = time.monotonic() + PATIENCE_S
            while still_connected(deaf.getsockname()[1]):
                assert time.monotonic() < deadline
                time.sleep(0.1)
        with connect(port) as slow:  # Who takes it slowly, but takes it, gets it whole.
            slow.sendall(listing.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n").encode())
            answer = b""
            while piece := slow.recv(200_000):
                answer += piece
                time.sleep(0.1)
            assert answer.endswith(b"}")
            assert len(answer) > 100 * 2 * (BODY_LIMIT_BYTES - 2)
