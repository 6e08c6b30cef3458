"""What is known of a request before it is routed: its ids, its credentials, its body."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from typing import Final

from falcon.asgi import Request

from external_agents.adapters.rest.asgi import Fields, Receive, Scope, fields_of
from external_agents.adapters.rest.body import RequestBody
from external_agents.domain.access import Principal
from external_agents.domain.errors import Unauthenticated

_KEY: Final = "external_agents.incoming"

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_TRACEPARENT = re.compile(
    rb"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<parent>[0-9a-f]{16})-[0-9a-f]{2}(?P<more>-.*)?"
)
_BEARER = re.compile(rb"bearer(?: +(?P<token>.*))?", re.IGNORECASE | re.DOTALL)
_TOKEN68 = re.compile(rb"[A-Za-z0-9\-._~+/]+=*")


class Incoming:
    """
    One request.

    Attributes:
        fields: Of its head.
        request_id: The caller's X-Request-Id where it has a sane one, else a new one.
        trace_id: Of the caller's traceparent where it has a valid one, else a new one.
        principal: Who is asking, once that is known.
        route: The template of the route that it matched, once that is known.
        method: Its method, once it is known to be one that the route has.
    """

    __slots__ = ("body", "fields", "method", "principal", "request_id", "route", "trace_id")

    def __init__(self, scope: Scope, receive: Receive, body_limit_bytes: int, body_grace_s: float) -> None:
        self.fields: Fields = fields_of(scope)
        self.body = RequestBody(self.fields, receive, body_limit_bytes, body_grace_s)
        self.principal: Principal | None = None
        self.route: str | None = None
        self.method: str | None = None
        new_ids = secrets.token_hex(32)
        self.request_id = _request_id(self.fields.get(b"x-request-id", ())) or new_ids[:32]
        self.trace_id = _trace_id(self.fields.get(b"traceparent", ())) or new_ids[32:]

    def enter(self, scope: Scope) -> Scope:
        """A copy of `scope` with this request in it, for `incoming_of`."""
        return {**scope, _KEY: self}

    @property
    def sent_a_token(self) -> bool:
        """Whether a bearer token was sent, of whatever form."""
        return any(match and match["token"] for match in map(_BEARER.fullmatch, self._authorizations))

    @property
    def _authorizations(self) -> Sequence[bytes]:
        return self.fields.get(b"authorization", ())

    def bearer_token(self) -> str:
        """
        The token of the Authorization field (RFC 6750, section 2.1).

        Raises:
            Unauthenticated: There is not exactly one.
        """
        sent = self._authorizations
        match = _BEARER.fullmatch(sent[0].strip()) if len(sent) == 1 else None
        if match is None or not _TOKEN68.fullmatch(match["token"] or b""):
            raise Unauthenticated("There is no bearer token.")
        return match["token"].decode("ascii")


def incoming_of(req: Request) -> Incoming:
    incoming: Incoming = req.scope[_KEY]
    return incoming


def principal_of(req: Request) -> Principal:
    """Who is asking; on a route that is open to anybody there is nobody to ask for."""
    principal = incoming_of(req).principal
    assert principal is not None, "the route is guarded"
    return principal


def _request_id(values: Sequence[bytes]) -> str | None:
    if len(values) == 1 and _REQUEST_ID.fullmatch(values[0]):
        return values[0].decode("ascii")
    return None


def _trace_id(values: Sequence[bytes]) -> str | None:
    """
    The trace id of a traceparent (W3C Trace Context, section 3.2).

    A version that we do not know is read as version 00, with more behind it.
    """
    match = _TRACEPARENT.fullmatch(values[0]) if len(values) == 1 else None
    if match is None or match["version"] == b"ff" or (match["version"] == b"00" and match["more"] is not None):
        return None
    if not match["trace"].strip(b"0") or not match["parent"].strip(b"0"):
        return None
    return match["trace"].decode("ascii")
