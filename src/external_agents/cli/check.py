"""`external-agents check`"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from typing import TypeAlias

import typer
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.abac import CedarPolicies
from external_agents.adapters.identity.jwt import JwksEndpoint, KeySet, KeySetUnavailable
from external_agents.adapters.postgres.audit import BudgetAudit, audit_budgets
from external_agents.adapters.postgres.engine import connected, create_engine
from external_agents.adapters.postgres.roles import fault_of_role
from external_agents.adapters.redis import RedisCheck, RedisReadiness
from external_agents.adapters.redis.readiness import REQUIRED
from external_agents.adapters.rest.metrics_server import shows_metrics
from external_agents.application.key_rotation import KeyRotation
from external_agents.bootstrap import (
    database,
    database_readiness,
    discover_catalog,
    engine_of_owner,
    home_folder,
    key_rotation,
    keys_readiness,
    load_key_ring,
    metrics_listener,
    redis_connection,
)
from external_agents.domain.budget import BudgetAccount
from external_agents.domain.errors import ExternalAgentsError
from external_agents.settings import PREFIX, ListenAddress, Settings, TokenIssuer, variable_of

_Finding: TypeAlias = tuple[str, bool, str]


def check() -> None:
    """
    Look at settings, database, migrations, Redis, keys, JWTs, policies and budgets: what is wrong, and how to mend it.

    Every budget is compared with its invocations, which takes some seconds a million.

    Example: external-agents check
    """
    findings = list(_findings())
    for name, good, line in findings:
        print(f"{'ok   ' if good else 'WRONG'}  {name:<10}  {line}")
    raise typer.Exit(0 if all(good for _, good, _ in findings) else 1)


def _findings() -> Iterator[_Finding]:
    try:
        settings = Settings.from_env()
    except ExternalAgentsError as error:
        yield "settings", False, str(error)
        return
    if strange := settings.unknown_names(os.environ):
        yield "settings", False, f"unknown and without effect: {', '.join(strange)}"
    else:
        yield "settings", True, f"every {PREFIX}_ variable is known"
    yield _finding("keys", lambda: f"sealing with {load_key_ring(settings).key_ids[0]}")
    yield _finding("policies", lambda: f"{len(CedarPolicies.load(settings.policy_dir).loaded)} in force")
    yield _finding("catalog", lambda: f"auth types: {', '.join(discover_catalog().auth_schemes)}")
    if (issuer := settings.token_issuer) is not None:
        yield _jwt_finding(issuer)
    if settings.metrics_address is not None:
        yield _metrics_finding(settings, settings.metrics_address)
    if settings.redis_url is not None:
        yield _redis_finding(settings.redis_url)
    try:
        yield from _database_findings(settings)
    except ExternalAgentsError as error:
        yield "database", False, str(error)


def _metrics_finding(settings: Settings, address: ListenAddress) -> _Finding:
    if shows_metrics(address.host, address.port):
        return "metrics", True, f"shown at {address}"
    return _finding("metrics", lambda: _metrics_address_is_free(settings))


def _metrics_address_is_free(settings: Settings) -> str:
    with metrics_listener(settings):
        return f"nobody listens at {settings.metrics_address} yet: `external-agents serve` will"


def _jwt_finding(issuer: TokenIssuer) -> _Finding:
    try:
        keys: KeySet = asyncio.run(JwksEndpoint(issuer.jwks_url).fetch())
    except KeySetUnavailable as outage:
        return "jwt", False, f"there is no JWK set, {outage}: mend that, or {variable_of('jwt_jwks_url')}"
    skipped = "".join(f"; {reason}" for reason in keys.skipped)
    if not keys.keys:
        return "jwt", False, f"the JWK set of {issuer.name} has no usable key{skipped}"
    usable = f"{len(keys.keys)} usable key{'s' if len(keys.keys) > 1 else ''}"
    return "jwt", True, f"{issuer.name}, for {issuer.audience}: {usable}{skipped}"


def _redis_finding(url: str) -> _Finding:
    try:
        state = asyncio.run(_redis_readiness(url))
    except ExternalAgentsError as error:
        return "redis", False, str(error)
    if state.outage is not None:
        return "redis", False, f"cannot be reached ({state.outage}): start it, or mend {variable_of('redis_url')}"
    if state.faults:
        return "redis", False, "; ".join(state.faults)
    if state.unverified:
        wanted = ", ".join(f"{name} is {REQUIRED[name]}" for name in state.unverified)
        return "redis", True, f"keeps the rate limits; it does not tell its settings: make sure that {wanted}"
    return "redis", True, "keeps the rate limits, and remembers what it acknowledges"


async def _redis_readiness(url: str) -> RedisReadiness:
    check = RedisCheck(redis_connection(url))
    try:
        return await check()
    finally:
        await check.aclose()


def _database_findings(settings: Settings) -> Iterator[_Finding]:
    with database(settings) as url:
        state, keys, audit = asyncio.run(_look(settings, url))
        where = "external" if settings.database_url else f"embedded, under {home_folder(settings)}"
        if outage := state["database"]:
            state["database"] = f"{outage}: start it, or mend {variable_of('database_url')}"
        confined = "sees one organisation at a time" if settings.row_security else "owns the tables"
        good = {"database": where, "schema": "up to date", "role": confined}
        for name, reason in state.items():
            yield name, reason is None, reason or good[name]
    yield from keys
    if audit is not None:
        yield from _budget_findings(audit)
    elif _knows_no_owner(settings) and not any(state.values()):
        why = f"only the owner of the tables can, and {variable_of('migration_database_url')} is not set"
        yield "secrets", True, f"not counted: {why}"
        yield "budgets", True, f"not compared: {why}"


async def _look(settings: Settings, url: str) -> tuple[dict[str, str | None], list[_Finding], BudgetAudit | None]:
    engine = create_engine(url, row_security=settings.row_security)
    try:
        state = await database_readiness(engine)
        if not any(state.values()):
            async with connected(engine) as connection:
                state["role"] = await connection.run_sync(fault_of_role, row_security=settings.row_security)
        if any(state.values()):
            return state, [], None
        missing = await _missing_keys(settings, engine)
    finally:
        await engine.dispose()
    if _knows_no_owner(settings):
        return state, missing, None
    async with engine_of_owner(settings, url) as engine:
        return state, [*await _key_uses(settings, engine), *missing], await audit_budgets(engine)


def _knows_no_owner(settings: Settings) -> bool:
    """Whoever sees one organisation at a time cannot compare or count over them all."""
    return settings.row_security and settings.migration_database_url is None


async def _key_uses(settings: Settings, engine: AsyncEngine) -> list[_Finding]:
    if (rotation := _rotation(settings, engine)) is None:
        return []
    uses = "; ".join(
        f"{key_id}: {use.secrets:,} secrets, {use.api_keys:,} API keys"
        for key_id, use in (await rotation.uses()).items()
    )
    return [("secrets", True, f"by secret key: {uses}")]


async def _missing_keys(settings: Settings, engine: AsyncEngine) -> list[_Finding]:
    rotation = _rotation(settings, engine)
    missing = None if rotation is None else await keys_readiness(rotation)
    return [] if missing is None else [("secrets", False, missing)]


def _rotation(settings: Settings, engine: AsyncEngine) -> KeyRotation | None:
    try:
        return key_rotation(settings, engine, load_key_ring(settings), discover_catalog())
    except ExternalAgentsError:
        return None  # What is wrong with the keys, or the catalog, is told already.


def _budget_findings(audit: BudgetAudit) -> Iterator[_Finding]:
    if not audit.number_off:
        yield "budgets", True, f"{audit.accounts:,} accounts equal the sums of {audit.bookings:,} invocations"
    for false in audit.named:
        kept = "there is no account" if false.account is None else f"the account says {_figures(false.account)}"
        place = f"{false.org_id}, agent {false.agent_id}, {false.currency or 'no currency'}, {false.month:%Y-%m}"
        yield "budgets", False, f"{place}: {kept}; its invocations say {_figures(false.booked)}"
    if more := audit.number_off - len(audit.named):
        yield "budgets", False, f"and {more:,} accounts more"


def _figures(account: BudgetAccount) -> str:
    return f"spent {account.spent:f}, reserved {account.reserved:f}"


def _finding(name: str, look: Callable[[], str]) -> _Finding:
    try:
        return name, True, look()
    except ExternalAgentsError as error:
        return name, False, str(error)
