"""
Agents that were invoked before, with their secrets opened.

What is known of an agent may lead to an attempt at admission and to nothing else: the ledger admits the version that is
current and no other. So a refusal is never drawn from memory; it is judged again on the agent as the store has it.
A secret whose time is over is forgotten at the next invocation of its agent, which has not changed for it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any, TypeAlias, TypeVar
from uuid import UUID

import attrs

from external_agents.application.access import AccessControl
from external_agents.application.registration import Opened
from external_agents.application.shared_reads import SharedReads
from external_agents.application.visible_agents import id_of
from external_agents.domain.access import Action, Principal
from external_agents.domain.agent import ExternalAgent
from external_agents.domain.auth import FixedHeaders
from external_agents.domain.errors import AgentNotFound, ExternalAgentsError
from external_agents.ports.repositories import AgentReader
from external_agents.ports.system import Clock

KNOWN_MAX = 4_096
KNOWN_SIZE_MAX = 16_384
"""
Bytes, roughly, of an agent's configs and headers as Python holds them. Most take less than a tenth of it.

A config may be as large as a request's body, and a thousand times as many bytes when it is decoded: what is larger is
read each time, so that all that is known takes 64 MiB at the most.
"""
_OBJECT_BYTES = 64

T = TypeVar("T")

_Key: TypeAlias = tuple[str, UUID]


@attrs.frozen(eq=False)
class KnownAgent:
    """An agent as it was read, and its secrets, opened when they are asked for and then kept."""

    agent: ExternalAgent
    _open: Callable[[ExternalAgent], Opened] = attrs.field(repr=False)

    @cached_property
    def opened(self) -> Opened:
        """
        Raises:
            SecretUnreadable: An envelope cannot be opened.
        """
        return self._open(self.agent)


class KnownAgents:
    """At most `known_max`, those invoked last; none that is deleted, and none that could not be invoked."""

    def __init__(
        self,
        reader: AgentReader,
        access: AccessControl,
        open_secrets: Callable[[ExternalAgent], Opened],
        *,
        clock: Clock,
        known_max: int = KNOWN_MAX,
    ) -> None:
        self._reader = reader
        self._access = access
        self._open = open_secrets
        self._clock = clock
        self._known_max = known_max
        self._kept: OrderedDict[_Key, KnownAgent] = OrderedDict()
        self._reads: SharedReads[_Key, KnownAgent] = SharedReads()

    async def to_invoke(self, principal: Principal, agent_id: UUID | str, prepare: Callable[[KnownAgent], T]) -> T:
        """
        What `prepare` makes of the agent.

        `prepare` may have been given an agent that has changed since; the version that the ledger checks tells. What it
        raises, it has raised on the agent as it is.

        Raises:
            AgentNotFound: There is none, or it is deleted.
            PermissionDenied: The policies do not allow to invoke it.
        """
        key = principal.org_id, id_of(agent_id)
        known = self._current(key) or await self._reads.join(key)
        if known is not None and await self._access.allows(principal, Action.INVOKE, known.agent):
            with suppress(ExternalAgentsError):
                return self._prepared(known, prepare)
        known = await self._reads.begin(key, lambda: self._read(*key))
        await self._access.require(principal, Action.INVOKE, known.agent)
        return self._prepared(known, prepare)

    def forget(self, agent: ExternalAgent) -> None:
        """This version is not the current one, or not for long; what is known of a later one is kept."""
        key = agent.org_id, agent.id
        kept = self._kept.get(key)
        if kept is not None and kept.agent.version <= agent.version:
            del self._kept[key]

    def _current(self, key: _Key) -> KnownAgent | None:
        known = self._kept.get(key)
        if known is None or not known.agent.holds_expired(self._clock.now()):
            return known
        del self._kept[key]
        return None

    async def _read(self, org_id: str, agent_id: UUID) -> KnownAgent:
        agent = await self._reader.read(org_id, agent_id)
        if agent.is_deleted:
            raise AgentNotFound
        return KnownAgent(agent.without_expired(self._clock.now()), self._open)

    def _prepared(self, known: KnownAgent, prepare: Callable[[KnownAgent], T]) -> T:
        prepared = prepare(known)
        self._keep(known)
        return prepared

    def _keep(self, known: KnownAgent) -> None:
        key = known.agent.org_id, known.agent.id
        kept = self._kept.get(key)
        if kept is None or kept.agent.version < known.agent.version:
            if not _is_small(known):
                return
            self._kept[key] = known
        self._kept.move_to_end(key)
        if len(self._kept) > self._known_max:
            self._kept.popitem(last=False)


def _is_small(known: KnownAgent) -> bool:
    """Looks no further than KNOWN_SIZE_MAX."""
    agent = known.agent
    left = KNOWN_SIZE_MAX
    credentials = known.opened.credentials
    headers = credentials.headers if isinstance(credentials, FixedHeaders) else {}
    values: list[Any] = [agent.description, agent.auth_config, agent.platform_config, agent.sealed, headers]
    while values and left > 0:
        value = values.pop()
        left -= _OBJECT_BYTES
        if isinstance(value, str | bytes):
            left -= len(value)
        elif isinstance(value, Mapping):
            values += value.keys()
            values += value.values()
        elif isinstance(value, list | tuple):
            values += value
    return left > 0
