"""Secret keys are changed beside agents' being changed and invoked, and nothing is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from agents import Agent
from external_agents import ExternalAgent
from external_agents.adapters.postgres.envelopes import BATCH_MAX, PostgresEnvelopes
from external_agents.adapters.secrets import envelope_key_id
from external_agents.application.key_rotation import Rewrapped
from external_agents.bootstrap import Installation, keys_readiness
from external_agents.domain.errors import SecretUnreadable, Unauthenticated, Unavailable
from external_agents.domain.invocation import InvocationStatus
from external_agents.ports.secrets import KeyUse
from key_rotation import ALICE, KINDS, documents, installation_with, make_one_of_each, sealed_with
from postgres_server import dsn
from serve import eventually, rows

AGENTS = "SELECT * FROM external_agents ORDER BY org_id, id"


async def rewrap(url: str, *key_ids: str) -> Rewrapped:
    async with installation_with(url, *key_ids) as installation:
        return await installation.key_rotation.rewrap()


def used(uses: Rewrapped) -> tuple[dict[str, int], dict[str, int]]:
    """Secrets by key, before and after."""
    before, after = ({key: use.secrets for key, use in by_key.items()} for by_key in (uses.before, uses.after))
    return before, after


def alter(url: str, statement: str, *values: object) -> None:
    with psycopg.connect(dsn(url)) as connection:
        connection.execute(statement.encode(), values)


async def opened(installation: Installation) -> list[dict[str, Any]]:
    """Every secret in the clear: a change that keeps them opens and seals them all."""
    registrar: Any = installation.service._registrar
    agents = await installation.service.list_agents(ALICE, limit=100)
    return [registrar._document(agent) for agent in agents.items]


async def test_every_secret_is_sealed_anew_and_nothing_else_changes(postgres_url: str) -> None:
    async with installation_with(postgres_url, "k1") as installation:
        await make_one_of_each(installation, orgs=("acme", "other"))
        before = await opened(installation)
    agents = rows(postgres_url, AGENTS)
    done = await rewrap(postgres_url, "k2", "k1")
    assert done.resealed == 2 * KINDS
    assert used(done) == ({"k2": 0, "k1": 2 * KINDS}, {"k2": 2 * KINDS, "k1": 0})
    assert (done.retirable, done.unreadable, done.left) == (["k1"], {}, 0)
    assert sealed_with(postgres_url) == {"k2": 2 * KINDS}
    assert rows(postgres_url, AGENTS) == agents, "versions and times included"
    async with installation_with(postgres_url, "k2") as installation:
        assert await opened(installation) == before
        assert len(before) == KINDS
        assert await installation.key_rotation.missing() == []
    again = await rewrap(postgres_url, "k2", "k1")
    assert (again.resealed, again.retirable) == (0, ["k1"])


async def test_more_than_a_batch_of_one_organisation(postgres_url: str) -> None:
    number = 2 * BATCH_MAX + 3
    async with installation_with(postgres_url, "k1") as installation:
        for _ in range(number):
            await installation.service.create_agent(ALICE, documents()[2])
    looked_at: list[int] = []
    async with installation_with(postgres_url, "k2", "k1") as installation:
        done = await installation.key_rotation.rewrap(looked_at.append)
    assert (done.resealed, sum(looked_at)) == (number, number)
    assert max(looked_at) == BATCH_MAX
    assert sealed_with(postgres_url) == {"k2": number}


async def test_several_older_keys_and_one_that_is_not_used(postgres_url: str) -> None:
    for key_ids in (("k1",), ("k2", "k1")):
        async with installation_with(postgres_url, *key_ids) as installation:
            await make_one_of_each(installation)
    done = await rewrap(postgres_url, "k3", "k2", "k0", "k1")
    assert used(done)[1] == {"k3": 2 * KINDS, "k2": 0, "k0": 0, "k1": 0}
    assert done.retirable == ["k2", "k0", "k1"]


async def test_what_an_opened_agent_is_known_by_holds(postgres_url: str, agent_server: Agent) -> None:
    """A process that has opened credentials before goes on with them; a version that was read before is current."""
    async with installation_with(postgres_url, "k1", "k2") as old, installation_with(postgres_url, "k2", "k1") as new:
        document = documents(agent_server.url)[2]
        agent = await old.service.create_agent(ALICE, document)
        await old.service.invoke_agent(ALICE, agent.id, 1)
        assert (await new.key_rotation.rewrap()).resealed == 1
        for side in (old, new):
            invocation = await side.service.invoke_agent(ALICE, agent.id, 1)
            assert invocation.status is InvocationStatus.SUCCEEDED
        assert {seen.headers["authorization"] for seen in agent_server.requests} == {"Bearer bearer-secret"}
        changed = await old.service.update_agent(ALICE, agent.id, {"name": "Other"}, if_version=[agent.version])
        assert changed.version == agent.version + 1


async def test_beside_changes_and_invocations_nothing_is_lost(postgres_url: str, agent_server: Agent) -> None:
    """Each agent's token is changed over and over, under the old first key and the new one, while all is rewrapped."""
    rounds, agents_max = 15, 8
    async with (
        installation_with(postgres_url, "k1", "k2") as old,
        installation_with(postgres_url, "k2", "k1") as new,
    ):
        made = [await old.service.create_agent(ALICE, documents(agent_server.url)[2]) for _ in range(agents_max)]

        async def change(agent_id: Any) -> None:
            for number in range(rounds):
                side = (old, new)[number % 2].service
                await side.update_agent(ALICE, agent_id, {"auth_config": {"token": f"{agent_id}-{number}"}})

        async def invoke(agent_id: Any) -> None:
            for number in range(rounds):
                with suppress(Unavailable):  # It is changed by others all the time.
                    invocation = await (new, old)[number % 2].service.invoke_agent(ALICE, agent_id, number)
                    assert invocation.status is InvocationStatus.SUCCEEDED, invocation

        async def keep_rewrapping() -> None:
            for number in range(rounds):
                await (new, old)[number % 2].key_rotation.rewrap()

        async with asyncio.timeout(120):
            await asyncio.gather(
                *(work(agent.id) for agent in made for work in (change, invoke)), keep_rewrapping(), keep_rewrapping()
            )
            await new.key_rotation.rewrap()
        assert sealed_with(postgres_url) == {"k2": agents_max}
        agent_server.requests.clear()
        for agent in made:
            await new.service.invoke_agent(ALICE, agent.id, None)
            assert (await new.service.get_agent(ALICE, agent.id)).version == rounds + 1
        received = [seen.headers["authorization"] for seen in agent_server.requests]
        assert received == [f"Bearer {agent.id}-{rounds - 1}" for agent in made], "the last change counts"


async def test_a_secret_that_is_being_changed_is_passed_over_and_taken_later(postgres_url: str) -> None:
    async with installation_with(postgres_url, "k1") as installation:
        await make_one_of_each(installation)
    async with installation_with(postgres_url, "k2", "k1") as installation:
        with psycopg.connect(dsn(postgres_url)) as connection:
            connection.execute("SELECT FROM external_agent_secrets WHERE field = 'auth_config.token' FOR UPDATE")
            rewrapping = asyncio.create_task(installation.key_rotation.rewrap())
            passed_over = {"k1": 1, "k2": KINDS - 1}
            await asyncio.to_thread(eventually, lambda: sealed_with(postgres_url) == passed_over, 30)
            assert not rewrapping.done(), "it waits for none of them, and for the end of the change"
        done = await rewrapping
    assert (done.resealed, done.left) == (KINDS, 0)


async def test_nobody_changes_what_is_being_sealed_anew(postgres_url: str, postgres_engine: AsyncEngine) -> None:
    """Or a change that comes between its being read and being replaced would be lost."""
    async with installation_with(postgres_url, "k1") as installation:
        await installation.service.create_agent(ALICE, documents()[2])
    tried: list[str] = []

    def reseal(agent: ExternalAgent, field: str) -> bytes:
        with psycopg.connect(dsn(postgres_url), options="-c lock_timeout=200ms") as connection:
            with pytest.raises(psycopg.errors.LockNotAvailable):
                connection.execute("DELETE FROM external_agent_secrets WHERE agent_id = %s", [agent.id])
            tried.append(field)
        return agent.sealed[field]

    envelopes = PostgresEnvelopes(postgres_engine, key_id_of=envelope_key_id)
    assert (await envelopes.reseal("k1", reseal, after=None)).resealed == 1
    assert tried == ["auth_config.token"]


async def test_what_goes_on_being_sealed_with_an_older_key_is_told(postgres_url: str) -> None:
    async with installation_with(postgres_url, "k1") as installation:
        await make_one_of_each(installation)
    async with installation_with(postgres_url, "k2", "k1") as installation:
        with psycopg.connect(dsn(postgres_url)) as connection:
            connection.execute("SELECT FROM external_agent_secrets WHERE field = 'auth_config.token' FOR UPDATE")
            done = await installation.key_rotation.rewrap()
    assert (done.left, done.retirable) == (1, [])


FAULTS = {
    "a flipped bit": "UPDATE external_agent_secrets SET envelope = set_bit(envelope, 200, 1 - get_bit(envelope, 200))",
    "a cut envelope": "UPDATE external_agent_secrets SET envelope = substr(envelope, 1, length(envelope) - 1)",
    "nearly nothing": "UPDATE external_agent_secrets SET envelope = '\\x01'",
    "another field": "UPDATE external_agent_secrets SET field = 'auth_config.key'",
    "another destination": "UPDATE external_agents SET webhook_url = 'https://evil.example.com/hook'",
    "an unknown auth type": "UPDATE external_agents SET auth_type = 'gone'",
    "a platform that is not there": "UPDATE external_agents SET provider = 'gone'",
}


@pytest.mark.parametrize("statement", FAULTS.values(), ids=FAULTS)
async def test_what_cannot_be_opened_is_named_and_the_others_go_on(postgres_url: str, statement: str) -> None:
    async with installation_with(postgres_url, "k1") as installation:
        made = [await installation.service.create_agent(ALICE, documents()[2]) for _ in range(3)]
    broken = made[1]
    agent_column = "id" if "external_agents SET" in statement else "agent_id"
    alter(postgres_url, f"{statement} WHERE {agent_column} = %s", broken.id)
    done = await rewrap(postgres_url, "k2", "k1")
    [(place, reason)] = done.unreadable.items()
    assert (place.org_id, place.agent_id) == ("acme", broken.id)
    assert place.field in {"auth_config.token", "auth_config.key"}
    assert "bearer-secret" not in reason
    assert used(done)[1] == {"k2": 2, "k1": 1}
    assert (done.resealed, done.retirable, done.left) == (2, [], 0)


async def test_envelopes_of_two_agents_cannot_be_swapped(postgres_url: str) -> None:
    async with installation_with(postgres_url, "k1") as installation:
        made = [await installation.service.create_agent(ALICE, documents()[2]) for _ in range(2)]
        alter(
            postgres_url,
            """
            UPDATE external_agent_secrets AS one SET envelope = other.envelope
            FROM external_agent_secrets AS other WHERE other.agent_id <> one.agent_id
            """,
        )
        for agent in made:
            with pytest.raises(SecretUnreadable, match="altered or moved"):
                await installation.service.invoke_agent(ALICE, agent.id, None)
    done = await rewrap(postgres_url, "k2", "k1")
    assert {place.agent_id for place in done.unreadable} == {agent.id for agent in made}
    assert done.resealed == 0


async def test_a_key_that_is_not_there_is_named(postgres_url: str) -> None:
    for key_ids in (("k0",), ("k1", "k0")):
        async with installation_with(postgres_url, *key_ids) as installation:
            await installation.service.create_agent(ALICE, documents()[2])
    done = await rewrap(postgres_url, "k2", "k1")
    assert list(done.unreadable.values()) == ["A secret was sealed with the key k0, which is not configured."]
    assert used(done)[1] == {"k2": 1, "k1": 0, "k0": 1}
    assert done.retirable == ["k1"]
    async with installation_with(postgres_url, "k2", "k1") as installation:
        assert await installation.key_rotation.missing() == ["k0"]
        readiness = await installation.readiness()
        assert readiness["keys"] is not None
        assert "the secret key k0 is in use" in readiness["keys"]
        alter(postgres_url, "DELETE FROM external_agent_secrets WHERE key_id = %s", "k0")
        assert await keys_readiness(installation.key_rotation) is None


async def test_an_api_key_outlives_the_secret_keys_it_was_made_with(postgres_url: str) -> None:
    async with installation_with(postgres_url, "k1") as installation:
        text, _ = await installation.api_keys.issue("acme", "billing")
    async with installation_with(postgres_url, "k2") as installation:
        assert await installation.key_rotation.missing() == ["k1"]
        with pytest.raises(Unauthenticated):
            await installation.authenticator.authenticate(text)

    done = await rewrap(postgres_url, "k2", "k1")
    assert done.before["k1"] == done.after["k2"] == KeyUse(api_keys=1)
    assert done.retirable == ["k1"]
    async with installation_with(postgres_url, "k2") as installation:
        assert (await installation.authenticator.authenticate(text)).subject == "billing"
        assert await installation.key_rotation.missing() == []
        second, _ = await installation.api_keys.issue("acme", "second")

    done = await rewrap(postgres_url, "k3", "k2")
    assert done.retirable == ["k2"]
    async with installation_with(postgres_url, "k3") as installation:
        assert (await installation.authenticator.authenticate(text)).subject == "billing"
        assert (await installation.authenticator.authenticate(second)).subject == "second"
    async with installation_with(postgres_url, "k4") as installation:
        assert await installation.key_rotation.missing() == ["k1 or k3", "k2 or k3"]
        with pytest.raises(Unauthenticated):
            await installation.authenticator.authenticate(text)


def _reasons(done: Rewrapped) -> Iterator[str]:
    yield from done.unreadable.values()
    yield from done.unreadable_hash_keys.values()


async def test_an_api_key_whose_secret_key_is_lost_is_told_until_it_is_revoked(postgres_url: str) -> None:
    async with installation_with(postgres_url, "k0") as installation:
        _, key = await installation.api_keys.issue("acme", "billing")
    done = await rewrap(postgres_url, "k2", "k1")
    assert list(_reasons(done)) == ["API keys were hashed with the key k0, which is not configured."]
    assert list(done.unreadable_hash_keys) == ["k0"]
    async with installation_with(postgres_url, "k2", "k1") as installation:
        assert await installation.key_rotation.missing() == ["k0"]
        await installation.api_keys.revoke(key.id)
        assert await installation.key_rotation.missing() == []
        assert not list(_reasons(await installation.key_rotation.rewrap()))


async def test_a_sealed_hash_key_that_was_altered_opens_no_door(postgres_url: str) -> None:
    async with installation_with(postgres_url, "k1") as installation:
        text, _ = await installation.api_keys.issue("acme", "billing")
    await rewrap(postgres_url, "k2", "k1")
    alter(postgres_url, "UPDATE api_key_hash_keys SET envelope = set_bit(envelope, 300, 1 - get_bit(envelope, 300))")
    async with installation_with(postgres_url, "k2") as installation:
        with pytest.raises(Unauthenticated):
            await installation.authenticator.authenticate(text)
    assert list((await rewrap(postgres_url, "k3", "k2")).unreadable_hash_keys) == ["k1"]
