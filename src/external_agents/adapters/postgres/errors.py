"""What the driver raises, in the library's words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from external_agents.domain.errors import AgentNotFound, ExternalAgentsError, StaleVersion, Unavailable

WHAT = "The database"

# SQLSTATE (PostgreSQL's appendix A): the first two characters are the class.
_OUTAGES = {
    "08": "the connection failed",
    "28": "our account was refused",
    "3D": "there is no such database",
    "40": "rolled back: serialization failure or deadlock",
    "53": "out of connections, disk or memory",
    "55P03": "a lock was not to be had in time",
    "57": "an operator or a timeout intervened, or the server is starting or stopping",
    "58": "the server's own system failed",
    "25006": "the server takes no writes: a standby",
}
_SCHEMA_LACKS = frozenset({"3F000", "42703", "42P01", "42883"})
"""A schema, column, table or function that our statements name."""
_RIGHTS_LACK = "42501"
_OF_EVERYONE = frozenset({"25006", _RIGHTS_LACK, *_SCHEMA_LACKS})

_CONSTRAINTS: dict[str, type[AgentNotFound | StaleVersion]] = {
    # To create is to store version 1 where there is no other.
    "pk_external_agents": StaleVersion,
}


@contextmanager
def translate_errors() -> Iterator[None]:
    """
    Decides by SQLSTATE, and by the constraint's name where there is one, never by the text of a message.

    Raises:
        Unavailable: The connection was lost or not to be had, the server cannot serve now, or the schema is behind.
    """
    try:
        yield
    except PoolTimeout as error:
        raise Unavailable("The service, which has too much to do,", retry_after_s=1) from error
    except DBAPIError as error:
        known = translated(error.orig)
        if known is None:
            raise
        raise known from error
    except psycopg.Error as error:
        known = translated(error)
        if known is None:
            raise
        raise known from error


def leaves_doubt(error: psycopg.Error) -> bool:
    """
    Whether a statement that was its own transaction may have been committed although this was raised.

    What the server itself has refused is rolled back for certain, unless it was on its way down.
    """
    state = error.sqlstate
    return state is None or state.startswith(("08", "57P"))


def concerns_everyone(error: Exception) -> bool:
    """Whether it says that the server cannot work at present, and nothing of what it was asked."""
    if not isinstance(error, psycopg.Error):
        return False
    state = error.sqlstate or "08"
    return state[:2] in {"08", "28", "3D", "53", "58"} or state[:3] == "57P" or state in _OF_EVERYONE


def is_conflict(error: Exception) -> bool:
    """Whether others stood in the way: a lock was not to be had in time, a deadlock, a statement that took too long."""
    state = (error.sqlstate or "") if isinstance(error, psycopg.Error) else ""
    return state in {"55P03", "57014"} or state.startswith("40")


def translated(error: BaseException | None) -> ExternalAgentsError | None:
    """The same in the library's words; None: it is a fault of ours."""
    if not isinstance(error, psycopg.Error):
        return None
    state = error.sqlstate
    if state is None:
        # The client's own: it could not connect, or the connection broke under it.
        lost = isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
        return Unavailable(WHAT) if lost else None
    if state in _OUTAGES or state[:2] in _OUTAGES:
        return Unavailable(WHAT)
    if state in _SCHEMA_LACKS:
        return Unavailable("The database's schema, which is behind (run external-agents migrate),")
    if state == _RIGHTS_LACK:
        return Unavailable("The database's role, which lacks rights (external-agents migrate gives them),")
    known = _CONSTRAINTS.get(error.diag.constraint_name or "")
    return known() if known else None
