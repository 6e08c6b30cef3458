"""
Every route of the API that asks who is calling, and two organisations of the same kind to call it.

`test_rest_tenants.py` holds the table against the app's own: a route without a case fails there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import attrs
import httpx

from agents import Agent
from external_agents.adapters.rest import API_PREFIX
from external_agents.bootstrap import Installation
from external_agents.domain.access import Action
from serve import agent_document, bearer, rows

CANARY = "canary-8f2e71"
AGENT, INVOCATION = "{agent_id}", "{agent_id}/invocations/{invocation_id}"
ONE = f"{API_PREFIX}/{AGENT}"
UNKNOWN = {"agent_id": "019ab0c5-7a52-7f3e-9c1d-2b8f4a6e0d13", "invocation_id": "019ab0c6-01d4-7b20-8f6a-5c3e9d7a1b42"}


@attrs.frozen
class Case:
    """What a route needs, and a body that it takes."""

    action: Action
    body: Any = None


CASES = {
    ("POST", API_PREFIX): Case(Action.CREATE, agent_document("https://agent.example.com/")),
    ("GET", API_PREFIX): Case(Action.READ),
    ("GET", f"{API_PREFIX}/invocations"): Case(Action.READ),
    ("GET", ONE): Case(Action.READ),
    ("PATCH", ONE): Case(Action.UPDATE, {"name": "Mine"}),
    ("DELETE", ONE): Case(Action.DELETE),
    ("POST", f"{ONE}/invoke"): Case(Action.INVOKE, {"input": "hello"}),
    ("GET", f"{ONE}/usage"): Case(Action.READ),
    ("GET", f"{ONE}/invocations"): Case(Action.READ),
    ("GET", f"{API_PREFIX}/{INVOCATION}"): Case(Action.READ),
}
ROUTES = sorted(CASES | {("HEAD", path): case for (method, path), case in CASES.items() if method == "GET"})


def case_of(method: str, path: str) -> Case:
    return CASES["GET" if method == "HEAD" else method, path]


def parameters_of(path: str) -> list[str]:
    return re.findall(r"\{(\w+)\}", path)


@attrs.frozen
class World:
    """
    Two organisations with the same kind of things.

    Attributes:
        ids: By organisation, what path parameters may be filled with.
        keys: By organisation, a key with every permission.
    """

    installation: Installation
    client: httpx.AsyncClient
    url: str
    agent: Agent
    victim: str
    stranger: str
    ids: dict[str, dict[str, str]] = attrs.field(factory=dict)
    keys: dict[str, str] = attrs.field(factory=dict)

    async def key(self, org_id: str, permissions: Any = None, expires_in: timedelta | None = None) -> str:
        key, _ = await self.installation.api_keys.issue(org_id, "tester", permissions, expires_in=expires_in)
        return key

    async def populate(self, org_id: str, word: str) -> None:
        self.keys[org_id] = await self.key(org_id)
        document = agent_document(self.agent.url, name=word, description=word, tags=[word])
        document |= {"rate_limit_config": {"requests_per_day": 9}, "budget_config": {"max_monthly_cost": 9}}
        made = await self.ask("POST", API_PREFIX, key=self.keys[org_id], json=document)
        ids = {"agent_id": made.json()["id"]}
        options = {"json": {"input": word}, "headers": {"Idempotency-Key": "order-17"}}
        invoked = await self.ask("POST", f"{ONE}/invoke", ids, key=self.keys[org_id], **options)
        assert invoked.status_code == 200, invoked.text
        self.ids[org_id] = {**ids, "invocation_id": invoked.json()["id"]}

    async def ask(
        self, method: str, path: str, ids: Mapping[str, str] = UNKNOWN, *, key: str | None, **options: Any
    ) -> httpx.Response:
        fields = {**(bearer(key) if key is not None else {}), **options.pop("headers", {})}
        return await self.client.request(method, path.format(**ids), headers=fields, **options)

    async def route(
        self, method: str, path: str, ids: Mapping[str, str], key: str | None, **headers: str
    ) -> httpx.Response:
        """Asked with a body that is fine."""
        body = case_of(method, path).body
        return await self.ask(method, path, ids, key=key, headers=headers, **({} if body is None else {"json": body}))

    def belongings(self, org_id: str) -> dict[str, Any]:
        """All that the database holds of an organisation, beside its keys; and what its agent was asked."""
        tables = rows(
            self.url, "SELECT DISTINCT table_name FROM information_schema.columns WHERE column_name = 'org_id'"
        )
        names = sorted(table["table_name"] for table in tables if "api_key" not in table["table_name"])
        assert "external_agents" in names
        found = {name: rows(self.url, f"SELECT * FROM {name} WHERE org_id = %s", org_id) for name in names}
        return {**{name: sorted(map(str, held)) for name, held in found.items()}, "asked": len(self.agent.requests)}
