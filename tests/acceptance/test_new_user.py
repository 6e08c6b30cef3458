"""
The way of a new user: the built wheel in an empty environment, what `serve --dev` prints, the tutorial, the README.

These use the ports that the documents name, one test at a time, and fail where somebody else has them.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import httpx
import pytest

from agents import Reply
from serve import API, Serve, agent_in_thread, bearer, environment, eventually, home_folder, started

PROJECT = Path(__file__).parents[2]
FENCE = re.compile(
    r"^```(?P<language>\w+)(?: (?P<name>\w+)=(?P<value>\S+))?\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
API_PORT, AGENT_PORT = 8080, 9000
SHELL_S = 60.0

pytestmark = pytest.mark.xdist_group("new user")


@attrs.frozen
class Fence:
    """A fenced block: its language, and what follows that, such as `background=agent`."""

    language: str
    purpose: str | None
    value: str | None
    text: str


def fences_of(document: str) -> list[Fence]:
    found = FENCE.finditer((PROJECT / document).read_text())
    return [Fence(match["language"], match["name"], match["value"], match["text"]) for match in found]


@pytest.fixture(scope="module")
def user_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """PATH of somebody who has installed the wheel, with the extra [serve], into an empty environment."""
    folder = tmp_path_factory.mktemp("new-user")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(PROJECT)], check=True)
    [wheel] = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = str(folder / "venv" / "bin" / "python")
    install = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", f"{wheel}[serve]"]
    subprocess.run(install, check=True)
    where = subprocess.run(
        [python, "-Ic", "import external_agents as a; print(a.__file__)"], capture_output=True, text=True
    )
    assert where.stdout.startswith(str(folder)), "the wheel, and nothing of this checkout"
    assert shutil.which("curl"), "the documents use curl, and this machine has none"
    return os.pathsep.join([str(folder / "venv" / "bin"), os.environ["PATH"]])


@pytest.fixture
def ports() -> Iterator[None]:
    """The ports that the documents name are ours alone."""
    with (Path(tempfile.gettempdir()) / "external-agents-tests-ports.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for port in (API_PORT, AGENT_PORT):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError as error:
                    pytest.fail(f"the documents use port {port}, and something else on this machine does: {error}")
        yield


@pytest.fixture
def home() -> Iterator[Path]:
    with home_folder() as folder:
        yield folder


@attrs.frozen
class Terminal:
    """A shell of the new user's."""

    folder: Path
    home: Path
    path: str

    def run(self, script: str) -> str:
        """What it printed."""
        done = subprocess.run(
            ["/bin/bash", "-euc", script],
            cwd=self.folder,
            env=environment(self.home, path=self.path),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SHELL_S,
        )
        assert done.returncode == 0, (done.stdout, done.stderr)
        return done.stdout

    def serve(self, command: str) -> Serve:
        return Serve(self.home, ["/bin/bash", "-c", f"exec {command}"], path=self.path)

    @contextmanager
    def agent(self, command: str) -> Iterator[Path]:
        """Runs in the background for the length of the block; what it prints is in the file."""
        output = self.folder / "agent.log"
        with output.open("wb") as file:
            process = subprocess.Popen(
                ["/bin/bash", "-c", f"exec {command}"],
                cwd=self.folder,
                env=environment(self.folder, path=self.path),  # nothing of it belongs to the service's HOME
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        try:
            eventually(lambda: _answers(AGENT_PORT) or process.poll() is not None, SHELL_S)
            assert process.poll() is None, output.read_text()
            yield output
        finally:
            process.kill()
            process.wait()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_the_two_pastes_that_serve_prints(user_path: str, home: Path, tmp_path: Path, ports: None) -> None:
    terminal = Terminal(tmp_path, home, user_path)
    with started(terminal.serve("external-agents serve --dev --port 0")) as serve:
        _, _, pastes = serve.stdout.partition("An agent, in a terminal of its own:\n\n")
        first, _, second = pastes.partition("\nRegister it and ask it:\n\n")
        with terminal.agent(first.strip()):
            invocation = json.loads(terminal.run(second))
        assert invocation["status"] == "succeeded"
        assert invocation["response_payload"] == {"you said": {"hello": "agent"}}
        assert (home / "dev-key").stat().st_mode & 0o777 == 0o600
        assert (home / "dev-key").read_text().strip() == serve.key


def test_the_tutorial(user_path: str, home: Path, tmp_path: Path, ports: None) -> None:
    tutorial = "docs/tutorial/first-agent.md"
    fences = fences_of(tutorial)
    prose = " ".join((PROJECT / tutorial).read_text().split())
    for fence in fences:
        if fence.purpose == "file":
            (tmp_path / str(fence.value)).write_text(fence.text)
    background = {fence.value: fence.text.strip() for fence in fences if fence.purpose == "background"}
    terminal = Terminal(tmp_path, home, user_path)
    with terminal.agent(background["agent"]) as agent_log:
        with started(terminal.serve(background["serve"])) as serve:
            assert serve.address == f"http://127.0.0.1:{API_PORT}"
            [export] = re.findall(r"^export KEY=\S+$", serve.stdout, re.MULTILINE)
            commands = [fence.text for fence in fences if fence.language == "sh" and fence.purpose is None]
            assert commands[0] == "export KEY=…\n", "the line that is pasted comes first"
            parted = "printf '\\n<fence>\\n'\n".join([f"{export}\n", *commands[1:]])
            printed = terminal.run(parted).split("\n<fence>\n")
            answers = dict(
                zip(("export", "register", "id", "invoke", "budget", "limit", "record"), printed, strict=True)
            )

            agent = json.loads(answers["register"])
            assert agent["auth_config"] == {"header_name": "X-API-Key"}
            assert "s3cret" not in answers["register"]
            invocation = json.loads(answers["invoke"])
            assert invocation["response_payload"]["answer"] == "It works."
            assert invocation["cost"] == {"amount": "0.1", "currency": "EUR"}
            assert agent_log.read_text().splitlines()[0] == 'asked {"question": "Does it work?"} with key s3cret'
            assert "prints `200`, `200`, `402`" in prose
            assert answers["budget"].split() == ["200", "200", "402"]
            assert "prints `200` for the change, then `200` and `429`" in prose
            assert answers["limit"].split() == ["200", "200", "429"]
            page, *table = answers["record"].splitlines()
            shown, _, header = page.rpartition("}")
            assert len(json.loads(shown + "}")["items"]) == 2
            assert header.split() == ["id", "agent", "status", "created", "ms", "cost"]
            assert [line.split()[2] for line in table] == ["succeeded"] * 4
            key = serve.key
            assert serve.stop() == 0

        with started(terminal.serve(background["serve"])) as serve:
            assert serve.key == key
            left = httpx.get(f"{serve.address}{API}/{agent['id']}/invocations", headers=bearer(key)).json()["items"]
            assert len(left) == 4
            assert left[-1] == invocation
            assert httpx.get(f"{serve.address}/docs").status_code == 200


def test_the_readme_as_a_library(home: Path) -> None:
    [snippet] = [fence.text for fence in fences_of("README.md") if fence.language == "python"]
    indented = "".join(f"    {line}" for line in snippet.splitlines(keepends=True))
    with agent_in_thread(Reply(body=b'{"answer": "hello to you"}')) as agent:
        assert "https://agent.example.com/" in indented
        real = indented.replace("https://agent.example.com/", agent.url)
        script = f"import asyncio\n\nasync def main():\n{real}"
        done = subprocess.run(
            [sys.executable, "-c", f"{script}\nasyncio.run(main())\n"],
            env=environment(home, {"EGRESS_ALLOW": "loopback"}),
            capture_output=True,
            text=True,
            timeout=SHELL_S,
        )
        assert done.returncode == 0, done.stderr
        [seen] = agent.requests
        assert seen.json == {"input": "hello"}
        assert seen.headers["authorization"] == "Bearer s3cret"
    assert "succeeded" in done.stdout
    assert "hello to you" in done.stdout


def test_the_readme_shows_two_commands() -> None:
    shown = [fence.text.strip() for fence in fences_of("README.md") if fence.language == "console"]
    assert shown == ["$ pip install '.[serve]' && external-agents serve", "$ pip install nox && nox"]
