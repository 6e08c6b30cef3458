"""The command line itself: help, wrong usage, settings that cannot work. No database is touched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from external_agents.cli.app import app
from external_agents.cli.app import run as run_here
from serve import home_folder, run

COMMANDS = [
    *(["serve"], ["migrate"], ["check"], ["invoke"]),
    *(["keys", name] for name in ("create", "list", "revoke", "rewrap")),
    *(["agents", name] for name in ("create", "list", "show", "update", "delete", "usage")),
    *(["invocations", name] for name in ("list", "show")),
]
UNKNOWN_ID = "019ab0c5-7a52-7f3e-9c1d-2b8f4a6e0d13"
SECRET_KEYS = "k1:MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="


@pytest.fixture(autouse=True)
def no_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs in this process must not get as far as a HOME: this one cannot even be made."""
    monkeypatch.setenv("EXTERNAL_AGENTS_HOME", "/proc/nonexistent")


@pytest.fixture
def home() -> Iterator[Path]:
    with home_folder() as folder:
        yield folder


def test_every_command_is_among_those_tested() -> None:
    def commands(group: object, *path: str) -> Iterator[list[str]]:
        for name, command in getattr(group, "commands", {}).items():
            yield from commands(command, *path, name)
        if path and not hasattr(group, "commands"):
            yield list(path)

    assert sorted(commands(typer.main.get_command(app))) == sorted(COMMANDS)


@pytest.mark.parametrize("command", [[], *COMMANDS], ids=" ".join)
def test_help_has_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here([*command, "--help"]) == 0
    shown = capsys.readouterr()
    assert f"Example: external-agents {' '.join(command)}" in shown.out
    assert shown.err == ""


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["nonsense"], "nonsense"),
        (["serve", "--nonsense"], "--nonsense"),
        (["serve", "--port", "65536"], "--port"),
        (["serve", "--workers", "0"], "--workers"),
        (["keys", "create", "--subject", "ci"], "--org"),
        (["keys", "create", "--org", "acme"], "--subject"),
        (["keys", "create", "--org", "no spaces", "--subject", "ci"], "--org"),
        (["keys", "create", "--org", "acme", "--subject", "ci", "--expires-in", "3y"], "3y"),
        (["keys", "create", "--org", "acme", "--subject", "ci", "--attribute", "team"], "team"),
        (["keys", "revoke", "no-id"], "no-id"),
        (["agents", "list"], "--org"),
        (["agents", "list", "--org", "acme", "--limit", "101"], "--limit"),
        (["agents", "show", "no-id", "--org", "acme"], "no-id"),
        (["invoke", "no-id", "--org", "acme", "{}"], "no-id"),
        (["invocations", "list", "--org", "acme", "--agent", "no-id"], "no-id"),
        (["migrate", "--check", "more"], "more"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line_and_exit_2(
    arguments: list[str], names: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    [line] = shown.err.splitlines()
    assert line.startswith("external-agents: ")
    assert names in line
    assert line.endswith("--help"), "it says where to read on"


@pytest.mark.parametrize("document", ["{", "nonsense", "[" * 9_999, "@/nonexistent", "{} {}"])
def test_a_document_that_is_none_is_one_line_and_exit_1(document: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["agents", "create", "--org", "acme"], ["agents", "update", UNKNOWN_ID, "--org", "acme"]):
        assert run_here([*command, document]) == 1
        shown = capsys.readouterr()
        assert shown.out == ""
        [line] = shown.err.splitlines()
        assert line.startswith("external-agents: ")


def test_a_group_without_a_command_shows_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here(["keys"]) == 2
    assert "revoke" in "".join(capsys.readouterr())


def test_as_a_program_it_tells_wrong_usage_the_same_way(home: Path) -> None:
    done = run("keys", "create", home=home)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert not home.exists()


def test_bad_settings_are_all_named(home: Path) -> None:
    bad = {
        "DATABASE_URL": "mysql://acme:s3cret@db.example.com/agents",
        "EGRESS_ALLOW": "loopback,10.0.0.1/8,nowhere",
        "EGRESS_PORTS": "443,0",
        "MAX_BODY_BYTES": "1",
        "LOG_FORMAT": "xml",
        "LOG_LEVEL": "loud",
        "REDIS_URL": "memcached://:s3cret@cache.example.com",
        "JWT_JWKS_URL": "https://:s3cret@issuer.example.com/jwks",
    }
    done = run("serve", "--port", "0", home=home, env=bad)
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert [name for name in bad if f"EXTERNAL_AGENTS_{name}" not in line] == []
    assert all(word in line for word in ("10.0.0.1/8", "nowhere", "'0'"))
    assert "s3cret" not in line

    checked = run("check", home=home, env=bad)
    assert (checked.returncode, checked.stderr) == (1, "")
    assert [name for name in bad if f"EXTERNAL_AGENTS_{name}" not in checked.stdout] == []


@pytest.mark.parametrize(
    ("env", "names"),
    [
        ({"DATABASE_URL": "postgresql://acme@db.example.com/x"}, "EXTERNAL_AGENTS_SECRET_KEYS"),
        ({"SECRET_KEYS": "k1:c2hvcnQ="}, "openssl rand -base64 32"),
        (
            {"DATABASE_URL": "postgresql://acme:s3:cret/4@db.example.com/x", "SECRET_KEYS": SECRET_KEYS},
            "percent-encode",
        ),
        ({"REDIS_URL": "redis://:s3/cret@cache.example.com"}, "percent-encode"),
        ({"REDIS_URL": "redis://:s3cret@cache.example.com?no_such=1"}, "EXTERNAL_AGENTS_REDIS_URL"),
        ({"REDIS_URL": "unix://"}, "unix:///path/to/socket"),
        ({"POLICY_DIR": "/nonexistent/policies"}, "/nonexistent/policies"),
        ({"HOME": "/proc/nonexistent"}, "EXTERNAL_AGENTS_HOME"),
    ],
    ids=[
        "no SECRET_KEYS",
        "a short key",
        "a password that is not encoded",
        "a password of Redis",
        "a parameter that Redis does not have",
        "no socket",
        "no POLICY_DIR",
        "an unusable HOME",
    ],
)
def test_settings_that_cannot_work_stop_serve_with_one_line(home: Path, env: dict[str, str], names: str) -> None:
    done = run("serve", "--port", "0", home=home, env=env)
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("external-agents: ")
    assert names in line
    assert "s3" not in line
    assert "c2hvcnQ" not in line


def test_policies_that_do_not_parse_or_validate_stop_serve_with_file_and_line(home: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.cedar").write_text(
        "// A comment.\nforbid (principal, action, resource)\nwhen { principal.nothing == 1 };\n\npermit (\n"
    )
    (tmp_path / "yours.cedar").write_text("permit (principal, action, resource);\n")
    done = run("serve", "--port", "0", home=home, env={"POLICY_DIR": str(tmp_path)})
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert "mine.cedar:2: " in line
    assert "mine.cedar:5: " in line
    assert "yours.cedar" not in line


def test_a_database_that_is_not_there_is_told_with_the_reason(home: Path) -> None:
    env = {"DATABASE_URL": "postgresql://acme:s3cret@127.0.0.1:1/x", "SECRET_KEYS": SECRET_KEYS}
    for command in (["serve", "--port", "0"], ["keys", "list", "--org", "acme"]):
        done = run(*command, home=home, env=env)
        assert (done.returncode, done.stdout) == (1, ""), command
        [line] = done.stderr.splitlines()
        assert "Connection refused" in line
        assert "external-agents check" in line
        assert "s3cret" not in line
    done = run("check", home=home, env=env)
    assert done.returncode == 1
    assert "EXTERNAL_AGENTS_DATABASE_URL" in done.stdout
    assert not home.exists(), "an external database needs no HOME"
