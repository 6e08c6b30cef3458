"""`external-agents serve`"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Annotated

import typer

from external_agents.adapters.abac import CedarPolicies
from external_agents.adapters.postgres.schema import migrate, pending, role_fault
from external_agents.adapters.telemetry import configure_logging
from external_agents.bootstrap import (
    discover_catalog,
    home_folder,
    load_key_ring,
    metrics_listener,
    redis_connection,
    require_role,
)
from external_agents.cli.dev import dev_key, first_steps
from external_agents.domain.errors import ConfigurationError
from external_agents.settings import Settings, variable_of
from external_agents.supervisor import Serving, supervise, url_of


def serve(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    workers: Annotated[
        int | None, typer.Option(min=1, max=256, help="Processes; the number of cores by default.")
    ] = None,
    dev: Annotated[
        bool, typer.Option("--dev", help="Allow agents on this machine, and print a key with a call to paste.")
    ] = False,
) -> int:
    """
    Serve the API, with an embedded PostgreSQL unless EXTERNAL_AGENTS_DATABASE_URL names one.

    The first Ctrl-C lets running invocations finish (135 s at most); a second one ends at once.

    Example: external-agents serve --dev
    """
    if dev:
        _allow_loopback()
    settings = Settings.from_env()
    configure_logging(settings.log_format, settings.log_level)
    load_key_ring(settings)
    CedarPolicies.load(settings.policy_dir)
    discover_catalog()
    if settings.redis_url is not None:
        redis_connection(settings.redis_url)
    with metrics_listener(settings) as listener:
        return _serve(settings, Serving(host=host, port=port, workers=workers or os.cpu_count() or 1), listener, dev)


def _serve(settings: Settings, serving: Serving, metrics: socket.socket | None, dev: bool) -> int:
    key: list[str] = []

    def before_serving(database_url: str) -> None:
        if settings.database_url is None:
            migrate(database_url)
        elif behind := pending(database_url):
            raise ConfigurationError(
                f"The database's schema is behind by {len(behind)}: run external-agents migrate first."
            )
        else:
            require_role(settings, role_fault(database_url, row_security=settings.row_security))
        if dev:
            key.append(asyncio.run(dev_key(settings, database_url)))

    def on_ready(address: str) -> None:
        print(f"external-agents serves {address}\n  documentation  {address}/docs")
        if metrics is not None:
            print(f"  metrics        {url_of(metrics)}/metrics")
        print("  an API key     external-agents keys create --org ORG --subject NAME")
        print("Ctrl-C stops it; running invocations finish first.")
        if dev:
            print(first_steps(address, key[0]))
        print(end="", flush=True)

    return supervise(
        home=home_folder(settings) if settings.database_url is None else None,
        database_url=settings.database_url,
        serving=serving,
        before_serving=before_serving,
        on_ready=on_ready,
        metrics_listener=metrics,
    )


def _allow_loopback() -> None:
    """In the environment, for the workers read it there."""
    name = variable_of("egress_allow")
    allowed = os.environ.get(name, "")
    os.environ[name] = f"{allowed},loopback" if allowed else "loopback"
