"""
The same guarantees row by row: the whole service, and every step a transaction of its own on the plain ledger.

    gunicorn … 'benchmarks.naive:create_asgi_app()'

The wiring is the first version's, so that what is later done for speed elsewhere does not move the baseline: API keys
and agents are read at every call.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

from structlog.contextvars import bound_contextvars

from external_agents.adapters.abac import CedarPolicies, CedarPolicyDecisionPoint
from external_agents.adapters.identity import ApiKeyAuthenticator
from external_agents.adapters.memory.system import SystemClock, SystemIds
from external_agents.adapters.postgres.agents import PostgresAgents
from external_agents.adapters.postgres.api_keys import PostgresApiKeys
from external_agents.adapters.postgres.engine import create_engine
from external_agents.adapters.postgres.invocations import PostgresInvocations
from external_agents.adapters.postgres.plain.ledger import PlainPostgresLedger
from external_agents.adapters.rest.app import create_app
from external_agents.adapters.rest.asgi import AsgiApp
from external_agents.adapters.rest.lifespan import LifespanApp
from external_agents.adapters.secrets import AesGcmSecretBox, envelope_key_id
from external_agents.adapters.telemetry import StructlogObservability, configure_logging
from external_agents.adapters.webhook.transport import WebhookTransport
from external_agents.application.service import ExternalAgentService
from external_agents.application.upkeep import keep_up
from external_agents.bootstrap import ENDINGS_POOL_SIZE, ENDINGS_POOL_WAIT_S, load_key_ring
from external_agents.domain.access import Principal
from external_agents.ports.identity import Authenticator
from external_agents.settings import Settings


class _ForgetfulAuthenticator(Authenticator):
    """Another authenticator for each call."""

    def __init__(self, make: Callable[[], Authenticator]) -> None:
        self._make = make

    async def authenticate(self, bearer_token: str) -> Principal:
        return await self._make().authenticate(bearer_token)


def create_asgi_app() -> AsgiApp:
    settings = Settings.from_env()
    configure_logging(settings.log_format, settings.log_level)

    @asynccontextmanager
    async def opened() -> AsyncIterator[AsgiApp]:
        async with _service(settings) as service:
            yield create_app(service, body_limit_bytes=settings.max_body_bytes, log_context=bound_contextvars)

    return LifespanApp(opened)


@asynccontextmanager
async def _service(settings: Settings) -> AsyncIterator[ExternalAgentService]:
    assert settings.database_url is not None, "the benchmark says where its database is"
    clock, ids = SystemClock(), SystemIds()
    key_ring = load_key_ring(settings)
    engine = create_engine(settings.database_url)
    endings = create_engine(settings.database_url, pool_size=ENDINGS_POOL_SIZE, pool_wait_s=ENDINGS_POOL_WAIT_S)
    agents = PostgresAgents(engine, key_id_of=envelope_key_id)
    ledger = PlainPostgresLedger(engine, ids.new_id(), endings=endings)
    transport = WebhookTransport(settings.egress_policy, answer_limit_bytes=settings.max_body_bytes, clock=clock)
    service = ExternalAgentService(
        agent_reader=agents,
        agent_writer=agents,
        invocation_reader=PostgresInvocations(engine),
        ledger=ledger,
        policy=CedarPolicyDecisionPoint(CedarPolicies.load(None)),
        transport=transport,
        secret_box=AesGcmSecretBox(key_ring),
        observability=StructlogObservability(),
        url_rules=settings.egress_policy,
        clock=clock,
        ids=ids,
        known_agents_max=0,
        authenticator=_ForgetfulAuthenticator(
            partial(ApiKeyAuthenticator, store=PostgresApiKeys(engine), key_ring=key_ring, clock=clock)
        ),
    )
    upkeep = asyncio.create_task(keep_up(ledger, clock))
    try:
        yield service
    finally:
        await service.drain()
        upkeep.cancel()
        await asyncio.gather(upkeep, return_exceptions=True)
        await ledger.retire()
        await transport.aclose()
        await engine.dispose()
        await endings.dispose()
