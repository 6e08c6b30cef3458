"""`external-agents migrate`"""

from __future__ import annotations

from typing import Annotated

import typer

from external_agents.adapters.postgres.schema import migrate as bring_to_newest
from external_agents.adapters.postgres.schema import pending, role_of
from external_agents.bootstrap import bare_database
from external_agents.settings import Settings


def migrate(
    check: Annotated[bool, typer.Option("--check", help="Only tell; exit 1 when the schema is behind.")] = False,
) -> None:
    """
    Bring the database to the newest schema.

    An embedded database is brought there by every command; an external one by this command alone. With
    EXTERNAL_AGENTS_MIGRATION_DATABASE_URL it works as the owner of the tables, and the role of
    EXTERNAL_AGENTS_DATABASE_URL gets the rights that serving needs, and no others.

    Example: external-agents migrate --check
    """
    settings = Settings.from_env()
    with bare_database(settings) as serving_url:
        url = settings.migration_database_url or serving_url
        behind = pending(url)
        if check:
            print(f"behind by {len(behind)}: {', '.join(behind)}" if behind else "up to date")
            raise typer.Exit(1 if behind else 0)
        serving_role = None if settings.migration_database_url is None else role_of(serving_url)
        if serving_role == role_of(url):
            serving_role = None
        bring_to_newest(url, serving_role)
        print(f"migrated: {', '.join(behind)}" if behind else "up to date")
        if serving_role is not None:
            print(f"the role {serving_role} may serve")
