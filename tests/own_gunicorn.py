"""gunicorn as operators start it who have a server of their own."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from external_agents.adapters.postgres.embedded.child_process import Launch
from serve import START_S, environment, eventually

APP = "external_agents.bootstrap:create_asgi_app()"


@contextmanager
def own_gunicorn(home: Path, env: dict[str, str] | None = None, *arguments: str) -> Iterator[str]:
    """The address of a gunicorn as an operator starts it."""
    process, address, log = start_gunicorn(home, env or {}, *arguments)

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return httpx.get(f"{address}/healthz").status_code == 200
        except httpx.TransportError:
            return False

    try:
        eventually(answers, START_S)
        yield address
    finally:
        end(process)


def start_gunicorn(home: Path, env: dict[str, str], *arguments: str) -> tuple[subprocess.Popen[bytes], str, Path]:
    log = home.parent / "gunicorn.log"
    with socket.socket() as listener, log.open("wb") as output:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        listener.set_inheritable(True)
        command = [sys.executable, "-m", "gunicorn"]
        options = ["-b", f"fd://{listener.fileno()}", "--no-control-socket"]
        launch = Launch(argv=[*command, "-k", "asgi", *options, *arguments, APP], death_signal=signal.SIGTERM)
        process = subprocess.Popen(
            launch.command(),
            env=environment(home, env),
            stdout=output,
            stderr=output,
            cwd=home.parent,
            pass_fds=[listener.fileno()],
        )
        return process, f"http://127.0.0.1:{listener.getsockname()[1]}", log


def end(process: subprocess.Popen[bytes]) -> None:
    workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(30)
    finally:
        for worker in workers:
            worker.kill() if worker.is_running() else None
        process.kill()
        process.wait()
