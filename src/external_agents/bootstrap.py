"""
The only wiring: settings → adapters → service → ASGI app. Nothing is built at import.

A host with adapters of its own needs none of this: it gives them to `ExternalAgentService`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext, suppress
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TypeAlias

import attrs
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.abac import CedarPolicies, CedarPolicyDecisionPoint
from external_agents.adapters.identity import ApiKeyAuthenticator, ApiKeys, ByForm
from external_agents.adapters.identity.jwt import IssuerKeys, JwksEndpoint, JwtAuthenticator
from external_agents.adapters.memory.system import SystemClock, SystemIds
from external_agents.adapters.postgres.agents import PostgresAgents
from external_agents.adapters.postgres.api_keys import PostgresApiKeys
from external_agents.adapters.postgres.embedded import attached, default_home, make_home, running_url
from external_agents.adapters.postgres.embedded.home import unusable
from external_agents.adapters.postgres.engine import connected, create_engine
from external_agents.adapters.postgres.envelopes import PostgresEnvelopes
from external_agents.adapters.postgres.idempotency import clear_expired
from external_agents.adapters.postgres.invocations import PostgresInvocations
from external_agents.adapters.postgres.ledger import PostgresLedger
from external_agents.adapters.postgres.partitions import keep_partitions
from external_agents.adapters.postgres.readiness import check
from external_agents.adapters.postgres.roles import sees_all
from external_agents.adapters.postgres.row_security import is_on
from external_agents.adapters.postgres.schema import migrate
from external_agents.adapters.redis import RedisCheck, RedisConnection, RedisRateLimiter
from external_agents.adapters.rest.app import create_app
from external_agents.adapters.rest.asgi import AsgiApp
from external_agents.adapters.rest.lifespan import LifespanApp
from external_agents.adapters.rest.metrics import Exposition
from external_agents.adapters.rest.metrics_server import listening, metrics_served
from external_agents.adapters.secrets import AesGcmSecretBox, KeyRing, envelope_key_id
from external_agents.adapters.telemetry import FanOut, RequestContext, StructlogObservability, configure_logging
from external_agents.adapters.telemetry.prometheus import PrometheusObservability
from external_agents.adapters.webhook.outbound import default_ssl_context
from external_agents.adapters.webhook.transport import WebhookTransport
from external_agents.application.key_rotation import KeyRotation
from external_agents.application.limited_ledger import LimitedLedger
from external_agents.application.registration import Registrar
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
LAST_USES_EVERY_S = 5.0
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
    key_rotation: KeyRotation
    redis: RedisCheck | None = None

    async def readiness(self) -> Mapping[str, str | None]:
        """What must be there to serve, by name, and why it is not; None where it is."""
        redis = {} if self.redis is None else {"redis": (await self.redis()).reason}
        database = await database_readiness(self.engine)
        keys = None if any(database.values()) else await keys_readiness(self.key_rotation)
        return {**database, **redis, "keys": keys}


async def database_readiness(engine: AsyncEngine) -> dict[str, str | None]:
    """`database` and `schema`, with row security also `role`, and what is wrong with each, or None."""
    state = await check(engine)
    schema = "the schema is not the newest: run external-agents migrate" if not state.schema else None
    fault = None if state.database else "the database cannot be reached"
    return {
        "database": fault if state.disk else "the database has no disk space left",
        "schema": schema if state.database else "unknown: the database cannot be reached",
        **({"role": state.role} if is_on(engine) else {}),
    }


async def keys_readiness(key_rotation: KeyRotation) -> str | None:
    """Which secret keys are missing; None: none is."""
    try:
        missing = await key_rotation.missing()
    except Unavailable:
        return "unknown: the database cannot be reached"
    if not missing:
        return None
    named = f"the secret key {missing[0]} is" if len(missing) == 1 else f"the secret keys {', '.join(missing)} are"
    return f"{named} in use and not configured: put it back into {variable_of('secret_keys')}"


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
    catalog = discover_catalog()
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
    secret_box = AesGcmSecretBox(key_ring)
    keys_authenticator = ApiKeyAuthenticator(store=store, key_ring=key_ring, clock=clock, secret_box=secret_box)
    authenticator: Authenticator = keys_authenticator
    issuer = settings.token_issuer
    issuer_keys = None if issuer is None else IssuerKeys(JwksEndpoint(issuer.jwks_url).fetch, clock)
    if issuer is not None and issuer_keys is not None:
        jwt = JwtAuthenticator(issuer=issuer.name, audience=issuer.audience, keys=issuer_keys, clock=clock)
        authenticator = ByForm(api_keys=keys_authenticator, jwt=jwt)
    transport = WebhookTransport(settings.egress_policy, answer_limit_bytes=settings.max_body_bytes, clock=clock)
    service = ExternalAgentService(
        agent_reader=agents,
        agent_writer=agents,
        invocation_reader=PostgresInvocations(engine),
        ledger=ledger,
        policy=CedarPolicyDecisionPoint(CedarPolicies.load(settings.policy_dir)),
        transport=transport,
        secret_box=secret_box,
        observability=observability,
        url_rules=settings.egress_policy,
        clock=clock,
        ids=ids,
        authenticator=authenticator,
        catalog=catalog,
    )
    upkeep = (
        partial(keep_up, ledger, clock, postgres_ledger.heartbeat_s, observe=observability),
        partial(_every, PARTITIONS_EVERY_S, partial(keep_partitions, engine), "the upkeep of partitions"),
        partial(_every, KEYS_EVERY_S, partial(clear_expired, engine), "the clearing of idempotency keys"),
        partial(_every, LAST_USES_EVERY_S, keys_authenticator.tell_last_uses, "the noting of API keys' last uses"),
    )
    background = [asyncio.create_task(_kept_running(work)) for work in upkeep]
    try:
        yield Installation(
            service=service,
            authenticator=authenticator,
            api_keys=ApiKeys(store=store, key_ring=key_ring, clock=clock, ids=ids),
            engine=engine,
            key_ring=key_ring,
            key_rotation=key_rotation(settings, engine, key_ring, catalog),
            redis=redis,
        )
    finally:
        await service.drain()
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        for last_word in (keys_authenticator.tell_last_uses, postgres_ledger.retire):
            with suppress(Unavailable):
                await last_word()
        for part in (limiter, redis, issuer_keys):
            if part is not None:
                await part.aclose()
        await transport.aclose()
        await engine.dispose()
        await endings.dispose()


def create_asgi_app(settings: Settings | None = None, *, make_ledger: MakeLedger = PostgresLedger) -> AsgiApp:
    """
    The API, for any ASGI server: `gunicorn -k asgi 'external_agents.bootstrap:create_asgi_app()'`.

    It uses the database of the settings, or the embedded one of a running `serve`; it never starts one. With
    METRICS_ADDRESS, each process that opens it listens there as well, and the kernel chooses who answers.
    `make_ledger` is that of `open_installation`.

    Raises:
        ConfigurationError: The settings do not make a running service.
    """
    chosen = settings or Settings.from_env()
    return _asgi_app(chosen, make_ledger, partial(_metrics_shown, chosen))


def create_worker_app() -> AsgiApp:
    """The API in a worker of `serve`, which shows the metrics at METRICS_ADDRESS itself."""
    return _asgi_app(Settings.from_env(), PostgresLedger, lambda exposition: nullcontext())


def _asgi_app(
    settings: Settings,
    make_ledger: MakeLedger,
    metrics_shown: Callable[[Exposition], AbstractAsyncContextManager[None]],
) -> AsgiApp:
    configure_logging(settings.log_format, settings.log_level)

    @asynccontextmanager
    async def opened() -> AsyncIterator[AsgiApp]:
        default_ssl_context()  # Or the first call would wait for it, and all others with it.
        metrics = PrometheusObservability()
        database_url = _running_database_url(settings)
        with metrics.counting_errors():
            async with (
                metrics_shown(metrics.exposition),
                open_installation(settings, database_url, metrics, make_ledger=make_ledger) as installation,
            ):
                yield create_app(
                    installation.service,
                    readiness=installation.readiness,
                    body_limit_bytes=settings.max_body_bytes,
                    log_context=RequestContext,
                    metrics=metrics.exposition if settings.metrics_address is None else None,
                    on_request=metrics.request,
                )

    return LifespanApp(opened)


@asynccontextmanager
async def _metrics_shown(settings: Settings, exposition: Exposition) -> AsyncIterator[None]:
    with metrics_listener(settings, shared=True) as listener:
        if listener is None:
            yield
            return
        async with metrics_served(listener, exposition):
            yield


@contextmanager
def metrics_listener(settings: Settings, *, shared: bool = False) -> Iterator[socket.socket | None]:
    """
    Listens at METRICS_ADDRESS for the length of the block; None where that is not set.

    Args:
        shared: Every process of one server of an operator's own listens there.

    Raises:
        ConfigurationError: Nobody can listen there.
    """
    address = settings.metrics_address
    if address is None:
        yield None
        return
    try:
        listener = listening(address.host, address.port, shared=shared)
    except OSError as error:
        raise ConfigurationError(
            f"{variable_of('metrics_address')}: cannot listen on {address}: {error.strerror}. Choose another address."
        ) from error
    with listener:
        yield listener


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


@asynccontextmanager
async def engine_of_owner(settings: Settings, database_url: str) -> AsyncIterator[AsyncEngine]:
    """
    For what spans organisations, as whoever owns the tables: the role of `database_url`, if no other does.

    Raises:
        ConfigurationError: There is row security, and it would hide what is looked for.
        Unavailable: The database cannot be reached.
    """
    owner = variable_of("migration_database_url")
    if settings.row_security and settings.migration_database_url is None:
        raise ConfigurationError(
            f"{variable_of('row_security')} is on, so that this role sees one organisation at a time: "
            f"set {owner} to the connection of the owner of the tables."
        )
    engine = create_engine(settings.migration_database_url or database_url)
    try:
        async with connected(engine) as connection:
            if not await connection.run_sync(sees_all):
                raise ConfigurationError(f"Row security hides rows from the role of {owner}: name the owner's there.")
        yield engine
    finally:
        await engine.dispose()


def key_rotation(settings: Settings, engine: AsyncEngine, key_ring: KeyRing, catalog: Catalog) -> KeyRotation:
    """What hangs on which secret key, and moving it to the first; with row security only which keys are missing."""
    secret_box = AesGcmSecretBox(key_ring)
    return KeyRotation(
        store=PostgresEnvelopes(engine, key_id_of=envelope_key_id),
        reseal=Registrar(catalog, settings.egress_policy, secret_box).resealed,
        secret_box=secret_box,
        key_ids=key_ring.key_ids,
        hash_keys=key_ring.api_key_hash_keys,
        clock=SystemClock(),
    )


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
