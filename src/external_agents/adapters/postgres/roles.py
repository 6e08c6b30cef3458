"""
Two roles: one owns the tables and migrates, the lesser one serves, confined by row security.

The lesser one has the rights of this list and no others: none on a partition, whose rows it would reach past the policy
of the whole table, and none that row security does not govern, such as TRUNCATE.
"""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import Connection, Table, bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.types import Text

from external_agents.adapters.postgres.tables import (
    agents,
    api_key_hash_keys,
    api_keys,
    budgets,
    idempotency_keys,
    instances,
    invocations,
    metadata,
    rate_windows,
    secrets,
)
from external_agents.domain.errors import ConfigurationError

_KEPT = "SELECT, INSERT, UPDATE"
RIGHTS: dict[Table, str] = {
    agents: _KEPT,
    secrets: "SELECT, INSERT, DELETE",
    rate_windows: _KEPT,
    budgets: _KEPT,
    invocations: f"{_KEPT}, DELETE",
    idempotency_keys: _KEPT,
    instances: _KEPT,
    api_keys: _KEPT,
    api_key_hash_keys: "SELECT",
}
"""What has ended is filed anew, so invocations are deleted, too. What is sealed anew, the owner seals."""

FUNCTIONS = (
    "external_agents_api_keys",
    "external_agents_note_uses",
    "external_agents_needed_keys",
    "external_agents_running_organisations",
    "external_agents_forget_instance",
    "external_agents_clear_idempotency_keys",
    "external_agents_add_partition",
)
"""They run as the owner of the tables."""

TENANTS = tuple(table for table in metadata.tables.values() if "org_id" in table.columns)

_PARTITIONS = text(
    "SELECT quote_ident(relname) FROM pg_inherits JOIN pg_class ON oid = inhrelid"
    " WHERE inhparent = CAST(:parent AS regclass)"
)

# Partitions count: whoever may read them by name is not held by the policy of the whole table.
_STANDING = text(
    """
    WITH tenants AS (
        SELECT oid, relname, relowner FROM pg_class WHERE relname = ANY (:names) AND pg_table_is_visible(oid)
    ), ours AS (
        SELECT * FROM tenants
        UNION ALL
        SELECT pg_class.oid, relname, relowner FROM pg_class JOIN pg_inherits ON pg_class.oid = inhrelid
        WHERE inhparent IN (SELECT oid FROM tenants)
    )
    SELECT current_user AS role, min(relname) FILTER (WHERE NOT row_security_active(oid)) AS open_table,
        coalesce(bool_or(row_security_active(oid)), false) AS is_held_back,
        coalesce(bool_or(pg_has_role(relowner, 'MEMBER')), false) AS may_own
    FROM ours
    """
).bindparams(bindparam("names", [table.name for table in TENANTS], type_=ARRAY(Text)))


def grant_to(connection: Connection, role: str, version_table: str) -> None:
    """
    Give `role` the rights that serving needs, and take all others on our tables away, within a transaction.

    Raises:
        ConfigurationError: There is no such role.
    """
    try:
        for statement in _grants(connection, role, version_table):
            connection.exec_driver_sql(statement)
    except ProgrammingError as error:
        if getattr(error.orig, "sqlstate", None) != "42704":
            raise
        raise ConfigurationError(f"There is no role {role} to serve with: create it first.") from None


def _grants(connection: Connection, role: str, version_table: str) -> Iterator[str]:
    quote = connection.dialect.identifier_preparer.quote_identifier
    to = quote(role)
    partitions = connection.scalars(_PARTITIONS, {"parent": invocations.name}).all()
    yield f"REVOKE ALL ON {', '.join([*metadata.tables, version_table, *partitions])} FROM {to}"
    yield f"GRANT USAGE ON SCHEMA {quote(str(connection.scalar(text('SELECT current_schema()'))))} TO {to}"
    yield f"GRANT SELECT ON {version_table} TO {to}"
    for table, rights in RIGHTS.items():
        yield f"GRANT {rights} ON {table.name} TO {to}"
    # A dump that was restored without privileges has given them to everybody.
    yield f"REVOKE ALL ON FUNCTION {', '.join(FUNCTIONS)} FROM PUBLIC"
    yield f"GRANT EXECUTE ON FUNCTION {', '.join(FUNCTIONS)} TO {to}"


def sees_all(connection: Connection) -> bool:
    """Whether row security hides nothing from this connection's role."""
    return not connection.execute(_STANDING).one().is_held_back


def fault_of_role(connection: Connection, *, row_security: bool) -> str | None:
    """
    Why this connection's role is not one to serve with, with row security or without; None where it is.

    Where the tables are missing, nothing is said of it.
    """
    standing = connection.execute(_STANDING).one()
    if not row_security:
        return (
            f"the role {standing.role} does not own the tables: row security hides every row from it, so it must be on"
            if standing.is_held_back
            else None
        )
    if standing.may_own:
        return f"row security does not hold for the role {standing.role}: it owns the tables, or may become their owner"
    if standing.open_table is not None:
        return (
            f"row security does not hold for the role {standing.role} on {standing.open_table}: "
            "the role bypasses it, or it is disabled there"
        )
    return None
