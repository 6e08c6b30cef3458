"""`/metrics` on an address of its own: there and nowhere else, whoever dies, whoever dawdles."""

from __future__ import annotations

import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import psutil
import pytest

from external_agents.adapters.rest.metrics_server import CONNECTIONS_MAX, EXCHANGE_S, HEAD_BYTES_MAX
from external_agents.adapters.telemetry.worker_files import FOLDER_VARIABLE
from metrics import figures_of
from own_gunicorn import end, own_gunicorn, start_gunicorn
from serve import START_S, Serve, eventually, home_folder, run, serving

pytestmark = pytest.mark.xdist_group("serve-metrics")

VARIABLE = "EXTERNAL_AGENTS_METRICS_ADDRESS"
PATIENCE_S = 30.0
SOON_S = 1.0
REQUEST = b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n"


def free_port(host: str = "127.0.0.1") -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as found:
        found.bind((host, 0))
        port: int = found.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def serve(port: int) -> Iterator[Serve]:
    with home_folder() as home, serving(home, env={"METRICS_ADDRESS": f"127.0.0.1:{port}"}) as running:
        yield running


def exchange(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as raw:
        raw.sendall(request)
        answer = b""
        while piece := raw.recv(65_536):
            answer += piece
        return answer


def listeners_at(port: int) -> list[int]:
    """The processes that listen there."""
    return [
        found.pid or 0
        for found in psutil.net_connections("tcp")
        if found.status == psutil.CONN_LISTEN and found.laddr.port == port
    ]


def workers_of(serve: Serve) -> list[psutil.Process]:
    [gunicorn] = [
        child for child in psutil.Process(serve.pid).children() if any("gunicorn" in word for word in child.cmdline())
    ]
    return gunicorn.children()


def test_they_are_shown_there_and_nowhere_else(serve: Serve, port: int) -> None:
    assert f"\n  metrics        http://127.0.0.1:{port}/metrics\n" in serve.stdout
    answer = httpx.get(f"http://127.0.0.1:{port}/metrics?name=x")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "unexpected_errors_total" in figures_of(answer.text)
    head = exchange(port, REQUEST.replace(b"GET", b"HEAD"))
    assert head.startswith(b"HTTP/1.1 200")
    assert head.endswith(b"\r\n\r\n")
    assert httpx.get(f"{serve.address}/metrics").status_code == 404
    assert "/metrics" not in httpx.get(f"{serve.address}/openapi.json").json()["paths"]
    assert listeners_at(port) == [serve.pid]


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET /", 404),
        ("GET /metrics/", 404),
        ("GET /healthz", 404),
        ("GET /api/external-agents", 404),
        ("GET /metrics%00", 404),
        ("POST /metrics", 404),
        ("OPTIONS /metrics", 404),
        ("GET http://here/metrics", 400),
        ("GET metrics", 400),
        ("G\x00T /metrics", 400),
    ],
)
def test_there_is_nothing_else(serve: Serve, port: int, request_line: str, status: int) -> None:
    answer = exchange(port, f"{request_line} HTTP/1.1\r\nHost: here\r\n\r\n".encode())
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"X-Content-Type-Options: nosniff" in answer
    assert answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    "request_", [b"\x16\x03\x01\x02\x00" * 20 + b"\r\n\r\n", REQUEST[:-2] + b"X: " + b"x" * 2 * HEAD_BYTES_MAX]
)
def test_what_is_no_request_is_refused(serve: Serve, port: int, request_: bytes) -> None:
    assert exchange(port, request_).startswith(b"HTTP/1.1 400 ")


def test_slow_callers_hold_up_nobody(serve: Serve, port: int) -> None:
    """More of them than it takes at a time; each is let go at last."""
    openings = [b"", b"GET /met", REQUEST[:-2], REQUEST]
    with ExitStack() as stack:
        slow = []
        for number in range(2 * CONNECTIONS_MAX):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S))
            one.sendall(openings[number % len(openings)])
            slow.append(one)
        began_s = time.monotonic()
        assert httpx.get(f"http://127.0.0.1:{port}/metrics").status_code == 200
        assert time.monotonic() - began_s < SOON_S
        assert len([at for at in psutil.Process(serve.pid).net_connections("tcp") if at.laddr.port == port]) <= (
            CONNECTIONS_MAX + 2
        )
        for one in slow:
            one.settimeout(max(0.1, began_s + EXCHANGE_S + 5 - time.monotonic()))
            try:
                while one.recv(65_536):
                    pass
            except ConnectionResetError:
                pass
    assert httpx.get(f"{serve.address}/healthz").status_code == 200


def test_workers_come_and_go(serve: Serve, port: int) -> None:
    def counted() -> float:
        requests = figures_of(httpx.get(f"http://127.0.0.1:{port}/metrics").text).by("http_requests_total")
        return sum(count for (_, route, _), count in requests.items() if route == "/openapi.json")

    with httpx.Client() as client:
        for _ in range(10):
            client.get(f"{serve.address}/openapi.json")
    before = eventually(lambda: counted() if counted() >= 10 else 0, PATIENCE_S)
    victims = workers_of(serve)
    for victim in victims:
        victim.send_signal(signal.SIGKILL)
    assert counted() == before, "while there is no worker"
    eventually(lambda: len(workers_of(serve)) == 2 and not set(workers_of(serve)) & set(victims), PATIENCE_S)
    assert counted() == before
    assert listeners_at(port) == [serve.pid]


def test_check_knows_it(serve: Serve, port: int) -> None:
    def found(address: str) -> list[str]:
        done = run("check", home=serve.home, env={"METRICS_ADDRESS": address})
        assert done.stdout.splitlines()[0].startswith("ok     settings")
        return [line for line in done.stdout.splitlines() if line.split()[1] == "metrics"]

    assert found(f"127.0.0.1:{port}") == [f"ok     metrics     shown at 127.0.0.1:{port}"]
    free = free_port()
    [line] = found(f"127.0.0.1:{free}")
    assert line.startswith(f"ok     metrics     nobody listens at 127.0.0.1:{free} yet")
    [line] = found(serve.address.removeprefix("http://"))
    assert line.startswith(f"WRONG  metrics     {VARIABLE}: cannot listen on ")


def test_an_address_that_cannot_be_had_stops_it_at_once() -> None:
    with home_folder() as home, socket.create_server(("127.0.0.1", 0)) as taken:
        for address in (f"127.0.0.1:{taken.getsockname()[1]}", "192.0.2.1:9100", "no-such-name.invalid:9100", "9100"):
            done = run("serve", "--port", "0", home=home, env={"METRICS_ADDRESS": address})
            assert (done.returncode, done.stdout) == (1, "")
            [line] = done.stderr.splitlines()
            assert VARIABLE in line
            assert not (home / "postgres").exists(), "it looks before it makes a database"


def test_ipv6_and_its_end_with_serve() -> None:
    port = free_port("::1")
    with home_folder() as home, serving(home, env={"METRICS_ADDRESS": f"[::1]:{port}"}) as serve:
        assert f"http://[::1]:{port}/metrics\n" in serve.stdout
        assert httpx.get(f"http://[::1]:{port}/metrics").status_code == 200
        assert serve.stop() == 0
        assert listeners_at(port) == []


def test_a_serve_that_is_killed_leaves_nobody_there() -> None:
    port = free_port()
    with home_folder() as home, serving(home, env={"METRICS_ADDRESS": f"127.0.0.1:{port}"}) as serve:
        serve.process.kill()
        serve.wait()
        assert listeners_at(port) == []


class TestAServerOfOnesOwn:
    SECRET_KEYS = "k1:MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
    HOOK = ("-c", "python:external_agents.adapters.telemetry.worker_files")

    def test_every_worker_shows_the_figures_of_all(self, postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        port = free_port()
        env = {
            "DATABASE_URL": postgres_url,
            "SECRET_KEYS": self.SECRET_KEYS,
            "METRICS_ADDRESS": f"127.0.0.1:{port}",
        }
        with home_folder() as home, tempfile.TemporaryDirectory() as folder:
            monkeypatch.setenv(FOLDER_VARIABLE, folder)
            with own_gunicorn(home, env, "--workers", "2", *self.HOOK) as address:
                eventually(lambda: len(set(listeners_at(port))) == 2, PATIENCE_S)
                for _ in range(20):
                    with closing(httpx.Client()) as client:
                        assert client.get(f"{address}/openapi.json").status_code == 200
                time.sleep(0.1)  # what is gathered is written after 20 ms
                for _ in range(10):
                    figures = figures_of(httpx.get(f"http://127.0.0.1:{port}/metrics").text)
                    assert figures["http_requests_total", "GET", "/openapi.json", "200"] == 20
                assert httpx.get(f"{address}/metrics").status_code == 404
                first = listeners_at(port)[0]
                psutil.Process(first).kill()
                eventually(lambda: len(set(listeners_at(port)) - {first}) == 2, PATIENCE_S)
                for _ in range(10):
                    assert httpx.get(f"http://127.0.0.1:{port}/metrics").status_code == 200
            assert listeners_at(port) == []

    def test_a_taken_address_stops_it(self, postgres_url: str) -> None:
        with home_folder() as home, socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            env = {"DATABASE_URL": postgres_url, "SECRET_KEYS": self.SECRET_KEYS, "METRICS_ADDRESS": address}
            process, _, log = start_gunicorn(home, env)
            try:
                assert process.wait(START_S) != 0
                text = Path(log).read_text()
                assert f"{VARIABLE}: cannot listen on {address}: Address already in use" in text
                assert "Traceback" not in text
            finally:
                end(process)
