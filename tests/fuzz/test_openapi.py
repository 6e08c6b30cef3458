"""
schemathesis over the whole API, from the document that the service itself serves: every operation, every check, and
sequences of calls along the links between them. `schemathesis.toml` says what is expected beyond its defaults.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from agents import Agent
from serve import Serve, bearer, environment
from wire import Wire

ROOT = Path(__file__).parents[2]
CONFIG = "tests/fuzz/schemathesis.toml"
RUN_S = 3600.0

pytestmark = pytest.mark.xdist_group("fuzz")


def test_the_api_is_as_its_document_says(serve: Serve, key: str, agent: Agent, wire: Wire) -> None:
    asked = len(agent.requests)
    examples = settings.default.max_examples  # type: ignore[union-attr]
    # The usual run is the same every time; a thorough one looks elsewhere each time, and tells its seed.
    options = (
        ["-n", "6", "--seed", "1", "--generation-deterministic"] if examples <= 100 else ["-n", str(examples // 10)]
    )
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", CONFIG, "run", *options]
    command += [f"{serve.address}/openapi.json", "--header", f"Authorization: {bearer(key)['Authorization']}"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**environment(serve.home), "FUZZ_AGENT_URL": agent.url},
        capture_output=True,
        text=True,
        timeout=RUN_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    there_are = len(wire.operations)
    assert f"Selected: {there_are}/{there_are}" in done.stdout, done.stdout
    assert len(agent.requests) > asked, "the agent was never reached"
