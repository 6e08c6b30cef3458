"""The documents say what the code says: generated parts, links, code blocks, and examples that run."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any, NamedTuple

import psycopg
import pytest

from external_agents import JsonText, Outcome, Principal
from external_agents.adapters.abac import CedarPolicies, CedarPolicyDecisionPoint
from external_agents.adapters.memory import FunctionTransport, SystemClock, memory_service
from external_agents.adapters.postgres.tables import metadata
from external_agents.adapters.rest.openapi import openapi_document
from external_agents.adapters.webhook.transport import WebhookTransport
from external_agents.bootstrap import discover_catalog
from external_agents.domain.access import PERMISSIONS, AccessRequest, Action
from external_agents.domain.agent import ExternalAgent
from external_agents.domain.catalog import BUILT_IN
from external_agents.domain.egress import EgressPolicy
from external_agents.domain.signing import SigningSecrets
from external_agents.ports.transport import AgentRequest
from external_agents.settings import Settings, variable_of
from external_agents.testing.builders import make_agent

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md")])
SECRET_KEYS = "k1:" + "A" * 43 + "="
TIMEOUT_S = 60.0

_FENCE = re.compile(r"^```(?P<language>[\w-]*)(?P<options>[^\n]*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
_NOTHING_IN_A_NAME = re.compile(r"[^\w\- ]")
_POSTED = re.compile(r"-d '(?P<body>[^']*)'")


class Block(NamedTuple):
    document: Path
    language: str
    options: str
    text: str

    @property
    def place(self) -> str:
        line = self.document.read_text(encoding="utf-8").partition(self.text)[0].count("\n") + 1
        return f"{self.document.relative_to(ROOT)}:{line}"


def blocks(*languages: str, of: Path | None = None) -> list[Block]:
    return [block for block in _blocks() if block.language in languages and of in {None, block.document}]


def _blocks() -> Iterator[Block]:
    for document in DOCUMENTS:
        for fence in _FENCE.finditer(document.read_text(encoding="utf-8")):
            yield Block(document, fence["language"], fence["options"].strip(), fence["text"])


def files_of(document: str) -> dict[str, str]:
    """The blocks of a document that are files, by their names."""
    return {
        block.options.removeprefix("file="): block.text
        for block in _blocks()
        if block.document == DOCS / document and block.options.startswith("file=")
    }


def anchors_of(document: Path) -> set[str]:
    """As GitHub and most renderers make them of headings."""
    text = _FENCE.sub("", document.read_text(encoding="utf-8"))
    headings = (_NOTHING_IN_A_NAME.sub("", heading.replace("`", "").lower()) for heading in _HEADING.findall(text))
    return {heading.replace(" ", "-") for heading in headings}


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_generated_parts_are_up_to_date(generator: ModuleType, document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert generator.filled(text) == text, "run: python docs/generate.py"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_generated_part_is_closed(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert text.count("<!-- generated: ") == text.count("<!-- end -->")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(document: Path) -> None:
    broken = []
    for link in _LINK.finditer(_FENCE.sub("", document.read_text(encoding="utf-8"))):
        path, _, anchor = link["target"].partition("#")
        if path.startswith(("http://", "https://")):
            continue
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link["target"])
    assert broken == []


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.place)
def test_python_parses(block: Block) -> None:
    compile(block.text, block.place, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST)


@pytest.mark.parametrize("block", blocks("json"), ids=lambda block: block.place)
def test_json_parses(block: Block) -> None:
    json.loads(block.text)


@pytest.mark.parametrize("block", blocks("toml"), ids=lambda block: block.place)
def test_toml_parses(block: Block) -> None:
    tomllib.loads(block.text)


@pytest.mark.parametrize("block", blocks("sh"), ids=lambda block: block.place)
def test_shell_parses(block: Block) -> None:
    checked = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("block", blocks("sh"), ids=lambda block: block.place)
def test_bodies_that_are_posted_are_json(block: Block) -> None:
    for posted in _POSTED.finditer(block.text):
        body = json.loads(posted["body"])
        if isinstance(body, dict) and "provider" in body:
            assert not BUILT_IN.agent_faults(body, EgressPolicy.parse("loopback"))


@pytest.mark.parametrize(
    "block", [block for block in blocks("sql") if "CREATE DATABASE" not in block.text], ids=lambda block: block.place
)
def test_sql_runs(block: Block, postgres_url: str) -> None:
    with psycopg.connect(postgres_url.replace("+psycopg", "")) as connection:
        connection.execute(block.text.encode())
        connection.rollback()  # Roles are the server's, which other tests use.


def test_every_operation_has_its_place() -> None:
    text = (DOCS / "05-infrastructure/external-agents-api.md").read_text(encoding="utf-8")
    for path, item in openapi_document(BUILT_IN)["paths"].items():
        for operation in item.values():
            if isinstance(operation, dict) and operation["tags"] != ["service"]:
                assert f"<!-- generated: operation {operation['operationId']} -->" in text, path


def test_every_auth_type_and_platform_has_its_place() -> None:
    text = (DOCS / "05-infrastructure/external-agents-api.md").read_text(encoding="utf-8")
    for auth_type in BUILT_IN.auth_schemes:
        assert f"<!-- generated: auth_config {auth_type} -->" in text
    for provider in BUILT_IN.platforms:
        assert f"<!-- generated: platform_config {provider} -->" in text


def test_every_table_has_its_place() -> None:
    text = (DOCS / "05-infrastructure/external-agents-models.md").read_text(encoding="utf-8")
    for table in metadata.tables:
        assert f"<!-- generated: columns {table} -->" in text


def test_every_setting_has_its_section() -> None:
    as_attrs: Any = Settings
    anchors = anchors_of(DOCS / "reference/settings.md")
    for field in as_attrs.__attrs_attrs__:
        assert variable_of(field.name).lower() in anchors


def test_every_command_has_its_section(generator: ModuleType) -> None:
    text = (DOCS / "reference/cli.md").read_text(encoding="utf-8")
    for name, _ in generator._commands():
        assert f"\n## external-agents {name}\n\n<!-- generated: command {name.replace(' ', '.')} -->" in text


def test_examples_in_schemas_are_valid() -> None:
    for auth_type, scheme in BUILT_IN.auth_schemes.items():
        for example in scheme.schema["examples"]:
            assert BUILT_IN.auth_faults(auth_type, example, EgressPolicy(), "") == []
    for provider, platform in BUILT_IN.platforms.items():
        for example in platform.schema["examples"]:
            assert BUILT_IN.platform_faults(provider, example, EgressPolicy(), "") == []


# Examples that run.


def run(folder: Path, *command: str, **environment: str) -> str:
    """What a program of an example prints. It must end well."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def written(folder: Path, document: str) -> None:
    for name, text in files_of(document).items():
        (folder / name).write_text(text, encoding="utf-8")


def test_the_example_in_memory_runs(tmp_path: Path) -> None:
    written(tmp_path, "how-to/embed-as-a-library.md")
    assert run(tmp_path, "in_memory.py") == "succeeded HELLO 0.02 USD\n"


def test_the_example_of_a_safe_retry_runs(tmp_path: Path) -> None:
    written(tmp_path, "how-to/retry-safely.md")
    [shown] = blocks("text", of=DOCS / "how-to/retry-safely.md")
    assert run(tmp_path, "once.py") == shown.text


async def test_the_example_of_an_agent_that_verifies_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, "how-to/verify-signatures.md")
    secret, other = (f"whsec_{letter * 32}" for letter in "AB")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SIGNING_SECRET", secret)
    receiver = importlib.import_module("receiver")
    monkeypatch.setattr(receiver.Agent, "log_message", lambda *_: None)
    policy = EgressPolicy.parse("loopback")
    transport = WebhookTransport(policy, answer_limit_bytes=10_000, clock=SystemClock())
    service = memory_service(transport, url_rules=policy)
    principal = Principal("acme", "tester", PERMISSIONS)
    with receiver.HTTPServer(("127.0.0.1", 0), receiver.Agent) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/"
            document = {"name": "A", "provider": "custom", "webhook_url": url, "auth_type": "none"}
            agent = await service.create_agent(principal, {**document, "signing_secret": other})
            assert (await service.invoke_agent(principal, agent.id, "hello")).response_status == 401
            await service.update_agent(principal, agent.id, {"signing_secret": secret})
            answer = (await service.invoke_agent(principal, agent.id, "hello")).response
            assert answer is not None
            assert answer.value == {"heard": "hello"}
        finally:
            await transport.aclose()
            server.shutdown()
            thread.join()


def test_the_example_of_verifying_without_a_library_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, "how-to/verify-signatures.md")
    monkeypatch.syspath_prepend(str(tmp_path))
    is_genuine = importlib.import_module("verify").is_genuine
    first, second, third = (f"whsec_{letter * 32}" for letter in "ABC")
    rotated = SigningSecrets(first).replaced_by(second, datetime.now(UTC))
    assert rotated is not None
    headers = rotated.headers("018f", b"{}", datetime.now(UTC))
    assert [is_genuine(secret, headers, b"{}") for secret in (first, second, third)] == [True, True, False]
    assert not is_genuine(first, headers, b"[]")
    assert not is_genuine(first, {**headers, "webhook-id": "018e"}, b"{}")
    for minutes in (-6, 6):
        late = rotated.headers("018f", b"{}", datetime.now(UTC) + timedelta(minutes=minutes))
        assert not is_genuine(second, late, b"{}")
    for name in headers:
        assert not is_genuine(first, {**headers, name: ""}, b"{}")
        assert not is_genuine(first, {key: value for key, value in headers.items() if key != name}, b"{}")


def test_the_example_with_own_adapters_runs(tmp_path: Path, postgres_url: str) -> None:
    written(tmp_path, "how-to/embed-as-a-library.md")
    assert run(tmp_path, "own_adapters.py", DATABASE_URL=postgres_url, SECRET_KEYS=SECRET_KEYS) == "0 1\n"


def test_the_example_of_a_host_application_runs(tmp_path: Path, postgres_url: str) -> None:
    written(tmp_path, "how-to/embed-as-a-library.md")
    (tmp_path / "call.py").write_text(
        """
from starlette.testclient import TestClient

from host_app import app

with TestClient(app) as client:
    path = "/agents/api/external-agents"
    print(client.get(path).status_code)
    print(client.get(path, headers={"Authorization": "Bearer host-token"}).json()["total"])
    print(client.get("/agents/readyz").json()["checks"])
    print(client.get("/agents/docs").status_code)
"""
    )
    printed = run(
        tmp_path,
        "call.py",
        HOST_TOKEN="host-token",
        EXTERNAL_AGENTS_DATABASE_URL=postgres_url,
        EXTERNAL_AGENTS_SECRET_KEYS=SECRET_KEYS,
    )
    assert printed.splitlines() == ["401", "0", "{'host': 'ok'}", "200"]


def test_the_example_of_a_contract_suite_runs(tmp_path: Path) -> None:
    written(tmp_path, "how-to/embed-as-a-library.md")
    options = ("-q", "-p", "no:cacheprovider", "-o", "asyncio_mode=auto", "--rootdir", str(tmp_path))
    assert " passed" in run(tmp_path, "-m", "pytest", *options, "test_my_policy.py")


def test_the_example_of_an_observability_manager_runs(tmp_path: Path) -> None:
    written(tmp_path, "how-to/observe.md")
    printed = run(tmp_path, "counting.py").splitlines()
    assert printed[-1] == "{'allowed': 2, 'invocation succeeded': 1}"


async def test_an_auth_type_and_a_platform_come_by_entry_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package of the example, installed as an installer leaves it, found as `serve` finds it, and used."""
    written(tmp_path, "how-to/add-an-auth-type-or-platform.md")
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installed = tmp_path / f"acme_agents-{project['version']}.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    entry_points = [
        line
        for group, entries in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {target}" for name, target in entries.items()))
    ]
    (installed / "entry_points.txt").write_text("\n".join(entry_points))
    monkeypatch.syspath_prepend(str(tmp_path))
    sent: list[AgentRequest] = []

    async def answer(request: AgentRequest) -> Outcome:
        sent.append(request)
        return Outcome(status=200, answer=JsonText.of("done"))

    catalog = discover_catalog()
    [document] = [
        json.loads(block.text) for block in blocks("json", of=DOCS / "how-to/add-an-auth-type-or-platform.md")
    ]
    service = memory_service(FunctionTransport(answer), catalog=catalog)
    principal = Principal("acme", "tester", PERMISSIONS)
    agent = await service.create_agent(principal, document)
    await service.invoke_agent(principal, agent.id, None)
    assert agent.auth_config == {"key_id": "k-1"}
    assert agent.platform_config == {}
    [request] = sent
    assert getattr(request.credentials, "headers", {}) == {
        "X-Acme-Key": "k-1",
        "X-Acme-Secret": document["auth_config"]["secret"],
    }
    assert "acme_pair" in json.dumps(openapi_document(catalog))


class TestPolicies:
    """The examples, loaded together: they parse, validate, and do what is said of them."""

    DAY = datetime(2026, 8, 1, 12, tzinfo=UTC)

    @pytest.fixture
    def pdp(self, tmp_path: Path) -> CedarPolicyDecisionPoint:
        written(tmp_path, "how-to/write-policies.md")
        policies = CedarPolicies.load(tmp_path)
        assert len(policies.loaded) == len(CedarPolicies.load().loaded) + len(list(tmp_path.glob("*.cedar")))
        return CedarPolicyDecisionPoint(policies)

    @pytest.mark.parametrize(
        ("attributes", "action", "agent", "at", "allowed"),
        [
            ({"team": "ops"}, Action.CREATE, None, DAY, True),
            ({"team": "dev"}, Action.CREATE, None, DAY, False),
            ({}, Action.CREATE, None, DAY, False),
            ({}, Action.READ, None, DAY, True),
            ({"project": "p"}, Action.READ, {"tags": ("p", "q")}, DAY, True),
            ({"project": "p"}, Action.INVOKE, {"tags": ("q",)}, DAY, False),
            ({"project": "p"}, Action.READ, None, DAY, True),
            ({}, Action.INVOKE, {"provider": "telegram"}, DAY, True),
            ({}, Action.INVOKE, {"provider": "telegram"}, DAY.replace(month=6), False),
            ({}, Action.UPDATE, {}, DAY, True),
            ({}, Action.UPDATE, {}, DAY.replace(hour=23), False),
        ],
    )
    async def test_they_do_what_is_said_of_them(
        self,
        pdp: CedarPolicyDecisionPoint,
        attributes: dict[str, str],
        action: Action,
        agent: dict[str, Any] | None,
        at: datetime,
        allowed: bool,
    ) -> None:
        principal = Principal("acme", "alice", PERMISSIONS, attributes)
        resource: ExternalAgent | None = None if agent is None else make_agent(org_id="acme", **agent)
        [decision] = await pdp.decide([AccessRequest(principal, action, resource, at)])
        assert (decision.allowed, decision.errors) == (allowed, ())

    async def test_a_subject_is_named(self, pdp: CedarPolicyDecisionPoint) -> None:
        watch = Principal("acme", "night-watch", PERMISSIONS)
        request = AccessRequest(watch, Action.UPDATE, make_agent(org_id="acme"), self.DAY.replace(hour=23))
        [decision] = await pdp.decide([request])
        assert decision.allowed

    def test_the_schema_that_is_shown_is_the_schema(self) -> None:
        [shown] = blocks("cedar-schema", of=DOCS / "how-to/write-policies.md")
        packaged = ROOT / "src/external_agents/adapters/abac/schema.cedarschema"
        assert _plain_schema(shown.text) == _plain_schema(packaged.read_text(encoding="utf-8"))


def _plain_schema(text: str) -> str:
    """Without comments, layout, and commas at the ends of lists."""
    words = " ".join(re.sub(r"//[^\n]*", "", text).split())
    return re.sub(r",? ?([}\]])", r"\1", words).replace(" ", "")
