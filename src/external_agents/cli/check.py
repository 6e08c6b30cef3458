"""`external-agents check`"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator

import typer

from external_agents.adapters.abac import CedarPolicies
from external_agents.adapters.postgres.audit import BudgetAudit, audit_budgets
from external_agents.adapters.postgres.engine import create_engine
from external_agents.adapters.postgres.roles import fault_of_role
from external_agents.adapters.redis import RedisCheck, RedisReadiness
from external_agents.adapters.redis.readiness import REQUIRED
from external_agents.bootstrap import (
    database,
    database_readiness,
    discover_catalog,
    home_folder,
    load_key_ring,
    redis_connection,
)
from external_agents.domain.budget import BudgetAccount
from external_agents.domain.errors import ExternalAgentsError
from external_agents.settings import PREFIX, Settings, variable_of


def check() -> None:
    """
    Look at settings, database, migrations, Redis, keys, policies and budgets: what is wrong, and how to mend it.

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
    if settings.redis_url is not None:
        yield _redis_finding(settings.redis_url)
    try:
        yield from _database_findings(settings)
    except ExternalAgentsError as error:
        yield "database", False, str(error)


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
        state, audit = asyncio.run(_look(url, settings))
        where = "external" if settings.database_url else f"embedded, under {home_folder(settings)}"
        if outage := state["database"]:
            state["database"] = f"{outage}: start it, or mend {variable_of('database_url')}"
        confined = "sees one organisation at a time" if settings.row_security else "owns the tables"
        good = {"database": where, "schema": "up to date", "role": confined}
        for name, reason in state.items():
            yield name, reason is None, reason or good[name]
    if audit is not None:
        yield from _budget_findings(audit)
    elif settings.row_security and not any(state.values()):
        owner = variable_of("migration_database_url")
        yield "budgets", True, f"not compared: only the owner of the tables can, and {owner} is not set"


async def _look(url: str, settings: Settings) -> tuple[dict[str, str | None], BudgetAudit | None]:
    engine = create_engine(url, row_security=settings.row_security)
    try:
        state = await database_readiness(engine)
        if not any(state.values()):
            async with engine.connect() as connection:
                state["role"] = await connection.run_sync(fault_of_role, row_security=settings.row_security)
    finally:
        await engine.dispose()
    # Whoever sees one organisation at a time cannot compare them all.
    owners_url = settings.migration_database_url if settings.row_security else url
    return state, None if any(state.values()) or owners_url is None else await _audit(owners_url)


async def _audit(url: str) -> BudgetAudit:
    engine = create_engine(url)
    try:
        return await audit_budgets(engine)
    finally:
        await engine.dispose()


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
