"""`external-agents check`"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator

import typer
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.abac import CedarPolicies
from external_agents.adapters.identity.jwt import JwksEndpoint, KeySet, KeySetUnavailable
from external_agents.adapters.postgres.audit import BudgetAudit, audit_budgets
from external_agents.adapters.postgres.engine import create_engine
from external_agents.adapters.redis import RedisCheck, RedisReadiness
from external_agents.adapters.redis.readiness import REQUIRED
from external_agents.adapters.rest.metrics_server import shows_metrics
from external_agents.bootstrap import (
    database,
    database_readiness,
    discover_catalog,
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


def _findings() -> Iterator[tuple[str, bool, str]]:
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


def _metrics_finding(settings: Settings, address: ListenAddress) -> tuple[str, bool, str]:
    if shows_metrics(address.host, address.port):
        return "metrics", True, f"shown at {address}"
    return _finding("metrics", lambda: _metrics_address_is_free(settings))


def _metrics_address_is_free(settings: Settings) -> str:
    with metrics_listener(settings):
        return f"nobody listens at {settings.metrics_address} yet: `external-agents serve` will"


def _jwt_finding(issuer: TokenIssuer) -> tuple[str, bool, str]:
    try:
        keys: KeySet = asyncio.run(JwksEndpoint(issuer.jwks_url).fetch())
    except KeySetUnavailable as outage:
        return "jwt", False, f"there is no JWK set, {outage}: mend that, or {variable_of('jwt_jwks_url')}"
    skipped = "".join(f"; {reason}" for reason in keys.skipped)
    if not keys.keys:
        return "jwt", False, f"the JWK set of {issuer.name} has no usable key{skipped}"
    usable = f"{len(keys.keys)} usable key{'s' if len(keys.keys) > 1 else ''}"
    return "jwt", True, f"{issuer.name}, for {issuer.audience}: {usable}{skipped}"


def _redis_finding(url: str) -> tuple[str, bool, str]:
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


def _database_findings(settings: Settings) -> Iterator[tuple[str, bool, str]]:
    with database(settings) as url:
        state, keys, audit = asyncio.run(_look(settings, url))
        where = "external" if settings.database_url else f"embedded, under {home_folder(settings)}"
        if outage := state["database"]:
            state["database"] = f"{outage}: start it, or mend {variable_of('database_url')}"
        for name, reason in state.items():
            yield name, reason is None, reason or (where if name == "database" else "up to date")
    yield from keys
    if audit is not None:
        yield from _budget_findings(audit)


async def _look(
    settings: Settings, url: str
) -> tuple[dict[str, str | None], list[tuple[str, bool, str]], BudgetAudit | None]:
    engine = create_engine(url)
    try:
        state = await database_readiness(engine)
        if any(state.values()):
            return state, [], None
        return state, await _key_findings(settings, engine), await audit_budgets(engine)
    finally:
        await engine.dispose()


async def _key_findings(settings: Settings, engine: AsyncEngine) -> list[tuple[str, bool, str]]:
    try:
        rotation = key_rotation(settings, engine, load_key_ring(settings), discover_catalog())
    except ExternalAgentsError:
        return []  # What is wrong with the keys, or the catalog, is told already.
    uses = "; ".join(
        f"{key_id}: {use.secrets:,} secrets, {use.api_keys:,} API keys"
        for key_id, use in (await rotation.uses()).items()
    )
    found = [("secrets", True, f"by secret key: {uses}")]
    if missing := await keys_readiness(rotation):
        found.append(("secrets", False, missing))
    return found


def _budget_findings(audit: BudgetAudit) -> Iterator[tuple[str, bool, str]]:
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


def _finding(name: str, look: Callable[[], str]) -> tuple[str, bool, str]:
    try:
        return name, True, look()
    except ExternalAgentsError as error:
        return name, False, str(error)
