"""Two processes over one PostgreSQL: a change through one holds for the next invocation through the other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import uuid4

import pytest

from external_agents import ExternalAgentService
from external_agents.adapters.memory import SystemClock, SystemIds
from external_agents.adapters.postgres.agents import PostgresAgents
from external_agents.adapters.postgres.engine import create_engine
from external_agents.adapters.postgres.invocations import PostgresInvocations
from external_agents.adapters.postgres.ledger import PostgresLedger
from external_agents.adapters.secrets import AesGcmSecretBox, KeyRing, envelope_key_id
from external_agents.domain.egress import EgressPolicy
from external_agents.testing.fakes import RecordingObservability, ScriptedTransport
from two_services import ALICE, ChangesHoldElsewhere, CountingReader, Side, Sides, TagPolicy

KEY_RING = KeyRing({"k1": bytes(range(32))})


class TestInPostgres(ChangesHoldElsewhere):
    @pytest.fixture
    async def sides(self, postgres_url: str) -> AsyncIterator[Sides]:
        engines = [create_engine(postgres_url) for _ in range(2)]
        opened = []
        for engine in engines:
            agents = PostgresAgents(engine, key_id_of=envelope_key_id)
            ledger = PostgresLedger(engine, uuid4())
            await ledger.heartbeat()
            transport, observability = ScriptedTransport(), RecordingObservability()
            reader = CountingReader(agents)
            service = ExternalAgentService(
                agent_reader=reader,
                agent_writer=agents,
                invocation_reader=PostgresInvocations(engine),
                ledger=ledger,
                policy=TagPolicy(),
                transport=transport,
                secret_box=AesGcmSecretBox(KEY_RING),
                observability=observability,
                url_rules=EgressPolicy(),
                clock=SystemClock(),
                ids=SystemIds(),
            )
            opened.append(Side(service, transport, reader, observability))
        yield opened[0], opened[1]
        for engine in engines:
            await engine.dispose()

    async def test_a_large_secret_is_read_each_time(self, sides: Sides) -> None:
        side, _ = sides
        document = {
            "name": "Research",
            "provider": "custom",
            "webhook_url": "https://agent.example.com/",
            "auth_type": "custom",
            "auth_config": {"more": "x" * 20_000},
        }
        agent = await side.service.create_agent(ALICE, document)
        for reads in (1, 2):
            await side.service.invoke_agent(ALICE, agent.id, None)
            assert side.reader.reads == reads
