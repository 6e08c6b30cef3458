"""
The only wiring: settings → adapters → service → ASGI app. Nothing is built at import.

A host with adapters of its own needs none of this: it gives them to `ExternalAgentService`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TypeAlias

import attrs
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.abac import CedarPolicies, CedarPolicyDecisionPoint
from external_agents.adapters.identity import ApiKeyAuthenticator, ApiKeys
from external_agents.adapters.memory.system import SystemClock, SystemIds
from external_agents.adapters.postgres.agents import PostgresAgents
from external_agents.adapters.postgres.api_keys import PostgresApiKeys
from external_agents.adapters.postgres.embedded import attached, default_home, make_home, running_url
from external_agents.adapters.postgres.embedded.home import unusable
from external_agents.adapters.postgres.engine import create_engine
from external_agents.adapters.postgres.idempotency import clear_expired
from external_agents.adapters.postgres.invocations import PostgresInvocations
from external_agents.adapters.postgres.ledger import PostgresLedger
from external_agents.adapters.postgres.partitions import keep_partitions
from external_agents.adapters.postgres.readiness import check
from external_agents.adapters.postgres.row_security import is_on
from external_agents.adapters.postgres.schema import migrate
from external_agents.adapters.redis import RedisCheck, RedisConnection, RedisRateLimiter
from external_agents.adapters.rest.app import create_app
from external_agents.adapters.rest.asgi import AsgiApp
from external_agents.adapters.rest.lifespan import LifespanApp
from external_agents.adapters.secrets import AesGcmSecretBox, KeyRing, envelope_key_id
from external_agents.adapters.telemetry import FanOut, RequestContext, StructlogObservability, configure_logging
from external_agents.adapters.telemetry.prometheus import PrometheusObservability
from external_agents.adapters.webhook.transport import WebhookTransport
from external_agents.application.limited_ledger import LimitedLedger
from external_agents.application.service import ExternalAgentService
from external_agents.application.upkeep import keep_up
from external_agents.domain.catalog import BUILT_IN, Catalog
from external_agents.domain.errors import ConfigurationError, Unavailable
from external_agents.ports.identity import Authenticator
from external_agents.ports.observability import ObservabilityManager
from external_agents.settings import Settings, variable_of

AUTH_SCHEMES_GROUP = "external_agents.auth_schemes"
PLATFORMS_GROUP = "external_agents.platforms"
ENDINGS_POOL_SIZE = 4
ENDINGS_POOL_WAIT_S = 30.0
SHARED_CONNECTIONS_MAX = 16
PARTITIONS_EVERY_S = 86_400.0
KEYS_EVERY_S = 3_600.0
UPKEEP_AGAIN_S = 60.0
BACKGROUND_AGAIN_S = 10.0

MakeLedger: TypeAlias = Callable[..., PostgresLedger]
"""Takes what `PostgresLedger` takes."""

_log = logging.getLogger(__name__)


@attrs.frozen(kw_only=True)
class Installation:
    """
    A service with all that stands around it, open for the length of `open_installation`.

    Attributes:
        redis: Looks at the Redis that keeps the rate limits; None: the database keeps them.
    """

    service: ExternalAgentService
    authenticator: Authenticator
    api_keys: ApiKeys
    engine: AsyncEngine = attrs.field(repr=False)
    key_ring: KeyRing
    redis: RedisCheck | None = None

    async def readiness(self) -> Mapping[str, str | None]:
        """What must be there to serve, by name, and why it is not; None where it is."""
        redis = {} if self.redis is None else {"redis": (await self.redis()).reason}
        return {**await database_readiness(self.engine), **redis, "keys": None}


async def database_readiness(engine: AsyncEngine) -> dict[str, str | None]:
    """`database` and `schema`, with row security also `role`, and what is wrong with each, or None."""
    state = await check(engine)
    schema = "the schema is not the newest: run external-agents migrate" if not state.schema else None
    return {
        "database": None if state.database else "the database cannot be reached",
        "schema": schema if state.database else "unknown: the database cannot be reached",
        **({"role": state.role} if is_on(engine) else {}),
    }


@asynccontextmanager
async def open_service(settings: Settings) -> AsyncIterator[ExternalAgentService]:
    """
    The service, wired to PostgreSQL, Cedar and HTTP as the settings say; leaving the block drains and closes it.

    Without a DATABASE_URL the embedded database is used: the one of a running `serve`, or one that lives as long as
    the block. Open it from the main thread: the database's life is bound to the thread that starts it.

    Raises:
        ConfigurationError: The settings do not make a running service.
    """
    with database(settings) as url:
        async with open_installation(settings, url) as installation:
            yield installation.service


@asynccontextmanager
async def open_installation(
    settings: Settings, database_url: str, *observers: ObservabilityManager, make_ledger: MakeLedger = PostgresLedger
) -> AsyncIterator[Installation]:
    """
    `open_service` on a database that is there already, with all that an operator or an API needs beside it.

    Args:
        observers: Get every record, beside the log.
        make_ledger: For a host that wants another lease, or a ledger with something around it.
    """
    clock, ids = SystemClock(), SystemIds()
    observability = FanOut(StructlogObservability(), *observers)
    key_ring = load_key_ring(settings)
    limiter = None if settings.redis_url is None else RedisRateLimiter(redis_connection(settings.redis_url))
    redis = None if settings.redis_url is None else RedisCheck(redis_connection(settings.redis_url))
    engine = await _engine_of_role(settings, database_url)
    agents = PostgresAgents(engine, key_id_of=envelope_key_id)
    # One connection a group of shards, and as many as ever for what does not go in groups.
    endings_size = ENDINGS_POOL_SIZE + min(settings.shard_groups, SHARED_CONNECTIONS_MAX) - 1
    endings = create_engine(
        database_url,
        pool_size=endings_size,
        pool_wait_s=ENDINGS_POOL_WAIT_S,
        row_security=settings.row_security,
    )
    postgres_ledger = make_ledger(
        engine, ids.new_id(), endings=endings, shard_groups=settings.shard_groups, observe=observability
    )
    ledger = postgres_ledger if limiter is None else LimitedLedger(postgres_ledger, limiter)
    store = PostgresApiKeys(engine)
    authenticator = ApiKeyAuthenticator(store=store, key_ring=key_ring, clock=clock)
    transport = WebhookTransport(settings.egress_policy, answer_limit_bytes=settings.max_body_bytes, clock=clock)
    service = ExternalAgentService(
        agent_reader=agents,
        agent_writer=agents,
        invocation_reader=PostgresInvocations(engine),
        ledger=ledger,
        policy=CedarPolicyDecisionPoint(CedarPolicies.load(settings.policy_dir)),
        transport=transport,
        secret_box=AesGcmSecretBox(key_ring),
        observability=observability,
        url_rules=settings.egress_policy,
        clock=clock,
        ids=ids,
        authenticator=authenticator,
        catalog=discover_catalog(),
    )
    upkeep = (
        partial(keep_up, ledger, clock, postgres_ledger.heartbeat_s),
        partial(_every, PARTITIONS_EVERY_S, partial(keep_partitions, engine), "the upkeep of partitions"),
        partial(_every, KEYS_EVERY_S, partial(clear_expired, engine), "the clearing of idempotency keys"),
    )
    background = [asyncio.create_task(_kept_running(work)) for work in upkeep]
    try:
        yield Installation(
            service=service,
            authenticator=authenticator,
            api_keys=ApiKeys(store=store, key_ring=key_ring, clock=clock, ids=ids),
            engine=engine,
            key_ring=key_ring,
            redis=redis,
        )
    finally:
        await service.drain()
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        with suppress(Unavailable):
            await postgres_ledger.retire()
        for part in (limiter, redis):
            if part is not None:
                await part.aclose()
        await transport.aclose()
        await engine.dispose()
        await endings.dispose()


def create_asgi_app(settings: Settings | None = None, *, make_ledger: MakeLedger = PostgresLedger) -> AsgiApp:
    """
    The API, for any ASGI server: `gunicorn -k asgi 'external_agents.bootstrap:create_asgi_app()'`.

    It uses the database of the settings, or the embedded one of a running `serve`; it never starts one.
    `make_ledger` is that of `open_installation`.

    Raises:
        ConfigurationError: The settings do not make a running service.
    """
    chosen = settings or Settings.from_env()
    configure_logging(chosen.log_format, chosen.log_level)

    @asynccontextmanager
    async def opened() -> AsyncIterator[AsgiApp]:
        metrics = PrometheusObservability()
        database_url = _running_database_url(chosen)
        with metrics.counting_errors():
            async with open_installation(chosen, database_url, metrics, make_ledger=make_ledger) as installation:
                yield create_app(
                    installation.service,
                    readiness=installation.readiness,
                    body_limit_bytes=chosen.max_body_bytes,
                    log_context=RequestContext,
                    metrics=metrics.exposition,
                    on_request=metrics.request,
                )

    return LifespanApp(opened)


@contextmanager
def database(settings: Settings) -> Iterator[str]:
    """The URL of the database for the length of the block; an embedded one has the newest schema."""
    with bare_database(settings) as url:
        if settings.database_url is None:
            migrate(url)
        yield url


@contextmanager
def bare_database(settings: Settings) -> Iterator[str]:
    """The URL of the database for the length of the block, whatever its schema."""
    if settings.database_url is not None:
        yield settings.database_url
        return
    with attached(home_folder(settings)) as url:
        yield url


def home_folder(settings: Settings) -> Path:
    """The folder of the embedded database, its keys, and the key of `serve --dev`."""
    return settings.home or default_home()


def load_key_ring(settings: Settings) -> KeyRing:
    """
    Raises:
        ConfigurationError: The keys are malformed; or there are none and the database is an external one.
        EmbeddedPostgresError: HOME cannot be used.
    """
    if settings.secret_keys is not None:
        return KeyRing.parse(settings.secret_keys)
    if settings.database_url is not None:
        raise ConfigurationError(
            f"{variable_of('secret_keys')} is required with {variable_of('database_url')}: "
            "set it to k1:KEY, where `openssl rand -base64 32` prints a KEY, and keep it as safe as the database."
        )
    home = home_folder(settings)
    try:
        make_home(home)
    except OSError as error:
        raise unusable(error) from error
    return KeyRing.load_or_create(home / "secret-keys")


def require_role(settings: Settings, fault: str | None) -> None:
    """
    Raises:
        ConfigurationError: There is a fault of the database's role.
    """
    if fault is not None:
        on_off = "on" if settings.row_security else "off"
        raise ConfigurationError(f"{variable_of('row_security')} is {on_off}, but {fault}.")


def redis_connection(url: str) -> RedisConnection:
    """
    Raises:
        ConfigurationError: The URL cannot be used.
    """
    try:
        return RedisConnection(url)
    except ConfigurationError as error:
        raise ConfigurationError(f"{variable_of('redis_url')} cannot be used. {error}") from None


def discover_catalog() -> Catalog:
    """
    The built-in auth types and platforms, and those of installed packages.

    A package adds an `AuthScheme` or a `Platform` by an entry point of the group `external_agents.auth_schemes` or
    `external_agents.platforms`.
    """
    auth_schemes = [entry.load() for entry in entry_points(group=AUTH_SCHEMES_GROUP)]
    platforms = [entry.load() for entry in entry_points(group=PLATFORMS_GROUP)]
    return BUILT_IN.extended(auth_schemes, platforms) if auth_schemes or platforms else BUILT_IN


def _running_database_url(settings: Settings) -> str:
    if settings.database_url is not None:
        return settings.database_url
    home = home_folder(settings)
    if (url := running_url(home)) is None:
        raise ConfigurationError(
            f"No embedded database runs on {home}: start `external-agents serve`, or set {variable_of('database_url')}."
        )
    return url


async def _engine_of_role(settings: Settings, database_url: str) -> AsyncEngine:
    """With row security its role is looked at first. An outage is none of its faults: readiness looks again."""
    engine = create_engine(database_url, row_security=settings.row_security)
    if settings.row_security and (fault := (await check(engine)).role) is not None:
        await engine.dispose()
        require_role(settings, fault)
    return engine


async def _every(seconds: float, work: Callable[[], Awaitable[object]], what: str) -> None:
    while True:
        try:
            await work()
            await asyncio.sleep(seconds)
        except Unavailable as outage:
            _log.warning("%s waits: %s", what, outage)
            await asyncio.sleep(UPKEEP_AGAIN_S)


async def _kept_running(work: Callable[[], Awaitable[None]]) -> None:
    """What runs in the background outlives its failures, such as a schema that is behind."""
    while True:
        try:
            await work()
        except Exception:
            _log.exception("background work failed; it begins again in %.0f s", BACKGROUND_AGAIN_S)
        await asyncio.sleep(BACKGROUND_AGAIN_S)
