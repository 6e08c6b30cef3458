"""Results to stdout, everything else to stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from uuid import UUID

from rich.console import Console
from rich.table import Table

from external_agents.adapters.rest.representations import Json, encoded


def complain(line: str) -> None:
    """One line that says what is wrong and how to mend it."""
    print(f"external-agents: {' '.join(line.split())}", file=sys.stderr)


def note(line: str) -> None:
    """What is worth knowing and no result."""
    print(line, file=sys.stderr)


def show_json(value: Json | Sequence[Json]) -> None:
    """One JSON document, on one line: line ends that payloads brought along are white space between tokens."""
    print(encoded(value).decode().replace("\r", " ").replace("\n", " "))


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table for people; cells are shown as they are, without markup."""
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*map(_plain, row))
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 10_000  # A program reads it: nothing is folded or cut.
    console.print(table)


def show_fields(fields: Json) -> None:
    """Names and values, one a line; what is no text as JSON."""
    width = max(map(len, fields))
    for name, value in fields.items():
        shown = value if isinstance(value, str) else encoded(value).decode()
        if isinstance(value, UUID | datetime):
            shown = shown.strip('"')
        print(f"{name:<{width}}  {_plain(shown)}")


def _plain(text: str) -> str:
    """Nobody's input steers the terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
