"""A secret key is changed and retired as operators do it: `external-agents keys rewrap`, killed and begun again."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from agents import Agent
from external_agents.adapters.postgres.agents import PostgresAgents
from external_agents.adapters.secrets import AesGcmSecretBox, KeyRing, envelope_key_id
from external_agents.ports.secrets import SecretContext
from external_agents.testing.builders import make_agent
from key_rotation import sealed_with, secret_keys
from postgres_server import OpenEngine, dsn
from serve import API, PROGRAM, agent_document, agent_in_thread, environment, eventually, home_folder, run, serving

ORGS, AGENTS_OF_EACH = 20, 80
SECRETS = ORGS * AGENTS_OF_EACH


@pytest.fixture
def home() -> Iterator[Path]:
    with home_folder() as folder:
        yield folder


@pytest.fixture
def agent() -> Iterator[Agent]:
    with agent_in_thread() as running:
        yield running


def settings_of(url: str, *key_ids: str) -> dict[str, str]:
    return {"DATABASE_URL": dsn(url), "SECRET_KEYS": secret_keys(*key_ids), "EGRESS_ALLOW": "loopback"}


def succeed(*arguments: str, home: Path, env: dict[str, str]) -> str:
    done = run(*arguments, home=home, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def context_of(agent: Any) -> SecretContext:
    return SecretContext(
        org_id=agent.org_id,
        agent_id=str(agent.id),
        field="auth_config.token",
        destination="https://agent.example.com:443",
    )


async def make_many(agents: PostgresAgents) -> list[Any]:
    box = AesGcmSecretBox(KeyRing.parse(secret_keys("k1")))
    made = []
    for org in range(ORGS):
        of_org = []
        for _ in range(AGENTS_OF_EACH):
            agent = make_agent(org_id=f"org-{org}", auth_type="bearer")
            agent.sealed["auth_config.token"] = box.seal(f'"token of {agent.id}"'.encode(), context_of(agent))
            of_org.append(agent)
        await agents.bulk(of_org)
        made += of_org
    return made


async def test_killed_at_any_point_it_is_begun_again_and_loses_nothing(
    postgres_url: str, open_engine: OpenEngine, home: Path
) -> None:
    agents = PostgresAgents(open_engine(postgres_url), key_id_of=envelope_key_id)
    made = await make_many(agents)
    settings = settings_of(postgres_url, "k2", "k1")
    done_before = 0
    for _ in range(2):
        _kill_after(postgres_url, done_before + 100, environment(home, settings))
        done = sealed_with(postgres_url)
        assert done_before < done["k2"] < SECRETS, "it was killed in the middle, and began where it had ended"
        assert done["k1"] + done["k2"] == SECRETS
        done_before = done["k2"]
    result = json.loads(succeed("keys", "rewrap", "--json", home=home, env=settings))
    assert result == {
        "resealed": SECRETS - done_before,
        "before": {"k2": _use(done_before), "k1": _use(SECRETS - done_before)},
        "after": {"k2": _use(SECRETS), "k1": _use(0)},
        "retirable": ["k1"],
        "unreadable": [],
        "unreadable_hash_keys": [],
        "left": 0,
    }
    assert sealed_with(postgres_url) == {"k2": SECRETS}
    box = AesGcmSecretBox(KeyRing.parse(secret_keys("k2")))
    for agent in made:
        found = await agents.read(agent.org_id, agent.id)
        opened = box.open(found.sealed["auth_config.token"], context_of(agent))
        assert opened == f'"token of {agent.id}"'.encode()
        assert (found.version, found.updated_at) == (agent.version, agent.updated_at)


def _kill_after(url: str, resealed: int, env: dict[str, str]) -> None:
    process = subprocess.Popen(
        [str(PROGRAM), "keys", "rewrap"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        eventually(lambda: _resealed(url) >= resealed, 60, every_s=0.002)
    finally:
        process.kill()
        process.wait()


def _resealed(url: str) -> int:
    with psycopg.connect(dsn(url)) as connection:
        [number] = (
            connection.execute("SELECT count(*) FROM external_agent_secrets WHERE key_id = 'k2'").fetchone() or ()
        )
    return int(number)


def _use(secrets: int, api_keys: int = 0) -> dict[str, int]:
    return {"secrets": secrets, "api_keys": api_keys}


def test_a_key_is_changed_and_retired(postgres_url: str, home: Path, agent: Agent) -> None:
    old, both, new = (settings_of(postgres_url, *ids) for ids in (("k1",), ("k2", "k1"), ("k2",)))
    key = succeed("keys", "create", "--org", "acme", "--subject", "ci", home=home, env=old).strip()
    document = json.dumps(agent_document(agent.url, auth_type="bearer", auth_config={"token": "entrusted"}))
    made = json.loads(succeed("agents", "create", "--org", "acme", "--json", document, home=home, env=old))
    with serving(home, env=new) as serve:
        refused = httpx.get(f"{serve.address}/readyz")
        assert refused.status_code == 503
        assert "k1" in refused.json()["checks"]["keys"]
        assert refused.json()["checks"]["database"] == "ok"
        looked = run("check", home=home, env=new)
        assert looked.returncode == 1
        verdicts = [line.split(maxsplit=2) for line in looked.stdout.splitlines() if line.split()[1] == "secrets"]
        assert verdicts == [
            ["ok", "secrets", "by secret key: k2: 0 secrets, 0 API keys; k1: 1 secrets, 1 API keys"],
            ["WRONG", "secrets", "the secret key k1 is in use and not configured: "
             "put it back into EXTERNAL_AGENTS_SECRET_KEYS"],
        ]  # fmt: skip
        lost = run("keys", "rewrap", home=home, env=new)
        assert lost.returncode == 1
        complaints = lost.stderr.splitlines()
        assert f"acme, agent {made['id']}, auth_config.token: " in complaints[0]
        assert all("the key k1, which is not configured" in line for line in complaints)
        assert len(complaints) == 2
        assert "entrusted" not in lost.stdout + lost.stderr

        shown = succeed("keys", "rewrap", home=home, env=both).splitlines()
        assert [line.split() for line in shown] == [
            "key secrets before after API keys before after".split(),
            ["k2", "0", "1", "0", "1"],
            ["k1", "1", "0", "1", "0"],
            "k1 is not used any more: it can be taken out of EXTERNAL_AGENTS_SECRET_KEYS".split(),
        ]
        assert httpx.get(f"{serve.address}/readyz").status_code == 200, "without starting again"
        with serve.client(key) as client:
            assert client.post(f"{API}/{made['id']}/invoke", json=1).status_code == 200
            assert client.get(f"{API}/{made['id']}").json() == made
        assert [seen.headers["authorization"] for seen in agent.requests] == ["Bearer entrusted"]
        eventually(lambda: _listed(home, new)["last_used_at"] is not None, 30)
        assert "WRONG" not in succeed("check", home=home, env=new)


def _listed(home: Path, env: dict[str, str]) -> dict[str, Any]:
    [item] = json.loads(succeed("keys", "list", "--org", "acme", "--json", home=home, env=env))["items"]
    return dict(item)


async def test_a_terminal_is_shown_how_far_it_is(postgres_url: str, open_engine: OpenEngine, home: Path) -> None:
    await make_many(PostgresAgents(open_engine(postgres_url), key_id_of=envelope_key_id))
    shown, result = _on_a_terminal({**environment(home, settings_of(postgres_url, "k2", "k1")), "TERM": "xterm"})
    assert json.loads(result)["resealed"] == SECRETS, "the result is not mixed with it"
    assert "sealing with k2" in shown
    assert f"/{SECRETS}" in shown


def _on_a_terminal(env: dict[str, str]) -> tuple[str, bytes]:
    """What stands on the terminal, and in the file that stdout goes to."""
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        [str(PROGRAM), "keys", "rewrap", "--json"], env=env, stdout=subprocess.PIPE, stderr=theirs
    )
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # EIO: nobody holds the other end any more.
        while piece := os.read(terminal, 1 << 16):
            shown += piece
    os.close(terminal)
    result, _ = process.communicate(timeout=90)
    return shown.decode(), result
