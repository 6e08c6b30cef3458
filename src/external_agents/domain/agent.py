"""An external agent: what is known of it, and how it lives."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from datetime import datetime
from functools import cached_property
from uuid import UUID

import attrs

from external_agents.domain.budget import BUDGET_CONFIG_SCHEMA, BudgetConfig
from external_agents.domain.errors import IllegalTransition
from external_agents.domain.json_values import JsonValue
from external_agents.domain.rate_limit import RATE_LIMIT_CONFIG_SCHEMA, Limits, limits_of
from external_agents.domain.signing import PREVIOUS_SIGNING_SECRET, SIGNING_SECRET_SCHEMA


class AgentStatus(enum.StrEnum):
    ACTIVE = "active"
    INACTIVE = "inactive"
    DELETED = "deleted"


_MOVES = {
    AgentStatus.ACTIVE: {AgentStatus.INACTIVE, AgentStatus.DELETED},
    AgentStatus.INACTIVE: {AgentStatus.ACTIVE, AgentStatus.DELETED},
    AgentStatus.DELETED: set(),
}

TIMEOUT_MAX_S = 30
ATTEMPTS_MAX = 3
TAGS_MAX = 50

DEFAULTS: Mapping[str, JsonValue] = {
    "description": "",
    "auth_config": {},
    "platform_config": {},
    "rate_limit_config": None,
    "budget_config": None,
    "tags": [],
    "timeout_s": TIMEOUT_MAX_S,
    "max_attempts": ATTEMPTS_MAX,
    "signing_secret": None,
    "status": AgentStatus.ACTIVE.value,
}

AGENT_PROPERTIES: Mapping[str, JsonValue] = {
    "name": {"type": "string", "minLength": 1, "maxLength": 200},
    "description": {"type": "string", "maxLength": 2000, "default": DEFAULTS["description"]},
    "webhook_url": {
        "type": "string",
        "minLength": 1,
        "maxLength": 2000,
        "description": "Where invocations are POSTed to: https, a public host, no user info, no fragment.",
    },
    "auth_type": {"type": "string"},
    "auth_config": {"type": "object"},
    "provider": {"type": "string"},
    "platform_config": {"type": "object"},
    "rate_limit_config": {**RATE_LIMIT_CONFIG_SCHEMA, "type": ["object", "null"], "default": None},
    "budget_config": {**BUDGET_CONFIG_SCHEMA, "type": ["object", "null"], "default": None},
    "tags": {
        "type": "array",
        "maxItems": TAGS_MAX,
        "items": {"type": "string", "minLength": 1, "maxLength": 50},
        "default": DEFAULTS["tags"],
    },
    "timeout_s": {
        "type": "number",
        "minimum": 1,
        "maximum": TIMEOUT_MAX_S,
        "default": TIMEOUT_MAX_S,
        "description": "What one attempt may take in total, in seconds.",
    },
    "max_attempts": {"type": "integer", "minimum": 1, "maximum": ATTEMPTS_MAX, "default": ATTEMPTS_MAX},
    "signing_secret": SIGNING_SECRET_SCHEMA,
    "status": {"type": "string", "enum": ["active", "inactive"], "default": DEFAULTS["status"]},
}
"""What a caller sets; the catalog narrows auth_type, provider and the two configs that depend on them."""

REQUIRED_TO_CREATE = ("name", "provider", "webhook_url", "auth_type")
FIXED_AFTER_CREATION = frozenset({"provider"})
CHANGEABLE = AGENT_PROPERTIES.keys() - FIXED_AFTER_CREATION


@attrs.frozen(kw_only=True)
class ExternalAgent:
    """
    An agent that lives elsewhere, as one organisation registered it.

    Attributes:
        auth_config: The fields of auth_config that are no secrets; likewise platform_config.
        sealed: Envelopes of the secret fields by path (`auth_config.key`); only a SecretBox opens them.
        previous_signing_secret_until: Up to when the signing secret before the present one is used as well, exclusive;
            None: there is none.
        timeout_s: What one attempt may take in total, in seconds.
        version: Counts the changes, from 1.
    """

    id: UUID
    org_id: str
    name: str
    description: str
    provider: str
    webhook_url: str
    auth_type: str
    auth_config: Mapping[str, JsonValue]
    platform_config: Mapping[str, JsonValue]
    rate_limit_config: Mapping[str, JsonValue] | None
    budget_config: Mapping[str, JsonValue] | None
    tags: tuple[str, ...]
    timeout_s: float
    max_attempts: int
    status: AgentStatus
    created_by: str
    updated_by: str
    created_at: datetime
    updated_at: datetime
    previous_signing_secret_until: datetime | None = None
    version: int = 1
    sealed: Mapping[str, bytes] = attrs.field(factory=dict, repr=False)

    @cached_property
    def limits(self) -> Limits:
        return limits_of(self.rate_limit_config)

    @cached_property
    def budget(self) -> BudgetConfig:
        return BudgetConfig.of(self.budget_config)

    @property
    def is_deleted(self) -> bool:
        return self.status is AgentStatus.DELETED

    def changed(self, fields: Mapping[str, JsonValue], *, by: str, at: datetime) -> ExternalAgent:
        """
        The next version, with `fields` (validated, of this class's attributes) in place of its own.

        Raises:
            IllegalTransition: The status cannot follow the present one.
        """
        status = AgentStatus(fields.get("status", self.status))
        if status is not self.status and status not in _MOVES[self.status]:
            raise IllegalTransition(self.status, status)
        return attrs.evolve(
            self, **{**fields, "status": status}, updated_by=by, updated_at=at, version=self.version + 1
        )

    def deleted(self, *, by: str, at: datetime) -> ExternalAgent:
        """The same, marked as deleted; its record and its invocations stay."""
        fields = {"status": AgentStatus.DELETED, "previous_signing_secret_until": None}
        return self.changed(fields, by=by, at=at)

    def holds_expired(self, moment: datetime) -> bool:
        """Whether the time of a secret that it holds is over."""
        until = self.previous_signing_secret_until
        return until is not None and until <= moment

    def without_expired(self, moment: datetime) -> ExternalAgent:
        """The same version, without the secret whose time is over."""
        if not self.holds_expired(moment):
            return self
        sealed = {path: envelope for path, envelope in self.sealed.items() if path != PREVIOUS_SIGNING_SECRET}
        return attrs.evolve(self, sealed=sealed, previous_signing_secret_until=None)
