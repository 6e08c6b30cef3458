"""`external-agents migrate`"""

from __future__ import annotations

from typing import Annotated

import typer

from external_agents.adapters.postgres.schema import migrate as bring_to_newest
from external_agents.adapters.postgres.schema import pending
from external_agents.bootstrap import bare_database
from external_agents.settings import Settings


def migrate(
    check: Annotated[bool, typer.Option("--check", help="Only tell; exit 1 when the schema is behind.")] = False,
) -> None:
    """
    Bring the database to the newest schema.

    An embedded database is brought there by every command; an external one by this command alone.

    Example: external-agents migrate --check
    """
    with bare_database(Settings.from_env()) as url:
        behind = pending(url)
        if check:
            print(f"behind by {len(behind)}: {', '.join(behind)}" if behind else "up to date")
            raise typer.Exit(1 if behind else 0)
        bring_to_newest(url)
        print(f"migrated: {', '.join(behind)}" if behind else "up to date")
