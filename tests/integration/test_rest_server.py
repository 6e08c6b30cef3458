"""The API behind the real server: what happens to connections."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import pytest

from rest_api import AGENT, AGENTS, BODY_LIMIT_BYTES, SERVER_KEY

TESTS = Path(__file__).parents[1]
HEADERS = {"Authorization": f"Bearer {SERVER_KEY}", "Content-Type": "application/json"}
PATIENCE_S = 20.0


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        command = [sys.executable, "-m", "gunicorn", "-k", "asgi", "--bind", f"fd://{listener.fileno()}"]
        command += ["--no-control-socket", "--asgi-lifespan", "on", "--pythonpath", str(TESTS), "rest_api:server_app()"]
        server = subprocess.Popen(command, pass_fds=[listener.fileno()], stderr=subprocess.PIPE, text=True)
    try:
        wait_for(port)
        yield port
    finally:
        server.terminate()
        _, log = server.communicate(timeout=PATIENCE_S)
    assert "Traceback" not in log, log
    assert "[ERROR]" not in log, log


def wait_for(port: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
            connection.request("GET", "/healthz")
            assert connection.getresponse().status == 200
            connection.close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@pytest.fixture
def connection(port: int) -> Iterator[HTTPConnection]:
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    yield connection
    connection.close()


@pytest.fixture
def agent(connection: HTTPConnection) -> str:
    connection.request("POST", AGENTS, json.dumps(AGENT), HEADERS)
    answer = connection.getresponse()
    path = f"{AGENTS}/{json.load(answer)['id']}"
    assert answer.status == 201
    return path


def ask(connection: HTTPConnection, method: str, path: str, body: object = None, **headers: str) -> HTTPResponse:
    connection.request(method, path, body, {**HEADERS, **headers}, encode_chunked="Transfer-Encoding" in headers)  # type: ignore[arg-type]
    answer = connection.getresponse()
    answer.read()
    return answer


def chunks(count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield b"x" * 10_000


REFUSED = [
    pytest.param("POST", "{agent}/invoke", {}, 413, id="413"),
    pytest.param("POST", "{agent}/invoke", {"Authorization": "Bearer nope"}, 401, id="401"),
    pytest.param("POST", "{agent}/invoke", {"Authorization": ""}, 401, id="401 without a token"),
    pytest.param("POST", "/nope", {}, 404, id="404"),
    pytest.param("PUT", AGENTS, {}, 405, id="405"),
    pytest.param("GET", AGENTS, {}, 200, id="a body that nobody reads"),
]


@pytest.mark.parametrize(("method", "path", "headers", "status"), REFUSED)
class TestConnectionsAfterABodyThatIsNotTaken:
    def test_one_that_came_with_its_head(
        self, connection: HTTPConnection, agent: str, method: str, path: str, headers: dict[str, str], status: int
    ) -> None:
        """The connection serves on."""
        before = connection.sock
        for _ in range(3):
            answer = ask(connection, method, path.format(agent=agent), b"x" * (BODY_LIMIT_BYTES + 1), **headers)
            assert (answer.status, answer.headers["connection"]) == (status, None)
            assert ask(connection, "POST", f"{agent}/invoke", b'"next"').status == 200
        assert connection.sock is before

    @pytest.mark.parametrize("is_chunked", [False, True])
    def test_a_long_one(
        self,
        connection: HTTPConnection,
        agent: str,
        method: str,
        path: str,
        headers: dict[str, str],
        status: int,
        is_chunked: bool,
    ) -> None:
        """A client that sends all of it before it reads gets the answer; the connection serves on, or says not."""
        for _ in range(3):
            body: object = chunks(500) if is_chunked else b"x" * 5_000_000
            framing = {"Transfer-Encoding": "chunked"} if is_chunked else {}
            answer = ask(connection, method, path.format(agent=agent), body, **headers, **framing)
            assert answer.status == status
            if answer.headers["connection"] == "close":
                connection.close()
            assert ask(connection, "POST", f"{agent}/invoke", b'"next"').status == 200


def exchange(port: int, request: bytes, *, then_half_close: bool = False) -> bytes:
    """All that the server sends until it closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as raw:
        raw.sendall(request)
        if then_half_close:
            raw.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := raw.recv(65_536):
            answer += piece
        return answer


def head(method: str, path: str, *fields: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: api.test", *fields]
    return "\r\n".join([*lines, "", ""]).encode()


AUTHORIZATION = f"Authorization: Bearer {SERVER_KEY}"
JSON = "Content-Type: application/json"


class TestExpectContinue:
    def test_a_refusal_comes_instead_of_100(self, port: int) -> None:
        for fields in [
            (AUTHORIZATION, JSON, f"Content-Length: {BODY_LIMIT_BYTES + 1}"),
            ("Authorization: Bearer nope", JSON, "Content-Length: 10"),
        ]:
            began_s = time.monotonic()
            with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as raw:
                raw.sendall(head("POST", AGENTS, *fields, "Expect: 100-continue"))
                answer = raw.recv(65_536)
            assert answer.startswith((b"HTTP/1.1 413", b"HTTP/1.1 401"))
            assert b"connection: close" in answer.lower()
            assert time.monotonic() - began_s < PATIENCE_S / 2

    def test_else_it_comes(self, port: int) -> None:
        body = json.dumps(AGENT).encode()
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as raw:
            fields = (AUTHORIZATION, JSON, f"Content-Length: {len(body)}", "Expect: 100-continue")
            raw.sendall(head("POST", AGENTS, *fields))
            assert raw.recv(65_536).startswith(b"HTTP/1.1 100")
            raw.sendall(body)
            assert raw.recv(65_536).startswith(b"HTTP/1.1 201")


def test_too_large_a_length_is_refused_before_the_body(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as raw:
        raw.sendall(head("POST", AGENTS, AUTHORIZATION, JSON, "Content-Length: 99999999999"))
        answer = raw.recv(65_536)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in answer.lower()


def test_a_body_that_is_cut_off_reaches_no_agent(port: int, connection: HTTPConnection, agent: str) -> None:
    for fields, part in [("Content-Length: 4", b"12"), ("Transfer-Encoding: chunked", b"2\r\n12\r\n")]:
        request = head("POST", f"{agent}/invoke", AUTHORIZATION, JSON, fields, "Connection: close") + part
        assert b"HTTP/1.1 200" not in exchange(port, request, then_half_close=True)
    connection.request("GET", f"{agent}/invocations", headers=HEADERS)
    assert json.load(connection.getresponse())["items"] == []


def test_raw_bytes_in_the_target_are_no_failure(port: int) -> None:
    for target in (
        b"/api/external-agents?q=\xff",
        b"/api/external-agents/\xff\xfe",
        b"/api/external-agents/%ff%00?%zz",
    ):
        request = b"GET " + target + b" HTTP/1.1\r\nHost: api.test\r\n" + AUTHORIZATION.encode()
        answer = exchange(port, request + b"\r\nConnection: close\r\n\r\n")
        assert answer[:10] == b"HTTP/1.1 4", answer


def test_head_and_not_modified_have_no_body(port: int, agent: str) -> None:
    once = ("Connection: close", AUTHORIZATION)
    for request, status in [
        (head("HEAD", agent, *once), b"200"),
        (head("GET", agent, *once, 'If-None-Match: "1"'), b"304"),
        (head("DELETE", agent, *once), b"204"),
    ]:
        answer = exchange(port, request)
        assert answer.startswith(b"HTTP/1.1 " + status)
        assert answer.endswith(b"\r\n\r\n")
        assert answer.count(b"\r\n\r\n") == 1
