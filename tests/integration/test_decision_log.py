"""The decision log: who, what, on which agent, by which policies, allowed or denied; one line for each decision."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog

from agents import Agent
from external_agents.adapters.rest import API_PREFIX, create_app
from external_agents.bootstrap import open_installation
from external_agents.domain.access import PERMISSIONS
from external_agents.settings import Settings
from serve import agent_document, bearer
from two_organisations import ONE, ROUTES, UNKNOWN, World, case_of, parameters_of

LOGGER = "external_agents.observability"
FIELDS = ("org_id", "subject", "action", "agent_id", "allowed", "policy_ids", "errors")
POLICIES = """
@id("only-ops-delete")
forbid (principal, action == ExternalAgents::Action::"delete", resource)
unless { principal.hasTag("team") && principal.getTag("team") == "ops" };

@id("overflows")
forbid (principal, action == ExternalAgents::Action::"update", resource)
when { 9223372036854775807 + 1 > 0 };
"""


def decisions(caplog: pytest.LogCaptureFixture) -> list[tuple[str, dict[str, Any]]]:
    """The level and the fields of each that was logged since the last time."""
    found = [record for record in caplog.records if record.name == LOGGER and record.getMessage() == "decision"]
    caplog.clear()
    return [(record.levelname, {name: vars(record)[name] for name in FIELDS}) for record in found]


@pytest.fixture(autouse=True)
def all_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """By the library's own logging, which takes the place of structlog where nobody has configured that."""
    was_configured, configuration = structlog.is_configured(), structlog.get_config()
    structlog.reset_defaults()
    caplog.set_level("DEBUG", logger=LOGGER)
    yield
    if was_configured:
        structlog.configure(**configuration)


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_each_decision_is_one_line(
    world: World, caplog: pytest.LogCaptureFixture, method: str, path: str
) -> None:
    action, ids = case_of(method, path).action, world.ids[world.victim]
    needed = action.permission
    powerless = await world.key(world.victim, set(PERMISSIONS) - {needed})
    permitted = await world.key(world.victim, {needed})
    on = ids["agent_id"] if parameters_of(path) else None
    told = {"org_id": world.victim, "subject": "tester", "action": action.value, "agent_id": on, "errors": []}
    decisions(caplog)

    assert (await world.route(method, path, ids, powerless)).status_code == 403
    denied = {**told, "allowed": False, "policy_ids": [f"guardrail-{action.value}"]}
    assert decisions(caplog) == [("INFO", denied)]
    for _ in range(1 if method == "DELETE" else 2):
        assert (await world.route(method, path, ids, permitted)).is_success
        assert decisions(caplog) == [("DEBUG", {**told, "allowed": True, "policy_ids": ["permission-holders"]})]

    await world.route(method, path, ids, None)
    if parameters_of(path):
        assert (await world.route(method, path, UNKNOWN, permitted)).status_code == 404
    assert decisions(caplog) == [], "nothing was decided: nobody was there, or nothing"


async def test_policies_of_the_operators_own_are_named_and_their_errors_told(
    postgres_url: str, agent_server: Agent, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "team.cedar").write_text(POLICIES)
    environment = {"SECRET_KEYS": f"k1:{'A' * 43}=", "EGRESS_ALLOW": "loopback", "POLICY_DIR": str(tmp_path)}
    settings = Settings.from_env(
        {f"EXTERNAL_AGENTS_{name}": text for name, text in {**environment, "DATABASE_URL": postgres_url}.items()}
    )
    async with open_installation(settings, postgres_url) as installation:
        app = create_app(installation.service, authenticator=installation.authenticator)
        key, _ = await installation.api_keys.issue("acme", "tester", attributes={"team": "dev"})
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://api.test", headers=bearer(key)) as user:
            agent_id = (await user.post(API_PREFIX, json=agent_document(agent_server.url))).json()["id"]
            told = {"org_id": "acme", "subject": "tester", "agent_id": agent_id, "errors": []}
            decisions(caplog)

            assert (await user.delete(ONE.format(agent_id=agent_id))).status_code == 403
            denied = {**told, "action": "delete", "allowed": False, "policy_ids": ["only-ops-delete"]}
            assert decisions(caplog) == [("INFO", denied)]

            assert (await user.patch(ONE.format(agent_id=agent_id), json={"name": "Mine"})).status_code == 403
            [(level, failed)] = decisions(caplog)
            assert (level, failed["action"], failed["allowed"]) == ("WARNING", "update", False)
            assert len(failed["errors"]) == 1
            assert "overflow" in failed["errors"][0]

            assert (await user.get(API_PREFIX)).json()["total"] == 1
            [(_, on_all), (_, on_one)] = decisions(caplog)
            assert (on_all["action"], on_all["agent_id"], on_all["allowed"]) == ("read", None, True)
            assert (on_one["action"], on_one["agent_id"], on_one["allowed"]) == ("read", agent_id, True)
