"""One `serve` to be fuzzed, with a key of an organisation of its own and an agent that it may call."""

from __future__ import annotations

import json
from collections.abc import Iterator

import psutil
import pytest

from agents import Agent
from serve import Serve, agent_in_thread, home_folder, run, serving
from wire import Wire


@pytest.fixture(scope="session")
def serve() -> Iterator[Serve]:
    """Whatever is sent to it: no worker dies, and nothing that it logs is an error."""
    with home_folder() as home, serving(home, env={"EGRESS_ALLOW": "loopback", "LOG_FORMAT": "json"}) as running:
        before = workers(running)
        assert before
        yield running
        log = running.stderr
        assert workers(running) == before, log
        assert "Traceback" not in log, log
        grave = [line for line in log.splitlines() if '"level":"error"' in line or '"level":"critical"' in line]
        assert not grave, grave


@pytest.fixture(scope="session")
def key(serve: Serve) -> str:
    done = run("keys", "create", "--json", "--org", "fuzz", "--subject", "fuzzer", home=serve.home)
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["key"])


@pytest.fixture(scope="session")
def agent() -> Iterator[Agent]:
    with agent_in_thread() as running:
        yield running


@pytest.fixture(scope="session")
def wire(serve: Serve, key: str, agent: Agent) -> Wire:
    return Wire(serve.address, key, agent.url)


def workers(serve: Serve) -> set[int]:
    """The processes that answer: children of gunicorn's master."""
    masters = [
        child
        for child in psutil.Process(serve.pid).children(recursive=True)
        if "gunicorn_server" in str(child.cmdline())
    ]
    return {process.pid for process in masters}
