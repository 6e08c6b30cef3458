"""The routes of the API: translate, call, translate."""

from __future__ import annotations

from functools import cached_property, partial
from typing import ClassVar

import falcon
from falcon.asgi import Request, Response

from external_agents.adapters.rest.errors import AgentFailed
from external_agents.adapters.rest.incoming import incoming_of, principal_of
from external_agents.adapters.rest.queries import INVOCATION_FILTERS, Query, agent_filters
from external_agents.adapters.rest.representations import (
    Json,
    agent_json,
    agent_page_json,
    encoded,
    invocation_json,
    invocation_page_json,
    invoked_headers,
    usage_json,
)
from external_agents.adapters.rest.requests import (
    demanded_versions,
    document_of,
    has_version,
    id_of,
    idempotency_key_of,
    lineage_hop_id_of,
    payload_of,
    with_header_names,
)
from external_agents.application.service import ExternalAgentService
from external_agents.domain.agent import ExternalAgent
from external_agents.domain.errors import ValidationError
from external_agents.domain.invocation import InvocationStatus

API_PREFIX = "/api/external-agents"


class Resource:
    """What a route leads to. `is_open`: to anybody, without credentials."""

    is_open: ClassVar[bool] = False

    @cached_property
    def methods(self) -> tuple[str, ...]:
        return tuple(method for method in falcon.HTTP_METHODS if hasattr(self, f"on_{method.lower()}"))


class ServiceResource(Resource):
    def __init__(self, service: ExternalAgentService) -> None:
        self._service = service


class Agents(ServiceResource):
    @cached_property
    def _filters(self) -> frozenset[str]:
        return frozenset(agent_filters(self._service.catalog))

    async def on_get(self, req: Request, resp: Response) -> None:
        page = await Query.of(req, self._filters).ask(partial(self._service.list_agents, principal_of(req)))
        show(resp, agent_page_json(page))

    on_head = on_get

    async def on_post(self, req: Request, resp: Response) -> None:
        agent = await self._service.create_agent(principal_of(req), await document_of(req))
        resp.status = falcon.HTTP_201
        resp.location = f"{req.root_path}{API_PREFIX}/{agent.id}"
        show_agent(resp, agent)


class Agent(ServiceResource):
    async def on_get(self, req: Request, resp: Response, agent_id: str) -> None:
        agent = await self._service.get_agent(principal_of(req), id_of(agent_id))
        show_agent(resp, agent)
        if has_version(req, agent.version):
            resp.status = falcon.HTTP_304

    on_head = on_get

    async def on_patch(self, req: Request, resp: Response, agent_id: str) -> None:
        patch = await document_of(req)
        agent = await self._service.update_agent(
            principal_of(req), id_of(agent_id), patch, if_version=demanded_versions(req)
        )
        show_agent(resp, agent)

    async def on_delete(self, req: Request, resp: Response, agent_id: str) -> None:
        await self._service.delete_agent(principal_of(req), id_of(agent_id), if_version=demanded_versions(req))
        resp.status = falcon.HTTP_204


class Invoke(ServiceResource):
    async def on_post(self, req: Request, resp: Response, agent_id: str) -> None:
        payload = await payload_of(req)
        try:
            invoked = await self._service.invoke(
                principal_of(req),
                id_of(agent_id),
                payload,
                trace_id=incoming_of(req).trace_id,
                lineage_hop_id=lineage_hop_id_of(req),
                idempotency_key=idempotency_key_of(req),
            )
        except ValidationError as invalid:
            raise with_header_names(invalid) from None
        if invoked.invocation.status is not InvocationStatus.SUCCEEDED:
            raise AgentFailed.of(invoked)
        resp.set_headers(invoked_headers(invoked))
        show(resp, invocation_json(invoked.invocation))


class Usage(ServiceResource):
    async def on_get(self, req: Request, resp: Response, agent_id: str) -> None:
        show(resp, usage_json(await self._service.get_usage(principal_of(req), id_of(agent_id))))

    on_head = on_get


class OrganisationInvocations(ServiceResource):
    async def on_get(self, req: Request, resp: Response) -> None:
        use_case = partial(self._service.list_invocations, principal_of(req))
        show(resp, invocation_page_json(await Query.of(req, INVOCATION_FILTERS).ask(use_case)))

    on_head = on_get


class AgentInvocations(ServiceResource):
    async def on_get(self, req: Request, resp: Response, agent_id: str) -> None:
        use_case = partial(self._service.list_invocations, principal_of(req), id_of(agent_id))
        show(resp, invocation_page_json(await Query.of(req, INVOCATION_FILTERS).ask(use_case)))

    on_head = on_get


class Invocation(ServiceResource):
    async def on_get(self, req: Request, resp: Response, agent_id: str, invocation_id: str) -> None:
        invocation = await self._service.get_invocation(principal_of(req), id_of(agent_id), id_of(invocation_id))
        show(resp, invocation_json(invocation))

    on_head = on_get


def api_routes(service: ExternalAgentService) -> dict[str, Resource]:
    """The resources by path template; a fixed path goes before one with a variable in its place."""
    return {
        API_PREFIX: Agents(service),
        f"{API_PREFIX}/invocations": OrganisationInvocations(service),
        f"{API_PREFIX}/{{agent_id}}": Agent(service),
        f"{API_PREFIX}/{{agent_id}}/invoke": Invoke(service),
        f"{API_PREFIX}/{{agent_id}}/usage": Usage(service),
        f"{API_PREFIX}/{{agent_id}}/invocations": AgentInvocations(service),
        f"{API_PREFIX}/{{agent_id}}/invocations/{{invocation_id}}": Invocation(service),
    }


def show(resp: Response, document: Json) -> None:
    resp.content_type = falcon.MEDIA_JSON
    resp.data = encoded(document)


def show_agent(resp: Response, agent: ExternalAgent) -> None:
    resp.set_header("ETag", f'"{agent.version}"')
    show(resp, agent_json(agent))
