"""Every error that a caller can meet, in one table, and its form: problem details (RFC 9457)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import falcon
from falcon.asgi import Request, Response

from external_agents.adapters.rest.body import BodyTooSlow
from external_agents.adapters.rest.incoming import Incoming, incoming_of
from external_agents.adapters.rest.representations import Json, encoded, invocation_json, invoked_headers, quota_headers
from external_agents.application.invocation import Invoked
from external_agents.domain import errors as library
from external_agents.domain import refusals
from external_agents.domain.invocation import ErrorCode

PROBLEM_MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:external-agents:problem:"
RETRY_AFTER_S = 5

_log = logging.getLogger(__name__)


class AgentFailed(Exception):
    """An invocation ended without success."""

    def __init__(self, invoked: Invoked) -> None:
        super().__init__(invoked.invocation.error_message or "The agent failed.")
        self.invoked = invoked

    @classmethod
    def of(cls, invoked: Invoked) -> AgentFailed:
        """As the last attempt decides."""
        return (AgentTimedOut if invoked.invocation.error_code is ErrorCode.TIMEOUT else AgentFailed)(invoked)


class AgentTimedOut(AgentFailed):
    """An invocation whose last attempt took too long."""


class NotReady(Exception):
    """Something that the service stands on is not there; `checks` names each and what is wrong with it, or None."""

    def __init__(self, checks: Mapping[str, str | None]) -> None:
        super().__init__("; ".join(f"{name}: {reason}" for name, reason in checks.items() if reason))
        self.checks = checks


@attrs.frozen
class Kind:
    """
    A kind of problem.

    Attributes:
        name: The end of its `type`.
        title: The same for every problem of the kind.
        detail: Instead of the error's own message, where that is not meant for callers.
        members: What the problem says beyond the standard members.
        headers: What the answer carries beside it.
        is_ours: Whether the operator should read about it.
    """

    status: int
    name: str
    title: str
    detail: str | None = None
    members: Callable[[Any], Json] = lambda error: {}
    headers: Callable[[Any, Incoming], Mapping[str, str]] = lambda error, incoming: {}
    is_ours: bool = False

    @property
    def type(self) -> str:
        return TYPE_PREFIX + self.name


def _faults(error: library.ValidationError) -> Json:
    return {"errors": [{"path": _utf8(fault.path), "message": _utf8(fault.message)} for fault in error.errors]}


def _challenge(error: Exception, incoming: Incoming) -> Mapping[str, str]:
    """RFC 6750, section 3: a reason is given only to those who sent a token."""
    reason = ', error="invalid_token"' if incoming.sent_a_token else ""
    return {"WWW-Authenticate": f'Bearer realm="external-agents"{reason}'}


def _quotas(error: refusals.AdmissionRefused, incoming: Incoming) -> Mapping[str, str]:
    return quota_headers(error.quotas)


def _quotas_and_wait(error: refusals.RateLimited, incoming: Incoming) -> Mapping[str, str]:
    return {"Retry-After": str(error.retry_after_s), **quota_headers(error.quotas)}


def _of_invoked(error: AgentFailed, incoming: Incoming) -> Mapping[str, str]:
    return invoked_headers(error.invoked)


def _invocation(error: AgentFailed) -> Json:
    return {"invocation": invocation_json(error.invoked.invocation)}


def _invocation_id(error: library.Unavailable) -> Json:
    return {"invocation_id": str(error.invocation_id)} if error.invocation_id else {}


def _wait(error: Exception, incoming: Incoming) -> Mapping[str, str]:
    return {"Retry-After": str(getattr(error, "retry_after_s", RETRY_AFTER_S))}


def _own_headers(error: falcon.HTTPError, incoming: Incoming) -> Mapping[str, str]:
    return dict(error.headers or {})


def _checks(error: NotReady) -> Json:
    return {"checks": checks_json(error.checks)}


_INTERNAL = Kind(500, "internal", "Our fault", "Something went wrong that we did not foresee.", is_ours=True)

KINDS: Mapping[type[BaseException], Kind] = {
    library.MalformedJson: Kind(400, "malformed", "The body is not JSON"),
    library.ValidationError: Kind(400, "invalid", "The request is not valid", members=_faults),
    falcon.HTTPBadRequest: Kind(400, "bad-request", "The request is not valid"),
    library.Unauthenticated: Kind(
        401,
        "unauthenticated",
        "Authentication is required",
        "The credentials are missing, unknown, expired or revoked.",
        headers=_challenge,
    ),
    refusals.BudgetExceeded: Kind(402, "budget-exceeded", "The budget is exhausted", headers=_quotas),
    library.PermissionDenied: Kind(403, "not-permitted", "Not permitted"),
    library.NotFound: Kind(404, "not-found", "Not found"),
    falcon.HTTPRouteNotFound: Kind(404, "no-such-route", "Not found", "There is nothing at this path."),
    falcon.HTTPMethodNotAllowed: Kind(
        405, "method-not-allowed", "Method not allowed", "The header Allow names the methods.", headers=_own_headers
    ),
    BodyTooSlow: Kind(408, "too-slow", "The request came too slowly"),
    library.AgentInactive: Kind(409, "agent-inactive", "The agent is inactive"),
    refusals.IdempotencyKeyInFlight: Kind(
        409, "idempotency-key-in-flight", "The first invocation has not ended", headers=_wait
    ),
    library.IllegalTransition: Kind(409, "illegal-transition", "The status cannot change so"),
    library.StaleVersion: Kind(412, "stale-version", "The agent has changed"),
    falcon.HTTPContentTooLarge: Kind(413, "too-large", "The body is too large"),
    falcon.HTTPUnsupportedMediaType: Kind(
        415, "unsupported-media-type", "The body is not acceptable", headers=_own_headers
    ),
    refusals.IdempotencyKeyReused: Kind(422, "idempotency-key-reused", "The key came with another payload"),
    refusals.RateLimited: Kind(429, "rate-limited", "Too many invocations", headers=_quotas_and_wait),
    Exception: _INTERNAL,
    library.ExternalAgentsError: _INTERNAL,
    falcon.HTTPError: _INTERNAL,
    AgentFailed: Kind(502, "agent-failed", "The agent failed", members=_invocation, headers=_of_invoked),
    library.Unavailable: Kind(503, "unavailable", "Not available now", members=_invocation_id, headers=_wait),
    library.SecretUnreadable: Kind(
        503, "secret-unreadable", "Not available now", "A stored secret cannot be read.", headers=_wait, is_ours=True
    ),
    NotReady: Kind(503, "not-ready", "Not ready", members=_checks, headers=_wait),
    AgentTimedOut: Kind(504, "agent-timed-out", "The agent timed out", members=_invocation, headers=_of_invoked),
}


def kind_of(error: Exception) -> Kind:
    """Of the most specific class of `error` that the table knows."""
    return next(KINDS[cls] for cls in type(error).__mro__ if cls in KINDS)


async def answer_error(req: Request, resp: Response, error: Exception, params: Mapping[str, Any]) -> None:
    """Falcon's handler for every error."""
    kind, incoming = kind_of(error), incoming_of(req)
    if kind.is_ours:
        _log.error("%s %s failed (request %s)", req.method, req.uri_template, incoming.request_id, exc_info=error)
    resp.status = kind.status
    resp.content_type = PROBLEM_MEDIA_TYPE
    resp.data = encoded(
        {
            "type": kind.type,
            "title": kind.title,
            "status": kind.status,
            "detail": kind.detail or _message(error) or kind.title,
            **kind.members(error),
        }
    )
    for name, value in kind.headers(error, incoming).items():
        resp.set_header(name, value)


def checks_json(checks: Mapping[str, str | None]) -> Json:
    return {name: _utf8(reason) if reason else "ok" for name, reason in checks.items()}


def _message(error: Exception) -> str:
    return _utf8((error.description or "") if isinstance(error, falcon.HTTPError) else str(error))


def _utf8(text: str) -> str:
    """Names of parameters and fields come from callers; a lone surrogate in them has no UTF-8 form."""
    return text.encode("utf-8", "backslashreplace").decode()
