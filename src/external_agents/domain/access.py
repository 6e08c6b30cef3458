"""Who asks for what, and the answer."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from types import MappingProxyType

import attrs

from external_agents.domain.agent import ExternalAgent

ORG_ID_PATTERN = r"[A-Za-z0-9_.:-]{1,100}"


class Action(enum.StrEnum):
    CREATE = "create"
    READ = "read"
    UPDATE = "update"
    DELETE = "delete"
    INVOKE = "invoke"

    @property
    def permission(self) -> str:
        """`invoke:external_agent`"""
        return f"{self.value}:external_agent"


PERMISSIONS = tuple(action.permission for action in Action)


def _is_org_id(instance: object, attribute: attrs.Attribute[str], value: str) -> None:
    if not isinstance(value, str) or re.fullmatch(ORG_ID_PATTERN, value) is None:
        raise ValueError(f"{attribute.name} must match {ORG_ID_PATTERN}")


def _is_subject(instance: object, attribute: attrs.Attribute[str], value: str) -> None:
    if not isinstance(value, str) or not 1 <= len(value) <= 200 or not value.isprintable():
        raise ValueError(f"{attribute.name} must have 1 to 200 printable characters")


def _as_set(permissions: Iterable[str]) -> frozenset[str]:
    return frozenset(permissions)


def _read_only(attributes: Mapping[str, str]) -> Mapping[str, str]:
    return MappingProxyType(dict(attributes))


def _items(attributes: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    return frozenset(attributes.items())


@attrs.frozen(cache_hash=True)
class Principal:
    """
    Who is asking, as the credentials say. Everything the principal does stays within `org_id`.

    It is cheap as a key: its hash is of all that it is, and is made once.

    Attributes:
        org_id: 1 to 100 of `A-Z a-z 0-9 _ . : -`.
        subject: A person or a service; recorded as created_by, updated_by and initiated_by.
        permissions: Such as `invoke:external_agent`.
        attributes: Names and values that policies can refer to, such as `team`.
    """

    org_id: str = attrs.field(validator=_is_org_id)
    subject: str = attrs.field(validator=_is_subject)
    permissions: frozenset[str] = attrs.field(converter=_as_set)
    attributes: Mapping[str, str] = attrs.field(factory=dict, converter=_read_only, eq=_items)


@attrs.frozen
class AccessRequest:
    """May `principal` do `action` on `agent`, or, where there is none, in its organisation, at the time `now`?"""

    principal: Principal
    action: Action
    agent: ExternalAgent | None
    now: datetime


@attrs.frozen
class Decision:
    """
    The answer to an AccessRequest.

    Attributes:
        policy_ids: The policies that determined it.
        errors: What went wrong while deciding; there is no error with `allowed`.
    """

    allowed: bool
    policy_ids: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
