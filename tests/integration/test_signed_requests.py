"""What an agent can verify: signatures on its requests, from the API over PostgreSQL to a real receiver."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import attrs
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook, WebhookVerificationError

from agents import Agent, Issuer, Reply, Seen
from external_agents import ExternalAgentService, Principal
from external_agents.adapters.memory import MemoryAuthenticator, PermissionPolicy, SystemClock, SystemIds
from external_agents.adapters.postgres.agents import PostgresAgents
from external_agents.adapters.postgres.invocations import PostgresInvocations
from external_agents.adapters.postgres.ledger import PostgresLedger
from external_agents.adapters.rest import create_app
from external_agents.adapters.secrets import AesGcmSecretBox, KeyRing, envelope_key_id
from external_agents.adapters.webhook.transport import WebhookTransport
from external_agents.domain.access import PERMISSIONS
from external_agents.domain.egress import EgressPolicy
from external_agents.domain.json_values import JsonText
from external_agents.domain.signing import SigningSecrets
from external_agents.ports.secrets import SecretContext
from external_agents.testing.fakes import RecordingObservability
from external_agents.testing.strategies import payloads, signing_secrets
from postgres_server import OpenEngine, psql_dump
from serve import API, agent_document, bearer, is_problem, rows

FIRST, SECOND, THIRD = (f"whsec_{base64.b64encode(bytes([number]) * 24).decode()}" for number in (1, 2, 3))
BOX = AesGcmSecretBox(KeyRing({"k1": bytes(range(32))}))


class MovableClock(SystemClock):
    """The machine's clock, moved by as much as a test says."""

    def __init__(self) -> None:
        self.moved = timedelta(0)

    def now(self) -> datetime:
        return super().now() + self.moved


@attrs.frozen
class World:
    """The API in this process, and the agent that it may reach."""

    client: httpx.AsyncClient
    agent: Agent
    clock: MovableClock
    observability: RecordingObservability
    database_url: str

    async def create(self, **changes: Any) -> str:
        answer = await self.client.post(API, json=agent_document(self.agent.url, **changes))
        assert answer.status_code == 201, answer.text
        assert "whsec_" not in answer.text
        assert "signing" not in answer.text
        return f"{API}/{answer.json()['id']}"

    async def change(self, path: str, **changes: Any) -> None:
        answer = await self.client.patch(path, json=changes)
        assert answer.status_code == 200, answer.text
        assert "signing" not in answer.text

    async def sent(self, path: str) -> Seen:
        """What the agent gets of an invocation."""
        assert (await self.client.post(f"{path}/invoke", json={})).status_code == 200
        return self.agent.requests[-1]

    def sql(self, statement: str, *values: object) -> list[dict[str, Any]]:
        return rows(self.database_url, statement, *values)


@pytest.fixture
async def world(postgres_url: str, open_engine: OpenEngine, agent_server: Agent) -> AsyncIterator[World]:
    engine, clock = open_engine(postgres_url), MovableClock()
    agents, ledger = PostgresAgents(engine, key_id_of=envelope_key_id), PostgresLedger(engine, uuid4())
    await ledger.heartbeat()
    policy, authenticator = EgressPolicy.parse("loopback", "443"), MemoryAuthenticator()
    transport, observability = (
        WebhookTransport(policy, answer_limit_bytes=10_000, clock=clock),
        RecordingObservability(),
    )
    service = ExternalAgentService(
        agent_reader=agents,
        agent_writer=agents,
        invocation_reader=PostgresInvocations(engine),
        ledger=ledger,
        policy=PermissionPolicy(),
        transport=transport,
        secret_box=BOX,
        observability=observability,
        url_rules=policy,
        clock=clock,
        ids=SystemIds(),
    )
    key = authenticator.issue(Principal("acme", "tester", PERMISSIONS))
    app = httpx.ASGITransport(create_app(service, authenticator=authenticator))
    async with httpx.AsyncClient(transport=app, base_url="http://api.test", headers=bearer(key)) as client:
        yield World(client, agent_server, clock, observability, postgres_url)
    await service.drain()
    await transport.aclose()


def verifies(seen: Seen, secret: str) -> bool:
    """Whether a receiver with this secret takes the request, by its time too."""
    try:
        Webhook(secret).verify(seen.body, seen.headers)
    except WebhookVerificationError:
        return False
    return True


def signers(seen: Seen) -> list[str]:
    """Whose signatures the request carries, in their order, whatever its time."""
    moment = datetime.fromtimestamp(int(seen.headers["webhook-timestamp"]), UTC)
    signed = {
        Webhook(secret).sign(seen.headers["webhook-id"], moment, seen.body.decode()): secret
        for secret in (FIRST, SECOND, THIRD)
    }
    return [signed[signature] for signature in seen.headers["webhook-signature"].split(" ")]


@given(signing_secrets(), payloads(), st.integers(0, 2**42))
def test_a_receivers_library_finds_the_same_signature(secret: str, payload: Any, milliseconds: int) -> None:
    moment = datetime(2000, 1, 1, tzinfo=UTC) + timedelta(milliseconds=milliseconds)
    body = JsonText.of(payload).text
    headers = SigningSecrets(secret).headers("019ab0c6-01d4-7b20-8f6a-5c3e9d7a1b42", body.encode(), moment)
    assert headers["webhook-signature"] == Webhook(secret).sign(headers["webhook-id"], moment, body)


async def test_without_a_secret_nothing_is_signed(world: World) -> None:
    seen = await world.sent(await world.create())
    assert not [name for name in seen.headers if name.startswith("webhook-")]


async def test_every_attempt_is_signed(world: World) -> None:
    """The id stays, the time is the attempt's, and an agent that takes nothing unsigned takes both."""

    def strict(seen: Seen) -> Reply:
        world.clock.moved += timedelta(seconds=2)
        attempt = len(world.agent.requests)
        return Reply(401) if not verifies(seen, FIRST) else Reply(200 if attempt == 2 else 503)

    world.agent.answers(strict)
    path = await world.create(signing_secret=FIRST)
    payload = b'{ "text": "\xc3\xa9\\u0000",  "big": 12345678901234567890.10 }'
    headers = {"Content-Type": "application/json"}
    answer = await world.client.post(f"{path}/invoke", content=payload, headers=headers)
    assert answer.status_code == 200, answer.text
    assert [attempt["status"] for attempt in answer.json()["attempts"]] == [503, 200]
    first, second = world.agent.requests
    assert first.headers["webhook-id"] == second.headers["webhook-id"] == answer.json()["id"]
    times = [int(seen.headers["webhook-timestamp"]) for seen in (first, second)]
    attempts = [datetime.fromisoformat(attempt["at"]) for attempt in answer.json()["attempts"]]
    assert times == [int(at.timestamp()) for at in attempts]
    assert times[0] < times[1]
    assert first.headers["webhook-signature"] != second.headers["webhook-signature"]
    assert not verifies(attrs.evolve(second, body=payload + b" "), FIRST)


async def test_with_a_token_that_is_fetched_again(world: World) -> None:
    token_url = world.agent.at("/token", Issuer())
    world.agent.answers(Reply(401), Reply())
    config = {"client_id": "kaizen", "client_secret": "s3cret", "token_url": token_url}
    path = await world.create(signing_secret=FIRST, auth_type="oauth2", auth_config=config)
    assert verifies(await world.sent(path), FIRST)
    asked = [seen for seen in world.agent.requests if seen.path == "/token"]
    assert len(asked) == 2
    assert not [seen for seen in asked if "webhook-signature" in seen.headers], "the token endpoint is not the agent"


async def test_a_new_secret_stands_beside_the_old_one(world: World) -> None:
    path = await world.create(signing_secret=FIRST)
    assert signers(await world.sent(path)) == [FIRST]
    await world.change(path, signing_secret=SECOND)
    seen = await world.sent(path)
    assert signers(seen) == [SECOND, FIRST]
    assert verifies(seen, FIRST)
    assert verifies(seen, SECOND)
    assert not verifies(seen, THIRD)
    await world.change(path, signing_secret=SECOND)
    await world.change(path, name="renamed")
    assert signers(await world.sent(path)) == [SECOND, FIRST]
    await world.change(path, signing_secret=THIRD)
    assert signers(await world.sent(path)) == [THIRD, SECOND]
    await world.change(path, signing_secret=None)
    assert "webhook-signature" not in (await world.sent(path)).headers
    assert world.sql("SELECT FROM external_agent_secrets") == []
    await world.change(path, signing_secret=FIRST)
    assert signers(await world.sent(path)) == [FIRST]


async def test_the_old_one_is_dropped_after_a_day(world: World) -> None:
    """Where the agent is known, without a change of it; a change that is something else's does not prolong it."""
    world.clock.moved = timedelta(hours=-24)
    path = await world.create(signing_secret=FIRST)
    await world.change(path, signing_secret=SECOND)
    assert signers(await world.sent(path)) == [SECOND, FIRST]
    world.clock.moved = timedelta(hours=-2)
    await world.change(path, signing_secret=SECOND, name="renamed")
    assert signers(await world.sent(path)) == [SECOND, FIRST]
    world.clock.moved = timedelta(0)
    seen = await world.sent(path)
    assert signers(seen) == [SECOND]
    assert verifies(seen, SECOND)
    assert not verifies(seen, FIRST)
    await world.change(path, name="renamed again")
    assert [row["field"] for row in world.sql("SELECT field FROM external_agent_secrets")] == ["signing_secret"]
    assert world.sql("SELECT previous_signing_secret_until AS until FROM external_agents") == [{"until": None}]


async def test_it_stays_where_the_agent_moves(world: World) -> None:
    """Signing gives it to nobody: it is bound to no origin, and need not come again as what the agent receives must."""
    path = await world.create(signing_secret=FIRST)
    await world.change(path, signing_secret=SECOND)
    agent_id = path.rpartition("/")[2]
    for row in world.sql("SELECT field, envelope FROM external_agent_secrets"):
        context = SecretContext(org_id="acme", agent_id=agent_id, field=row["field"], destination="")
        wanted = SECOND if row["field"] == "signing_secret" else FIRST
        assert BOX.open(row["envelope"], context).decode() == f'"{wanted}"'
    await world.change(path, webhook_url=world.agent.url.replace("127.0.0.1", "localhost"))
    seen = await world.sent(path)
    assert seen.headers["host"].startswith("localhost")
    assert signers(seen) == [SECOND, FIRST]


async def test_a_malformed_one_is_told_and_not_shown(world: World) -> None:
    path = await world.create(signing_secret=FIRST)
    short = "whsec_c2hvcnQ="
    for answer in (
        await world.client.post(API, json=agent_document(world.agent.url, signing_secret=short)),
        await world.client.patch(path, json={"signing_secret": short}),
    ):
        [fault] = is_problem(answer, 400)["errors"]
        assert fault == {"path": "signing_secret", "message": "must be whsec_ and the base64 of 24 to 64 bytes"}
        assert short not in answer.text
    assert signers(await world.sent(path)) == [FIRST]


async def test_it_is_in_no_answer_no_record_and_no_dump(world: World) -> None:
    path = await world.create(name="in plain sight", signing_secret=FIRST)
    await world.change(path, signing_secret=SECOND)
    await world.sent(path)
    said = [await world.client.get(place) for place in (API, path, f"{path}/invocations")]
    shown = "".join(answer.text for answer in said) + repr(world.observability.records)
    dump = psql_dump(world.database_url).decode()
    assert "in plain sight" in shown
    assert "in plain sight" in dump
    for secret in (FIRST, SECOND):
        encoded = secret.removeprefix("whsec_")
        for text in (encoded, encoded.encode().hex(), base64.b64decode(encoded).hex()):
            assert text not in shown
            assert text not in dump
    fields = world.sql("SELECT field, key_id FROM external_agent_secrets ORDER BY field")
    assert [(row["field"], row["key_id"]) for row in fields] == [
        ("signing_secret", "k1"),
        ("signing_secret.previous", "k1"),
    ]


async def test_a_sealed_one_that_was_moved_does_not_open(world: World) -> None:
    """Neither to another agent, nor from the previous one's place to the current one's."""
    path, other = await world.create(signing_secret=FIRST), await world.create(signing_secret=SECOND)
    await world.change(path, signing_secret=THIRD)
    ids = [place.rpartition("/")[2] for place in (path, other)]
    move = (
        "UPDATE external_agent_secrets AS here SET envelope = there.envelope FROM external_agent_secrets AS there"
        " WHERE here.agent_id = %s AND here.field = 'signing_secret' AND there.agent_id = %s AND there.field = %s"
        " RETURNING 1"
    )
    for here, there, field in ((*ids[::-1], "signing_secret"), (ids[0], ids[0], "signing_secret.previous")):
        assert len(world.sql(move, here, there, field)) == 1
        answer = await world.client.post(f"{API}/{here}/invoke", json={})
        assert is_problem(answer, 503)["type"].endswith("secret-unreadable")
    assert world.agent.requests == []


async def test_deletion_erases_both(world: World) -> None:
    path = await world.create(signing_secret=FIRST)
    await world.change(path, signing_secret=SECOND)
    assert (await world.client.delete(path)).status_code == 204
    assert world.sql("SELECT FROM external_agent_secrets") == []
    assert world.sql("SELECT previous_signing_secret_until AS until FROM external_agents") == [{"until": None}]
