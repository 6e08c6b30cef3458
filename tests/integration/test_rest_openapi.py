"""The document describes the API that there is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import falcon.inspect
import jsonschema
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from external_agents.adapters.rest.errors import KINDS
from external_agents.adapters.rest.openapi import openapi_document
from external_agents.domain.auth import AuthScheme, FixedHeaders
from external_agents.domain.catalog import BUILT_IN
from external_agents.domain.platform import Platform
from external_agents.testing.fakes import Gate
from rest_api import AGENT, AGENTS, REFUSED, TIMED_OUT, UNKNOWN_ID, Api

DOCUMENT = openapi_document(BUILT_IN)
SOMETIMES = {"ratelimit", "ratelimit-policy", "idempotent-replayed"}
"""Header fields that depend on the agent's limits, and on what was asked before."""


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in DOCUMENT["paths"].items():
        for method, operation in item.items():
            if method != "parameters":
                yield method.upper(), path, operation


def resolved(node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        target: Any = DOCUMENT
        for part in node["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        node = target
    return node


def check(value: Any, schema: Any) -> None:
    whole = {"allOf": [schema], "components": DOCUMENT["components"]}
    jsonschema.Draft202012Validator(whole, format_checker=jsonschema.FormatChecker()).validate(value)


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    async with Api() as api:
        yield api


async def test_it_is_valid_and_served(api: Api) -> None:
    OpenAPIV31SpecValidator(DOCUMENT).validate()
    answer = await api.call("GET", "/openapi.json", key=None)
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == DOCUMENT


def test_every_route_is_in_it_and_nothing_else() -> None:
    routed = {
        (method.method, route.path)
        for route in falcon.inspect.inspect_routes(Api().app)
        for method in route.methods
        if not method.internal and method.method not in {"HEAD", "OPTIONS", "WEBSOCKET"}
    }
    assert routed == {(method, path) for method, path, _ in operations()}


def test_who_may_call_it() -> None:
    for _, path, operation in operations():
        assert operation["security"] == ([{"bearer": []}] if path.startswith(AGENTS) else [])


def test_ids_are_unique() -> None:
    ids = [operation["operationId"] for _, _, operation in operations()]
    assert len(set(ids)) == len(ids)


def test_nothing_refers_outside() -> None:
    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    assert all(reference.startswith("#/components/") for reference in references(DOCUMENT))


def media_types() -> Iterator[tuple[str, Any, Any]]:
    for method, path, operation in operations():
        contents = [operation.get("requestBody", {}).get("content", {})]
        contents += [resolved(response).get("content", {}) for response in operation["responses"].values()]
        for content in contents:
            for media in content.values():
                examples = {**media.get("examples", {}), **({"": media} if "example" in media else {})}
                for name, example in examples.items():
                    yield f"{method} {path} {name}", example.get("value", example.get("example")), media["schema"]


def test_every_example_fits_its_schema() -> None:
    checked = 0
    for name, example, schema in media_types():
        check(example, schema)
        checked += name != ""
    assert checked > 50
    for schema in DOCUMENT["components"]["schemas"].values():
        for example in schema.get("examples", ()):
            check(example, schema)


CREATE = DOCUMENT["paths"][AGENTS]["post"]["requestBody"]["content"]["application/json"]


def test_there_is_an_example_of_each_auth_type_and_provider() -> None:
    values = [example["value"] for example in CREATE["examples"].values()]
    assert {value["auth_type"] for value in values} == set(BUILT_IN.auth_schemes)
    assert {value["provider"] for value in values} == set(BUILT_IN.platforms)


@pytest.mark.parametrize("name", CREATE["examples"])
async def test_the_examples_work_as_they_are(api: Api, name: str) -> None:
    created = await api.call("POST", AGENTS, json=CREATE["examples"][name]["value"])
    assert created.status_code == 201, created.text
    path = f"{AGENTS}/{created.json()['id']}"
    for example in DOCUMENT["paths"][f"{AGENTS}/{{agent_id}}"]["patch"]["requestBody"]["content"].values():
        for patch in example["examples"].values():
            assert (await api.call("PATCH", path, json=patch["value"])).status_code == 200


def test_wrong_agents_do_not_fit() -> None:
    wrong = [
        {},
        {**AGENT, "colour": "red"},
        {**AGENT, "auth_config": {"token": "x"}},
        {**AGENT, "provider": "teams"},
        {**AGENT, "provider": "teams", "platform_config": {"channel_id": "c"}},
        {**AGENT, "auth_type": "fax"},
        {name: value for name, value in AGENT.items() if name != "auth_config"},
        {**AGENT, "timeout_s": 31},
        {**AGENT, "rate_limit_config": {"requests_per_minute": -1}},
    ]
    check(AGENT, CREATE["schema"])
    for document in wrong:
        with pytest.raises(jsonschema.ValidationError):
            check(document, CREATE["schema"])


def test_secrets_are_written_only() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    for name, scheme in BUILT_IN.auth_schemes.items():
        for field in scheme.secret_fields - {"*"}:
            assert schemas[f"auth_config.{name}"]["properties"][field]["writeOnly"]
            assert field not in schemas[f"auth_config.{name}.shown"]["properties"]
    for name, platform in BUILT_IN.platforms.items():
        for field in platform.secret_fields:
            assert schemas[f"platform_config.{name}"]["properties"][field]["writeOnly"]
            assert field not in schemas[f"platform_config.{name}.shown"]["properties"]
    for written in ("AgentToCreate", "AgentPatch"):
        assert schemas[written]["properties"]["signing_secret"]["writeOnly"]
    assert "signing_secret" not in schemas["Agent"]["properties"]


def test_every_kind_of_problem_is_named() -> None:
    assert set(DOCUMENT["components"]["schemas"]["Problem"]["properties"]["type"]["enum"]) == {
        kind.type for kind in KINDS.values()
    }


async def test_answers_fit(api: Api) -> None:
    """One of every kind, against the schema that the document gives for its route and status."""
    limits = {"requests_per_minute": 2}
    created = [await api.call("POST", AGENTS, json=example["value"]) for example in CREATE["examples"].values()]
    agents = [answer.json() for answer in created]
    agent = await api.create(rate_limit_config=limits, budget_config={"max_cost_per_invocation": 0.1})
    invoked = await api.invoke(agent)
    api.transport.script.extend([REFUSED])
    one, invoke = f"{AGENTS}/{{agent_id}}", f"{AGENTS}/{{agent_id}}/invoke"
    invocations = f"{AGENTS}/{{agent_id}}/invocations"
    answers = [
        ("POST", invoke, invoked),
        ("POST", invoke, await api.invoke(agent)),
        ("POST", invoke, await api.invoke(agent)),
        ("POST", AGENTS, await api.call("POST", AGENTS, json=AGENT)),
        ("POST", AGENTS, await api.call("POST", AGENTS, json={})),
        ("POST", AGENTS, await api.call("POST", AGENTS, content=b"{}")),
        ("POST", AGENTS, await api.call("POST", AGENTS, key=None)),
        ("POST", AGENTS, await api.call("POST", AGENTS, key=api.key_for("acme", []), json=AGENT)),
        ("GET", AGENTS, await api.call("GET", f"{AGENTS}?limit=100")),
        ("GET", f"{AGENTS}/invocations", await api.call("GET", f"{AGENTS}/invocations?limit=1")),
        ("GET", one, await api.call("GET", f"{AGENTS}/{UNKNOWN_ID}")),
        *[("GET", one, await api.call("GET", f"{AGENTS}/{each['id']}")) for each in agents],
        ("PATCH", one, await api.call("PATCH", f"{AGENTS}/{agent['id']}", json={}, headers={"If-Match": '"9"'})),
        ("GET", invocations, await api.call("GET", f"{AGENTS}/{agent['id']}/invocations")),
        (
            "GET",
            f"{invocations}/{{invocation_id}}",
            await api.call("GET", f"{AGENTS}/{agent['id']}/invocations/{invoked.json()['id']}"),
        ),
        ("GET", f"{one}/usage", await api.call("GET", f"{AGENTS}/{agent['id']}/usage")),
        *[("GET", f"{one}/usage", await api.call("GET", f"{AGENTS}/{each['id']}/usage")) for each in agents],
        ("GET", "/healthz", await api.call("GET", "/healthz")),
        ("GET", "/readyz", await api.call("GET", "/readyz")),
    ]
    api.checks["keys"] = "are missing"
    answers.append(("GET", "/readyz", await api.call("GET", "/readyz")))
    keyed = {"headers": {"Idempotency-Key": "k"}}
    answers += [("POST", invoke, await api.invoke(agents[1], **keyed)) for _ in range(2)]
    answers.append(("POST", invoke, await api.invoke(agents[1], **keyed, json="another")))
    api.transport.otherwise = TIMED_OUT
    answers += [("POST", invoke, await api.invoke(agents[0], **keyed)) for _ in range(2)]
    gate = Gate()
    api.transport.script.append(gate)
    running = asyncio.create_task(api.invoke(agents[2], **keyed))
    await gate.entered.wait()
    answers.append(("POST", invoke, await api.invoke(agents[2], **keyed)))
    gate.opened.set()
    await running
    assert {200, 201, 400, 401, 403, 404, 409, 412, 415, 422, 429, 502, 503, 504} == {
        answer.status_code for _, _, answer in answers
    }
    for method, path, answer in answers:
        response = resolved(DOCUMENT["paths"][path][method.lower()]["responses"][str(answer.status_code)])
        check(answer.json(), response["content"][answer.headers["content-type"]]["schema"])
        documented = {header.lower() for header in response.get("headers", {})}
        assert documented - SOMETIMES <= set(answer.headers), (method, path, answer.status_code)
        assert set(answer.headers) & SOMETIMES <= documented, (method, path, answer.status_code)
    shown = DOCUMENT["components"]["schemas"]["Agent"]["properties"]
    assert set(shown) == set(agent)
    assert set(DOCUMENT["components"]["schemas"]["Invocation"]["properties"]) == set(invoked.json())


def test_what_is_registered_later_is_in_it_too() -> None:
    scheme = AuthScheme(
        auth_type="acme/hmac",
        schema={"type": "object", "properties": {"seed": {"type": "string"}}, "required": ["seed"]},
        secret_fields=frozenset({"seed"}),
        credentials=lambda config: FixedHeaders({}),
    )
    platform = Platform(provider="irc", schema={"type": "object", "properties": {"channel": {"type": "string"}}})
    document = openapi_document(BUILT_IN.extended([scheme], [platform]))
    OpenAPIV31SpecValidator(document).validate()
    assert document["components"]["schemas"]["auth_config.acme_hmac.shown"]["properties"] == {}
    parameters = {each["name"]: each for each in document["paths"][AGENTS]["get"]["parameters"]}
    assert "irc" in parameters["provider"]["schema"]["enum"]
