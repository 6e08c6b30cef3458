"""What an invocation, its record and its callers go through when somebody hangs up, stops `serve`, or kills it."""

from __future__ import annotations

import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from agents import Agent, Reply
from serve import (
    API,
    GONE_WITHIN_S,
    Serve,
    agent_document,
    agent_in_thread,
    bearer,
    eventually,
    home_folder,
    processes_of,
    serving,
)

SLOW_AGENT_S = 5.0
"""More than the 3 s that gunicorn gives a request whose caller has gone before it cancels it."""
CALL_S = 30.0
INTERRUPTED_WITHIN_S = 120.0


@pytest.mark.xdist_group("ctrl-c")
def test_a_slow_invocation_survives_a_caller_who_hangs_up_and_ctrl_c() -> None:
    with home_folder() as home, agent_in_thread(Reply(delay_s=SLOW_AGENT_S)) as agent, ThreadPoolExecutor() as pool:
        with serving(home, "--dev") as serve:
            key, path = serve.key, create(serve, agent)
            patient = pool.submit(
                httpx.post, f"{serve.address}{path}/invoke", json=1, headers=bearer(key), timeout=CALL_S
            )
            with socket.create_connection(("127.0.0.1", int(serve.address.rpartition(":")[2]))) as impatient:
                head = f"POST {path}/invoke HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
                body = "Content-Type: application/json\r\nContent-Length: 1\r\n\r\n2"
                impatient.sendall((head + body).encode())
                eventually(lambda: len(agent.requests) == 2, CALL_S)

            assert serve.stop(signal.SIGINT) == 0
            assert processes_of(home) == []
            answer = patient.result()
            assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")
            assert "Another signal ends it at once" in serve.stderr

        with serving(home, "--dev") as serve, serve.client() as client:
            assert serve.key == key
            assert client.get(path).status_code == 200
            left = client.get(f"{path}/invocations").json()["items"]
            assert {item["request_payload"]: item["status"] for item in left} == {1: "succeeded", 2: "succeeded"}
            assert answer.json() in left
            assert len(agent.requests) == 2


@pytest.mark.xdist_group("kill")
def test_an_invocation_that_was_killed_with_serve_becomes_unknown_charged_and_is_never_sent_again() -> None:
    budget = {"max_cost_per_invocation": "0.25", "max_monthly_cost": "1", "currency": "EUR"}
    with home_folder() as home, agent_in_thread(Reply(delay_s=600)) as agent, ThreadPoolExecutor() as pool:
        with serving(home, "--dev") as serve:
            path = create(serve, agent, budget_config=budget)
            with serve.client() as client:
                lost = pool.submit(client.post, f"{path}/invoke", json={"n": 1})
                eventually(lambda: agent.requests, CALL_S)
                [row] = serve.sql("SELECT status FROM external_agent_invocations")
                assert row["status"] == "running", "written ahead"
                serve.process.send_signal(signal.SIGKILL)
                assert serve.wait(GONE_WITHIN_S) == -signal.SIGKILL
                assert isinstance(lost.exception(), httpx.TransportError)

        with serving(home, "--dev") as serve, serve.client() as client:
            [restarted] = client.get(f"{path}/invocations").json()["items"]
            assert restarted["status"] in ("running", "unknown")
            [ended] = eventually(lambda: unknown(client, path), INTERRUPTED_WITHIN_S, every_s=1.0)
            assert ended["error_code"] == "interrupted"
            assert ended["cost"] == {"amount": "0.25", "currency": "EUR"}
            assert ended["completed_at"]
            [account] = serve.sql("SELECT spent, reserved FROM external_agent_budgets")
            assert (str(account["spent"]), account["reserved"]) == ("0.25", 0)
            assert len(agent.requests) == 1, "it was never sent again"


def unknown(client: httpx.Client, path: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get(f"{path}/invocations", params={"status": "unknown"}).json()["items"]
    return found


def create(serve: Serve, agent: Agent, **changes: Any) -> str:
    """The path of a new agent."""
    with serve.client() as client:
        answer = client.post(API, json=agent_document(agent.url, **changes))
    assert answer.status_code == 201, answer.text
    return f"{API}/{answer.json()['id']}"
