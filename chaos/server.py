"""
The app that the API servers run: `chaos.server:create_app()`, told by its environment.

It is `external_agents.bootstrap`'s own, but for the lease and, where a guard is to be broken, the ledger.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine

from chaos.controls import CONTROLS
from external_agents.adapters.postgres.ledger import PostgresLedger
from external_agents.adapters.rest.asgi import AsgiApp
from external_agents.bootstrap import create_asgi_app

LEASE_S = "CHAOS_LEASE_S"
HEARTBEAT_S = "CHAOS_HEARTBEAT_S"
CONTROL = "CHAOS_CONTROL"
INSTANCES = "CHAOS_INSTANCES"
"""A folder with a file for each instance, named after its id, that holds its process id."""


def create_app() -> AsgiApp:
    ledger_class = CONTROLS.get(os.environ.get(CONTROL, ""), PostgresLedger)

    def make_ledger(engine: AsyncEngine, instance_id: UUID, **options: Any) -> PostgresLedger:
        _enter(Path(os.environ[INSTANCES]), instance_id)
        lease_s, heartbeat_s = float(os.environ[LEASE_S]), float(os.environ[HEARTBEAT_S])
        return ledger_class(engine, instance_id, lease_s=lease_s, heartbeat_s=heartbeat_s, **options)

    return create_asgi_app(make_ledger=make_ledger)


def _enter(instances: Path, instance_id: UUID) -> None:
    """Whole or not at all, for somebody may be reading the folder."""
    unfinished = instances.parent / str(instance_id)
    unfinished.write_text(str(os.getpid()))
    unfinished.rename(instances / str(instance_id))
