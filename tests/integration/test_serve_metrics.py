"""`/metrics` of a running `serve`: right across its workers, whoever answers, whoever has died."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psutil
import pytest

from agents import Agent, Reply, serve_agent
from external_agents.adapters.telemetry.worker_files import FOLDER_VARIABLE
from metrics import Figures, figures_of
from serve import API, Serve, agent_document, bearer, eventually, home_folder, run, serving

pytestmark = pytest.mark.xdist_group("serve-metrics")

INVOKE = f"{API}/{{agent_id}}/invoke"
SCRAPES = 8
PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    with home_folder() as home, serving(home, "--dev") as running:
        yield running


@pytest.fixture
async def agent() -> AsyncIterator[Agent]:
    async with serve_agent() as running:
        yield running


@pytest.fixture
async def api(serve: Serve) -> AsyncIterator[httpx.AsyncClient]:
    async with serve.async_client() as client:
        yield client


def workers_of(serve: Serve) -> list[psutil.Process]:
    [gunicorn] = [
        child for child in psutil.Process(serve.pid).children() if any("gunicorn" in word for word in child.cmdline())
    ]
    return gunicorn.children()


@pytest.fixture(scope="module")
def folder(serve: Serve) -> Path:
    """Where the workers keep their figures."""
    return Path(workers_of(serve)[0].environ()[FOLDER_VARIABLE])


def names_in(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


async def scraped(serve: Serve) -> Figures:
    """Over a connection of its own, so by any worker."""
    async with httpx.AsyncClient(timeout=60) as anybody:
        answer = await anybody.get(f"{serve.address}/metrics")
    assert answer.status_code == 200, answer.text
    return figures_of(answer.text)


async def created(api: httpx.AsyncClient, url: str, **changes: Any) -> str:
    answer = await api.post(API, json=agent_document(url, **{"max_attempts": 1, **changes}))
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def invoked(serve: Serve, agent_id: str, count: int, connections: int = 16) -> list[int]:
    """The statuses of `count` invocations over as many connections."""
    turns = iter(range(count))

    async def caller() -> list[int]:
        async with serve.async_client() as client:
            return [(await client.post(f"{API}/{agent_id}/invoke", json={})).status_code for _ in turns]

    return [status for statuses in await asyncio.gather(*(caller() for _ in range(connections))) for status in statuses]


def grown(before: Figures, after: Figures, name: str) -> dict[Any, float]:
    earlier = before.by(name)
    return {key: value - earlier.get(key, 0) for key, value in after.by(name).items() if value != earlier.get(key, 0)}


async def test_the_figures_are_what_was_sent(serve: Serve, api: httpx.AsyncClient, agent: Agent) -> None:
    costly, failing = agent.at("/costly", Reply(body=b'{"metadata": {"cost": 3}}')), agent.at("/failing", Reply(500))
    budget = {"max_cost_per_invocation": 2, "max_monthly_cost": 1000}
    well = await created(api, costly, budget_config=budget)
    badly = await created(api, failing, budget_config=budget, max_attempts=2)
    limited = await created(api, agent.url, rate_limit_config={"requests_per_day": 7})
    inactive = await created(api, agent.url, status="inactive")
    before = await scraped(serve)
    statuses = await asyncio.gather(
        invoked(serve, well, 150), invoked(serve, badly, 20), invoked(serve, limited, 40), invoked(serve, inactive, 5)
    )
    assert [sorted(set(each)) for each in statuses] == [[200], [502], [200, 429], [409]]
    for _ in range(SCRAPES):
        after = await scraped(serve)
        assert after["admissions_total"] - before["admissions_total"] == 177
        assert grown(before, after, "invocations_total") == {
            ("succeeded", "none"): 157,
            ("failed", "http_status"): 20,
        }
        assert grown(before, after, "attempts_total") == {"2xx": 157, "5xx": 40}
        assert after["attempt_duration_seconds_count"] - before["attempt_duration_seconds_count"] == 197
        assert grown(before, after, "refusals_total") == {"RateLimited": 33, "AgentInactive": 5}
        assert grown(before, after, "reservations_total") == {
            "made": 170,
            "charged": 150,
            "overrun": 150,
            "released": 20,
        }
        # Of an agent that is known to be switched off it is decided once more, on the agent as it is.
        decided = grown(before, after, "decisions_total")
        assert decided.keys() == {("invoke", "allowed")}
        assert 215 <= decided["invoke", "allowed"] <= 215 + 5
        requests = grown(before, after, "http_requests_total")
        assert {status: count for (_, route, status), count in requests.items() if route == INVOKE} == {
            "200": 157,
            "409": 5,
            "429": 33,
            "502": 20,
        }
        assert after["invocations_running"] == 0
        assert after["unexpected_errors_total"] == 0


def test_each_of_the_workers_counts(serve: Serve, folder: Path) -> None:
    """Else the sums above would show nothing."""

    def have_counted() -> bool:
        counters = {f"counter_{worker.pid}.db" for worker in workers_of(serve)}
        return len(counters) == 2 and counters <= set(names_in(folder))

    eventually(have_counted, PATIENCE_S)


async def test_what_runs_is_seen_while_it_runs(serve: Serve, api: httpx.AsyncClient, agent: Agent) -> None:
    released = asyncio.Event()
    agent.answers(Reply(wait_for=released))
    agent_id = await created(api, agent.url)
    running = asyncio.create_task(invoked(serve, agent_id, 12, connections=12))
    async with asyncio.timeout(PATIENCE_S):
        while (await scraped(serve))["invocations_running"] != 12:
            pass
    released.set()
    assert await running == [200] * 12
    assert (await scraped(serve))["invocations_running"] == 0


async def test_a_killed_worker_takes_no_counts_with_it(
    serve: Serve, folder: Path, api: httpx.AsyncClient, agent: Agent
) -> None:
    quick = await created(api, agent.at("/quick", Reply()))
    await invoked(serve, quick, 40)
    agent.answers(Reply(wait_for=asyncio.Event()))
    endless = await created(api, agent.url)
    hanging = [asyncio.create_task(invoked(serve, endless, 1)) for _ in range(10)]
    async with asyncio.timeout(PATIENCE_S):
        while (before := await scraped(serve))["invocations_running"] != 10:
            pass
    workers = workers_of(serve)
    for victim in workers:
        victim.send_signal(signal.SIGKILL)
    await asyncio.gather(*hanging, return_exceptions=True)
    await asyncio.to_thread(eventually, lambda: _are_replaced(serve, folder, workers), PATIENCE_S)
    async with asyncio.timeout(PATIENCE_S):
        while not await _serves(serve):
            pass
    for _ in range(SCRAPES):
        after = await scraped(serve)
        fallen = {key for key, value in before.items() if not _is_gauge(key) and after.get(key, -1) < value}
        assert not fallen
        assert after["admissions_total"] == before["admissions_total"]
        assert after["invocations_running"] == 0
    await invoked(serve, quick, 10)
    assert (await scraped(serve))["admissions_total"] == before["admissions_total"] + 10
    counters = {name for name in names_in(folder) if name.startswith("counter")}
    assert counters <= {"counter_ended.db", *(f"counter_{worker.pid}.db" for worker in workers_of(serve))}


def _are_replaced(serve: Serve, folder: Path, dead: list[psutil.Process]) -> bool:
    """Others run, and nothing is left of these but their counts."""
    running = workers_of(serve)
    left = [name for worker in dead for name in names_in(folder) if name.endswith(f"_{worker.pid}.db")]
    return len(running) == len(dead) and not set(running) & set(dead) and not left


async def _serves(serve: Serve) -> bool:
    try:
        await scraped(serve)
    except httpx.TransportError:
        return False
    return True


def _is_gauge(key: str | tuple[str, ...]) -> bool:
    return key in {"invocations_running", "queue_waiting"}


async def test_hostile_callers_make_no_series(serve: Serve, api: httpx.AsyncClient, agent: Agent) -> None:
    async def hostile(number: int) -> None:
        for method in ("GET", "BREW", f"X{number}"):
            for path in (f"/{uuid4()}", f"{API}/{uuid4()}", f"{API}/{uuid4()}/invoke", API, "/metrics", "/docs/%00"):
                await api.request(method, path, json={"name": f"name-{number}"})
        await api.get(f"{API}?q=name-{number}", headers={"Authorization": f"Bearer name-{number}"})

    await hostile(0)
    before = await scraped(serve)
    keys = [make_key(serve, f"org-{number}", f"subject-{number}") for number in range(2)]
    for number in range(1, 6):
        await hostile(number)
        created_by = {"headers": bearer(keys[number % len(keys)])}
        changes = {"name": f"name-{number}", "budget_config": {"max_cost_per_invocation": 1, "currency": "XQZ"}}
        made = await api.post(API, json=agent_document(agent.url, **changes), **created_by)
        await api.post(f"{API}/{made.json()['id']}/invoke", json={}, **created_by)
    after = await scraped(serve)
    assert set(after) - set(before) <= {
        ("http_requests_total", "POST", API, "201"),
        ("http_requests_total", "POST", INVOKE, "200"),
        *(key for key in after if key[0].startswith("http_request_duration") and key[-1] in {API, INVOKE}),
    }
    assert not [key for key in after if any(word in str(key) for word in ("name-", "org-", "subject-", "XQZ", "X1"))]


def make_key(serve: Serve, org_id: str, subject: str) -> str:
    done = run("keys", "create", "--json", "--org", org_id, "--subject", subject, home=serve.home)
    return str(json.loads(done.stdout)["key"])
