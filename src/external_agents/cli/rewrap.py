"""`external-agents keys rewrap`"""

from __future__ import annotations

import asyncio

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from external_agents.application.key_rotation import Rewrapped
from external_agents.bootstrap import database, discover_catalog, engine_of_owner, key_rotation, load_key_ring
from external_agents.cli.context import JsonOption, quieten
from external_agents.cli.output import complain, show_json, show_table
from external_agents.domain.json_values import JsonValue
from external_agents.ports.secrets import KeyUse
from external_agents.settings import Settings, variable_of


def rewrap(as_json: JsonOption = False) -> None:
    """
    Seal every stored secret with the first of the secret keys, and tell which of the others can be retired.

    It may run beside the service, be stopped at any moment, and be begun again. It goes through all organisations:
    with EXTERNAL_AGENTS_ROW_SECURITY=on it needs EXTERNAL_AGENTS_MIGRATION_DATABASE_URL.

    Example: external-agents keys rewrap
    """
    settings = Settings.from_env()
    quieten(settings)
    with database(settings) as url:
        done = asyncio.run(_rewrap(settings, url))
    if as_json:
        show_json(_document(done))
    else:
        _show(done)
    for place, reason in done.unreadable.items():
        complain(f"{place.org_id}, agent {place.agent_id}, {place.field}: {reason}")
    for key_id, reason in done.unreadable_hash_keys.items():
        complain(f"API keys that were made with the secret key {key_id}: {reason}")
    if done.left:
        complain(
            f"{done.left:,} secrets are still sealed with an older key: some process goes on sealing with it. "
            f"Let every process have the same {variable_of('secret_keys')}, and run this again."
        )
    if done.unreadable or done.unreadable_hash_keys or done.left:
        raise typer.Exit(1)


async def _rewrap(settings: Settings, url: str) -> Rewrapped:
    key_ring = load_key_ring(settings)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    async with engine_of_owner(settings, url) as engine:
        rotation = key_rotation(settings, engine, key_ring, discover_catalog())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            first = key_ring.key_ids[0]
            older = [use.secrets for key_id, use in (await rotation.uses()).items() if key_id != first]
            task = progress.add_task(f"sealing with {first}", total=sum(older))
            return await rotation.rewrap(lambda looked_at: progress.advance(task, looked_at))


def _show(done: Rewrapped) -> None:
    rows = []
    for key_id, after in done.after.items():
        before = done.before.get(key_id, KeyUse())
        rows.append([key_id, *(f"{n:,}" for n in (before.secrets, after.secrets, before.api_keys, after.api_keys))])
    show_table(("key", "secrets before", "after", "API keys before", "after"), rows)
    for key_id in done.retirable:
        print(f"{key_id} is not used any more: it can be taken out of {variable_of('secret_keys')}")


def _document(done: Rewrapped) -> dict[str, JsonValue]:
    uses = {"before": done.before, "after": done.after}
    return {
        "resealed": done.resealed,
        **{when: {key_id: _use(use) for key_id, use in by_key.items()} for when, by_key in uses.items()},
        "retirable": list(done.retirable),
        "unreadable": [
            {"org_id": place.org_id, "agent_id": str(place.agent_id), "field": place.field, "reason": reason}
            for place, reason in done.unreadable.items()
        ],
        "unreadable_hash_keys": [
            {"key_id": key_id, "reason": reason} for key_id, reason in done.unreadable_hash_keys.items()
        ],
        "left": done.left,
    }


def _use(use: KeyUse) -> dict[str, JsonValue]:
    return {"secrets": use.secrets, "api_keys": use.api_keys}
