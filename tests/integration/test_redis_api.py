"""The API with REDIS_URL set: limits hold over its workers, and without Redis nothing reaches an agent."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from agents import Agent
from external_agents.adapters.redis.windows import KEY_PREFIX
from redis_server import RedisServer, running_redis
from serve import API, Serve, agent_document, agent_in_thread, eventually, home_folder, is_problem, serving

OUTAGE_S = 30.0


@pytest.fixture
def home() -> Iterator[Path]:
    with home_folder() as folder:
        yield folder


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with running_redis() as server:
        yield server


def created(client: httpx.Client, agent: Agent, **limits: int) -> str:
    document = agent_document(agent.url, rate_limit_config={f"requests_per_{name}": n for name, n in limits.items()})
    answer = client.post(API, json=document)
    assert answer.status_code == 201, answer.text
    return f"{API}/{answer.json()['id']}/invoke"


async def invoked_at_once(serve: Serve, path: str, times: int) -> list[httpx.Response]:
    async with serve.async_client() as client:
        return list(await asyncio.gather(*(client.post(path, json={}) for _ in range(times))))


def test_limits_in_redis(home: Path, server: RedisServer) -> None:
    server.kill()  # It need not be there when the API starts.
    with agent_in_thread() as agent, serving(home, "--dev", env={"REDIS_URL": server.url}) as serve:
        with serve.client() as client:
            limited = created(client, agent, minute=5, day=100)
            refused_without_redis(client, limited, agent)
            server.start()
            eventually(lambda: client.get("/readyz").status_code == 200, OUTAGE_S)

            answers = asyncio.run(invoked_at_once(serve, limited, 25))
            assert sorted(answer.status_code for answer in answers) == [200] * 5 + [429] * 20
            assert len(agent.requests) == 5
            for answer in answers:
                assert answer.headers["RateLimit-Policy"] == '"minute";q=5;w=60, "day";q=100;w=86400'
                if answer.status_code == 429:
                    is_problem(answer, 429)
                    assert 50 <= int(answer.headers["Retry-After"]) <= 62
            remaining = {answer.headers["RateLimit"].split(";")[1] for answer in answers if answer.status_code == 200}
            assert remaining == {"r=0", "r=1", "r=2", "r=3", "r=4"}

            other = created(client, agent, minute=2)
            assert client.post(other, json={}).status_code == 200
            server.kill()
            refused_without_redis(client, other, agent)
            server.start()
            eventually(lambda: client.get("/readyz").status_code == 200, OUTAGE_S)
            assert client.post(limited, json={}).status_code == 429
            assert [client.post(other, json={}).status_code for _ in range(2)] == [200, 429]
            assert len(agent.requests) == 7
        with server.client() as redis:
            assert len(redis.keys(f"{KEY_PREFIX}*")) == 2
        assert serve.sql("SELECT count(*) FROM external_agent_invocations") == [{"count": 7}]
        assert server.url not in serve.stdout + serve.stderr


def refused_without_redis(client: httpx.Client, path: str, agent: Agent) -> None:
    """The caller is told to come again, the agent is not called, and the operator can see why."""
    calls = len(agent.requests)
    for _ in range(3):
        answer = client.post(path, json={})
        assert is_problem(answer, 503)["detail"] == "The rate limiter is not available."
        assert int(answer.headers["Retry-After"]) >= 1
    assert len(agent.requests) == calls
    checks = is_problem(client.get("/readyz"), 503)["checks"]
    assert {name: state for name, state in checks.items() if state != "ok"} == {"redis": "Redis cannot be reached"}


def test_a_refusal_after_the_place_was_taken_gives_it_back(home: Path, server: RedisServer) -> None:
    with (
        agent_in_thread() as agent,
        serving(home, "--dev", env={"REDIS_URL": server.url}) as serve,
        serve.client() as client,
    ):
        document = agent_document(
            agent.url,
            rate_limit_config={"requests_per_hour": 3},
            budget_config={"max_cost_per_invocation": 1, "max_monthly_cost": 1},
        )
        path = f"{API}/{client.post(API, json=document).json()['id']}/invoke"
        assert client.post(path, json={}).status_code == 200
        for _ in range(4):
            poor = client.post(path, json={})
            assert is_problem(poor, 402)
            assert poor.headers["RateLimit"].startswith('"hour";r=2')
