"""
The REST API over adapters in memory, for tests.

    async with Api() as api:
        answer = await api.call("POST", AGENTS, json=AGENT)

`Api.call` speaks to the ASGI app in this process; `server_app` is the same for a server process of its own.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx

from external_agents import Outcome, Principal
from external_agents.adapters.memory import (
    FunctionTransport,
    MemoryAuthenticator,
    MemoryObservability,
    MemoryStore,
    PermissionPolicy,
    memory_service,
)
from external_agents.adapters.rest import API_PREFIX, LifespanApp, create_app
from external_agents.adapters.rest.body import GRACE_S
from external_agents.domain.access import PERMISSIONS, AccessRequest, Decision
from external_agents.domain.egress import EgressPolicy
from external_agents.domain.invocation import ErrorCode
from external_agents.ports.transport import AgentRequest
from external_agents.testing.fakes import FakeClock, ScriptedTransport, SequentialIds

AGENTS = API_PREFIX
BODY_LIMIT_BYTES = 20_000
UNKNOWN_ID = "019ab0c5-7a52-7f3e-9c1d-2b8f4a6e0d13"
CANARY = "canary-8f2e71"

AGENT = {
    "name": "Research",
    "provider": "custom",
    "webhook_url": "https://agent.example.com/hook",
    "auth_type": "api_key",
    "auth_config": {"key": CANARY, "header_name": "X-Key"},
}

REFUSED = Outcome(error=ErrorCode.HTTP_STATUS, status=418, message="The agent answered 418.")
TIMED_OUT = Outcome(error=ErrorCode.TIMEOUT, message="The agent did not answer in time.", may_have_run=True)


class BreakablePolicy(PermissionPolicy):
    """Raises `error` instead of deciding, when it has one."""

    error: Exception | None = None

    async def decide(self, requests: Sequence[AccessRequest]) -> Sequence[Decision]:
        if self.error is not None:
            raise self.error
        return await super().decide(requests)


class Api:
    def __init__(self, **options: Any) -> None:
        self.clock = FakeClock()
        self.store = MemoryStore()
        self.transport = ScriptedTransport()
        self.policy = BreakablePolicy()
        self.authenticator = MemoryAuthenticator()
        self.checks: dict[str, str | None] = {"database": None, "schema": None, "keys": None}
        self.service = memory_service(
            self.transport,
            store=self.store,
            clock=self.clock,
            ids=SequentialIds(self.clock),
            policy=self.policy,
            observability=MemoryObservability(),
            url_rules=EgressPolicy(),
        )
        known = {"readiness": self._readiness, "metrics": lambda: ("text/plain", b"# nothing\n")}
        self.app = create_app(
            self.service,
            authenticator=self.authenticator,
            body_limit_bytes=BODY_LIMIT_BYTES,
            **{**known, **options},
        )
        self.key = self.key_for("acme")
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://api.test")

    async def __aenter__(self) -> Api:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.client.aclose()

    async def _readiness(self) -> Mapping[str, str | None]:
        return self.checks

    def key_for(self, org_id: str, permissions: Iterable[str] = PERMISSIONS) -> str:
        return self.authenticator.issue(Principal(org_id, "tester", frozenset(permissions)))

    async def call(
        self,
        method: str,
        path: str,
        *,
        key: str | None = "",
        headers: Mapping[str, str] | list[tuple[str, Any]] = (),  # type: ignore[assignment]
        **options: Any,
    ) -> httpx.Response:
        """`key`: None for no credentials at all, by default one of acme that permits everything."""
        fields = list(headers.items()) if isinstance(headers, Mapping) else list(headers)
        if key is not None:
            fields.append(("Authorization", f"Bearer {key or self.key}"))
        return await self.client.request(method, path, headers=fields, **options)

    async def create(self, **changes: Any) -> dict[str, Any]:
        answer = await self.call("POST", AGENTS, json={**AGENT, **changes})
        assert answer.status_code == 201, answer.text
        document: dict[str, Any] = answer.json()
        return document

    async def invoke(self, agent: Mapping[str, Any], **options: Any) -> httpx.Response:
        return await self.call("POST", f"{AGENTS}/{agent['id']}/invoke", **{"json": {"input": "hello"}, **options})


def is_problem(answer: httpx.Response, status: int, name: str) -> bool:
    """Whether it is this problem, whole and consistent."""
    assert answer.status_code == status, (answer.status_code, answer.text)
    assert answer.headers["content-type"] == "application/problem+json"
    problem = json.loads(answer.content)
    assert problem["type"] == f"urn:external-agents:problem:{name}", problem
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    return True


def paths_of(answer: httpx.Response) -> list[str]:
    """The paths of a validation problem's faults."""
    assert is_problem(answer, 400, "invalid")
    return [fault["path"] for fault in answer.json()["errors"]]


SERVER_KEY = "key-of-the-server-app"


def server_app(body_grace_s: float = GRACE_S) -> LifespanApp:
    """For a server process: the same API, with one key and an agent that answers what it was sent."""

    class OneKey(MemoryAuthenticator):
        async def authenticate(self, bearer_token: str) -> Principal:
            if bearer_token == SERVER_KEY:
                return Principal("acme", "tester", frozenset(PERMISSIONS))
            return await super().authenticate(bearer_token)

    async def agent(request: AgentRequest) -> Outcome:
        return Outcome(status=200, answer=request.body)

    async def readiness() -> Mapping[str, str | None]:
        return {}

    @asynccontextmanager
    async def opened() -> AsyncIterator[Any]:
        yield create_app(
            memory_service(FunctionTransport(agent)),
            authenticator=OneKey(),
            readiness=readiness,
            body_limit_bytes=BODY_LIMIT_BYTES,
            body_grace_s=body_grace_s,
        )

    return LifespanApp(opened)
