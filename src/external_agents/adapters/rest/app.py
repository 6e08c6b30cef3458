"""The API as one ASGI application."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import falcon
import falcon.asgi
from falcon.asgi import Request, Response

from external_agents.adapters.rest.asgi import Receive, Scope, Send
from external_agents.adapters.rest.body import GRACE_S
from external_agents.adapters.rest.docs import documentation_routes
from external_agents.adapters.rest.errors import answer_error
from external_agents.adapters.rest.health import Health, Readiness, Ready, always_ready
from external_agents.adapters.rest.incoming import Incoming, incoming_of
from external_agents.adapters.rest.metrics import Exposition, Metrics, RequestObserver, Tally
from external_agents.adapters.rest.openapi import openapi_document
from external_agents.adapters.rest.resources import Resource, api_routes
from external_agents.application.service import ExternalAgentService
from external_agents.domain.errors import ConfigurationError
from external_agents.ports.identity import Authenticator

BODY_LIMIT_BYTES = 1_048_576

LogContext: TypeAlias = Callable[..., AbstractContextManager[Any]]
"""Called with `request_id` and `trace_id`, and entered around it; as `structlog.contextvars.bound_contextvars`."""

_NOT_ASCII = re.compile(rb"[^\x00-\x7f]")


def create_app(
    service: ExternalAgentService,
    *,
    authenticator: Authenticator | None = None,
    readiness: Readiness = always_ready,
    body_limit_bytes: int = BODY_LIMIT_BYTES,
    body_grace_s: float = GRACE_S,
    log_context: LogContext = lambda **ids: nullcontext(),
    metrics: Exposition | None = None,
    on_request: RequestObserver = lambda method, route, status, duration_s: None,
) -> falcon.asgi.App[Request, Response]:
    """
    The API, its documentation and its health, as an ASGI app. It also mounts inside FastAPI or Starlette.

    The app opens and closes nothing: who opened the service drains and closes it, as `LifespanApp` can.

    Args:
        authenticator: Who recognises callers; the service's own by default.
        readiness: What `/readyz` asks: each thing that the service stands on, and what is wrong with it, or None.
        body_limit_bytes: The largest body of a request.
        body_grace_s: How long a body may take, beside a second for each `PACE_BYTES_PER_S` bytes that have come.
        log_context: Entered around every request with its ids.
        metrics: What `/metrics` shows to anybody; without it there is no such route.
        on_request: Told of every request.

    Raises:
        ConfigurationError: Nobody recognises callers, or the files of the documentation page are not installed.
    """
    authenticator = authenticator or service.authenticator
    if authenticator is None:
        raise ConfigurationError("The API needs an authenticator: the service has none, and none was given.")
    app = _App(
        body_limit_bytes, body_grace_s, log_context, on_request, middleware=[_Guard(authenticator), _CommonHeaders()]
    )
    app.req_options.strip_url_path_trailing_slash = True
    app.resp_options.default_media_type = falcon.MEDIA_JSON
    app.add_error_handler(Exception, answer_error)
    app.add_error_handler(falcon.HTTPError, answer_error)
    routes: dict[str, Resource] = {
        **api_routes(service),
        "/healthz": Health(),
        "/readyz": Ready(readiness),
        **documentation_routes(openapi_document(service.catalog, has_metrics=metrics is not None)),
    }
    if metrics is not None:
        routes["/metrics"] = Metrics(metrics)
    for template, resource in routes.items():
        app.add_route(template, resource)
    return app


class _App(falcon.asgi.App[Request, Response]):
    """Falcon's app, with what has to happen before it sees a request and after it has answered."""

    def __init__(
        self,
        body_limit_bytes: int,
        body_grace_s: float,
        log_context: LogContext,
        on_request: RequestObserver,
        *,
        middleware: list[Any],
    ) -> None:
        super().__init__(middleware=middleware)
        self._body_limit_bytes = body_limit_bytes
        self._body_grace_s = body_grace_s
        self._log_context = log_context
        self._on_request = on_request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # type: ignore[override]
        if scope["type"] == "http":
            incoming = Incoming(scope, receive, self._body_limit_bytes, self._body_grace_s)
            tally = Tally(self._on_request, incoming, send)
            with self._log_context(request_id=incoming.request_id, trace_id=incoming.trace_id):
                try:
                    await super().__call__(_mended(scope, incoming), incoming.body.opening, tally.send)
                finally:
                    tally.end()
            await incoming.body.drain()
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close"})
        else:
            await super().__call__(scope, receive, send)


def _mended(scope: Scope, incoming: Incoming) -> Scope:
    """
    The scope as the framework expects it, and with what is known: the path below the mount point, the query in ASCII.

    `path` holds `root_path` in ASGI's present wording and does not in its older one; both are met.
    """
    mended = incoming.enter(scope)
    root_path = scope.get("root_path", "").rstrip("/")
    below = scope["path"].removeprefix(root_path)
    mended["root_path"] = root_path
    if root_path and (below.startswith("/") or not below):
        mended["path"] = below
    mended["query_string"] = _NOT_ASCII.sub(lambda byte: b"%%%02X" % byte[0][0], scope.get("query_string", b""))
    return mended


class _Guard:
    """Lets nobody without credentials near a resource, unless it is open to anybody."""

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    async def process_resource(self, req: Request, resp: Response, resource: Resource, params: dict[str, Any]) -> None:
        incoming = incoming_of(req)
        incoming.route = req.uri_template
        is_allowed = req.method in resource.methods or req.method == "OPTIONS"
        if is_allowed:
            incoming.method = req.method
        if not resource.is_open:
            incoming.principal = await self._authenticator.authenticate(incoming.bearer_token())
        if not is_allowed:
            raise falcon.HTTPMethodNotAllowed(resource.methods)


class _CommonHeaders:
    async def process_response(
        self, req: Request, resp: Response, resource: Resource | None, req_succeeded: bool
    ) -> None:
        incoming = incoming_of(req)
        await incoming.body.skip_arrived()
        resp.set_header("X-Request-Id", incoming.request_id)
        resp.set_header("X-Content-Type-Options", "nosniff")
        resp.set_header("Cache-Control", "no-store")
        if incoming.body.spoils_connection and req.scope.get("http_version", "1.1").startswith("1"):
            resp.set_header("Connection", "close")
