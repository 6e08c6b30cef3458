"""JWTs at a service as it is run: its settings, `check`, its API beside API keys, and policies that read claims."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_webhook_tls import Authority

from agents import Agent, Reply, serve_agent
from external_agents.adapters.identity.jwt import JwksEndpoint, KeySetUnavailable
from external_agents.domain.errors import ConfigurationError
from external_agents.settings import Settings, TokenIssuer
from serve import API, Serve, agent_document, agent_in_thread, bearer, eventually, home_folder, is_problem, run, serving
from token_issuer import AUDIENCE, ISSUER, SigningKey
from token_issuer import TokenIssuer as Issuer

SECRET_KEYS = "k1:MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
ALL = [f"{action}:external_agent" for action in ("create", "read", "update", "delete", "invoke")]
JWT = {"JWT_ISSUER": ISSUER, "JWT_AUDIENCE": AUDIENCE, "JWT_JWKS_URL": "https://issuer.example.com/jwks"}

ONLY_OPS = """\
@id("ops-create")
forbid (principal, action == ExternalAgents::Action::"create", resource)
unless { principal.hasTag("team") && principal.getTag("team") == "ops" };
"""


def settings(**values: str) -> Settings:
    return Settings.from_env({f"EXTERNAL_AGENTS_{name}": value for name, value in values.items()})


@pytest.fixture
def home() -> Iterator[Path]:
    with home_folder() as folder:
        yield folder


@pytest.fixture
def server() -> Iterator[Agent]:
    with agent_in_thread() as agent:
        yield agent


@pytest.fixture
def issuer(server: Agent) -> Issuer:
    return Issuer(server, time.time())


def test_the_three_settings_make_an_issuer() -> None:
    assert settings(**JWT).token_issuer == TokenIssuer(ISSUER, AUDIENCE, JWT["JWT_JWKS_URL"])
    assert settings().token_issuer is None
    assert settings(JWT_ISSUER="", JWT_AUDIENCE="", JWT_JWKS_URL="").token_issuer is None


@pytest.mark.parametrize("given", [("JWT_ISSUER",), ("JWT_AUDIENCE", "JWT_JWKS_URL")], ids=" ".join)
def test_one_without_the_others_is_a_mistake_that_names_what_is_missing(given: tuple[str, ...], home: Path) -> None:
    env = {name: JWT[name] for name in given}
    with pytest.raises(ConfigurationError) as told:
        settings(**env)
    first_half, _, _ = str(told.value).partition(" must be set")
    assert set(first_half.split(" and ")) == {f"EXTERNAL_AGENTS_{name}" for name in JWT.keys() - {*given}}
    with pytest.raises(ConfigurationError, match="must be set"):
        _ = Settings(**{name.lower(): value for name, value in env.items()}).token_issuer
    done = run("serve", "--port", "0", home=home, env=env)
    assert (done.returncode, done.stdout) == (1, "")
    assert str(told.value) in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "url",
    [
        "issuer.example.com/jwks",
        "ftp://issuer.example.com/jwks",
        "file:///etc/jwks.json",
        "https://",
        "https:///jwks",
        "https://user:s3cret@issuer.example.com/jwks",
        "https://issuer.example.com:0/jwks",
        "https://issuer.example.com:99999/jwks",
        "https://issuer.example.com/jwks#keys",
        "https://issuer.example.com/jw ks",
        "https://[::1/jwks",
        "https://issuer.example.com\\@example.org/jwks",
    ],
)
def test_a_url_that_cannot_be_is_named(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^EXTERNAL_AGENTS_JWT_JWKS_URL must be") as told:
        settings(**{**JWT, "JWT_JWKS_URL": url})
    assert "s3cret" not in str(told.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8081/jwks?x=1", "HTTPS://issuer.example.com", "http://[::1]:80/"])
def test_a_url_may_be_internal(url: str) -> None:
    assert settings(**{**JWT, "JWT_JWKS_URL": url}).jwt_jwks_url == url


async def test_the_key_set_comes_from_whom_it_should(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    key_set = Reply(body=json.dumps({"keys": [SigningKey().jwk]}).encode())
    async with serve_agent(key_set, ssl_context=authority.server("localhost")) as server:
        url = server.url_at("/jwks", "localhost")
        assert len((await JwksEndpoint(url, ssl_context=authority.trusted()).fetch()).keys) == 1
        with pytest.raises(KeySetUnavailable, match="certificate"):
            await JwksEndpoint(url).fetch()
        with pytest.raises(KeySetUnavailable, match="certificate"):
            await JwksEndpoint(server.url_at("/jwks"), ssl_context=authority.trusted()).fetch()
        assert len(server.requests) == 1


def test_check_looks_at_the_key_set(issuer: Issuer, home: Path) -> None:
    def checked() -> str:
        # There is no database: what is said of it is not of interest here.
        env = {"DATABASE_URL": "postgresql://127.0.0.1:1/x", "SECRET_KEYS": SECRET_KEYS}
        done = run("check", home=home, env={**env, **JWT, "JWT_JWKS_URL": issuer.url})
        [line] = [line for line in done.stdout.splitlines() if line.split()[1] == "jwt"]
        return line

    issuer.published.append({"kty": "oct", "k": "AA"})
    assert checked() == (
        f"ok     jwt         {ISSUER}, for {AUDIENCE}: 1 usable key; key 2 is no public key: it has the member k"
    )
    issuer.published = []
    assert checked() == f"WRONG  jwt         the JWK set of {ISSUER} has no usable key"
    issuer.answers(Reply(404, b""))
    assert checked() == (
        "WRONG  jwt         there is no JWK set, it answers 404: mend that, or EXTERNAL_AGENTS_JWT_JWKS_URL"
    )


def test_a_service_takes_tokens_and_keys(server: Agent, issuer: Issuer, home: Path, tmp_path: Path) -> None:
    (tmp_path / "ops.cedar").write_text(ONLY_OPS)
    env = {**JWT, "JWT_JWKS_URL": issuer.url, "POLICY_DIR": str(tmp_path)}
    with serving(home, "--dev", env=env) as serve:
        assert issuer.fetches == 0
        without_the_issuer_it_says_when_to_come_again(serve, issuer)
        claims_are_what_api_and_policies_go_by(serve, issuer, server.url)


def without_the_issuer_it_says_when_to_come_again(serve: Serve, issuer: Issuer) -> None:
    issuer.answers(Reply(503, b""))
    with serve.client(issuer.token(org_id="dev")) as client:
        began_s = time.monotonic()
        answer = client.get(API)
        assert time.monotonic() - began_s < 5
        problem = is_problem(answer, 503)
        assert int(answer.headers["Retry-After"]) >= 1
        assert str(issuer.server.port) not in json.dumps(problem)
        assert client.get(API, headers=bearer(serve.key)).status_code == 200
        assert client.get("/readyz").status_code == 200
        issuer.recovers()
        eventually(lambda: client.get(API).status_code == 200, 10)


def claims_are_what_api_and_policies_go_by(serve: Serve, issuer: Issuer, agent_url: str) -> None:
    ops = {"org_id": "dev", "sub": "alice", "permissions": ALL, "team": "ops"}
    with serve.client(issuer.token(**ops)) as client:
        created = client.post(API, json=agent_document(agent_url))
        assert created.status_code == 201, created.text
        assert (created.json()["org_id"], created.json()["created_by"]) == ("dev", "alice")
        path = f"{API}/{created.json()['id']}"
        invoked = client.post(f"{path}/invoke", json={"input": "hello"})
        assert (invoked.status_code, invoked.json()["initiated_by"]) == (200, "alice")

        for team in ("sales", None):
            other_team = bearer(issuer.token(**{**ops, "team": team}))
            is_problem(client.post(API, json=agent_document(agent_url), headers=other_team), 403)
            assert client.get(path, headers=other_team).status_code == 200
        for permissions in (["read:external_agent"], None):
            reader = bearer(issuer.token(**{**ops, "permissions": permissions}))
            is_problem(client.post(f"{path}/invoke", json={}, headers=reader), 403)
        stranger = bearer(issuer.token(**{**ops, "org_id": "globex"}))
        is_problem(client.get(path, headers=stranger), 404)
        assert client.get(path, headers=bearer(serve.key)).status_code == 200

        is_problem(client.get(API, headers=bearer(issuer.token(**ops, exp=issuer.now - 61))), 401)
        is_problem(client.get(API, headers=bearer(f"{serve.key}.x.y")), 401)
