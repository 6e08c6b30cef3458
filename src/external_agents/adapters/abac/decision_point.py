"""Deciding with Cedar."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from itertools import groupby, islice
from operator import attrgetter
from typing import Any

import orjson
from cedarpy import AuthzResult, Entities, is_authorized_batch

from external_agents.adapters.abac.policies import CedarPolicies
from external_agents.domain.access import AccessRequest, Action, Decision, Principal
from external_agents.domain.agent import ExternalAgent
from external_agents.ports.policy import PolicyDecisionPoint

CHUNK = 50
"""Decided in one go, a few milliseconds; then the event loop has its turn."""

REMEMBERED_MAX = 4_096

_SUBJECTS_KEPT = 1024
_ERROR_MAX = 300

_ATTRIBUTES = ("org_id", "name", "provider", "status", "tags", "created_by")
_seen = attrgetter("id", *_ATTRIBUTES)
"""All that Cedar is told of an agent: its id, and _ATTRIBUTES."""

_log = logging.getLogger(__name__)


class CedarPolicyDecisionPoint(PolicyDecisionPoint):
    """
    Cedar in this process. The entities' ids are the subject, the agent's id and the organisation's.

    Cedar skips a policy that errs, a `forbid` too, so that an error can end in Allow: any error makes it a denial here.

    Decisions on single requests are remembered, the last `remembered_max`, where no policy reads the context: then a
    decision is a function of what Cedar sees of principal, action and agent, which is all that it is remembered by. An
    agent's version is not, for an agent of somebody else's making may change without one. Errors are not remembered,
    nor are lists, which would push out everything else.
    """

    def __init__(self, policies: CedarPolicies, *, remembered_max: int = REMEMBERED_MAX) -> None:
        self._policies = policies
        self._subject_entities = lru_cache(maxsize=_SUBJECTS_KEPT)(_subject_entities)
        self._remembered: OrderedDict[Hashable, Decision] = OrderedDict()
        self._remembered_max = 0 if policies.reads_context else remembered_max

    @property
    def judges_lists_by_agent(self) -> bool:
        return self._policies.has_folder

    async def decide(self, requests: Sequence[AccessRequest]) -> Sequence[Decision]:
        if len(requests) == 1:
            return [self._decide_one(requests[0])]
        decisions: list[Decision] = []
        for chunk in _chunks(requests):
            if decisions:
                await asyncio.sleep(0)
            decisions += self._decide_chunk(chunk)
        return decisions

    def _decide_one(self, request: AccessRequest) -> Decision:
        # The time is no part of the decision, but without a time zone it is no request.
        if not self._remembered_max or request.now.tzinfo is None:
            return self._decide_chunk([request])[0]
        key = request.principal, request.action, None if request.agent is None else _seen(request.agent)
        try:
            decision = self._remembered.get(key)
        except TypeError:  # Something in it is not what it says it is, such as a list for the tags.
            return self._decide_chunk([request])[0]
        if decision is not None:
            self._remembered.move_to_end(key)
            return decision
        [decision] = self._decide_chunk([request])
        if not decision.errors:
            self._remembered[key] = decision
            if len(self._remembered) > self._remembered_max:
                self._remembered.popitem(last=False)
        return decision

    def _decide_chunk(self, chunk: Sequence[AccessRequest]) -> list[Decision]:
        try:
            results = self._evaluate(chunk)
            return [self._decision(result) for result in results]
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # A panic in Cedar's Rust is no Exception; it, too, must end in a denial.
            # One request at fault, or two versions of an agent, which no set of entities can hold: each for itself.
            if len(chunk) > 1:
                return [decision for request in chunk for decision in self._decide_chunk([request])]
            _log.exception("a decision failed")
            return [Decision(allowed=False, errors=(_short(f"{type(error).__name__}: {error}"),))]

    def _evaluate(self, chunk: Sequence[AccessRequest]) -> list[AuthzResult]:
        entities = self._subject_entities(chunk[0].principal)
        # What has no agent is about the subject's own organisation, which is there.
        resources = [_resource(request.action, request.agent) for request in chunk if request.agent is not None]
        if resources:
            entities = entities.with_added_json_str(_json(resources))
        results = is_authorized_batch(
            [_cedar_request(request) for request in chunk],
            self._policies.policy_set,
            entities,
            self._policies.schema,
        )
        if len(results) != len(chunk):
            raise RuntimeError(f"{len(results)} answers to {len(chunk)} requests")
        return results

    def _decision(self, result: AuthzResult) -> Decision:
        errors = tuple(_short(error) for error in result.diagnostics.errors)
        return Decision(
            allowed=result.allowed and not errors,
            policy_ids=self._policies.names_of(result.diagnostics.reasons),
            errors=errors,
        )


def _chunks(requests: Sequence[AccessRequest]) -> Iterator[list[AccessRequest]]:
    """Neighbours of one principal: a set of entities holds one subject of a name."""
    for _, neighbours in groupby(requests, key=lambda request: request.principal):
        while chunk := list(islice(neighbours, CHUNK)):
            yield chunk


def _subject_entities(principal: Principal) -> Entities:
    subject = {
        "uid": _uid("Subject", principal.subject),
        "attrs": {"org_id": principal.org_id, "permissions": sorted(principal.permissions)},
        "tags": dict(principal.attributes),
        "parents": [],
    }
    return Entities.from_json_str(_json([subject, _organization(principal.org_id)]))


def _organization(org_id: str) -> dict[str, Any]:
    return {"uid": _uid("Organization", org_id), "attrs": {"org_id": org_id}, "parents": []}


def _resource(action: Action, agent: ExternalAgent) -> dict[str, Any]:
    if action is Action.CREATE:
        return _organization(agent.org_id)
    agent_id, *attributes = _seen(agent)
    return {
        "uid": _uid("Agent", str(agent_id)),
        "attrs": dict(zip(_ATTRIBUTES, attributes, strict=True)),
        "parents": [],
    }


def _cedar_request(request: AccessRequest) -> dict[str, Any]:
    agent = request.agent
    if agent is None or request.action is Action.CREATE:
        resource = _uid("Organization", agent.org_id if agent else request.principal.org_id)
    else:
        resource = _uid("Agent", str(agent.id))
    return {
        "principal": _uid("Subject", request.principal.subject),
        "action": _uid("Action", request.action.value),
        "resource": resource,
        "context": _json({"now": _cedar_datetime(request.now)}),
    }


def _uid(kind: str, entity_id: str) -> dict[str, str]:
    return {"type": f"ExternalAgents::{kind}", "id": entity_id}


def _cedar_datetime(at: datetime) -> str:
    """Cedar's datetime has milliseconds."""
    if at.tzinfo is None:
        raise ValueError("the time of a request must be aware")
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _json(value: object) -> str:
    return orjson.dumps(value).decode()


def _short(error: str) -> str:
    return " ".join(error.split())[:_ERROR_MAX]
