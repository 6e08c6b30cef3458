"""What the commands share: who the local operator is, the database for the length of one command, reading documents."""

from __future__ import annotations

import asyncio
import getpass
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, TypeVar
from uuid import UUID

import typer

from external_agents.adapters.telemetry import configure_logging
from external_agents.bootstrap import Installation, database, open_installation
from external_agents.domain.access import PERMISSIONS, Principal
from external_agents.domain.errors import ConfigurationError
from external_agents.settings import Settings

T = TypeVar("T")


def _org_id(text: str) -> str:
    try:
        return Principal(text, "-", ()).org_id
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


OrgOption = Annotated[
    str, typer.Option("--org", metavar="ORG", help="The organisation.", show_default=False, callback=_org_id)
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, for programs.")]
AgentArgument = Annotated[str, typer.Argument(metavar="AGENT", help="The agent's id.", show_default=False)]


def with_installation(work: Callable[[Installation], Awaitable[T]]) -> T:
    """Carry out `work` on the database of the settings: beside a running `serve`, or starting and stopping it."""
    settings = Settings.from_env()
    quieten(settings)
    with database(settings) as url:
        return asyncio.run(_within(settings, url, work))


def quieten(settings: Settings) -> None:
    """The log of a command: what goes wrong, the command tells itself."""
    configure_logging(settings.log_format, settings.log_level if settings.log_level != "info" else "error")


def operator_of(org_id: str) -> Principal:
    """The local operator, who may do everything within the organisation named on the command line."""
    return Principal(org_id, f"operator:{_user()}", PERMISSIONS)


def parse_id(text: str, name: str) -> UUID:
    """
    Raises:
        typer.BadParameter: It is no UUID.
    """
    try:
        return UUID(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no id", param_hint=name) from None


def read_document(argument: str | None) -> bytes:
    """
    The bytes of a document given as text, as `@FILE`, or on stdin (`-`, or nothing at all).

    Raises:
        typer.BadParameter: Nothing was given and stdin is a terminal.
        ConfigurationError: The file cannot be read.
    """
    if argument is None or argument == "-":
        if argument is None and sys.stdin.isatty():
            raise typer.BadParameter("give it as an argument, as @FILE, or on stdin", param_hint="the JSON document")
        return sys.stdin.buffer.read()
    if argument.startswith("@"):
        try:
            return Path(argument[1:]).read_bytes()
        except OSError as error:
            raise ConfigurationError(f"{argument[1:]} cannot be read: {error.strerror}") from None
    return argument.encode("utf-8", "surrogateescape")


async def _within(settings: Settings, url: str, work: Callable[[Installation], Awaitable[T]]) -> T:
    async with open_installation(settings, url) as installation:
        return await work(installation)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
