"""One running `serve`, with keys of several organisations. Its tests are one xdist group, so that there is only one."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest

from agents import Agent, serve_agent
from serve import Serve, home_folder, run, serving


@pytest.fixture(scope="session")
def serve() -> Iterator[Serve]:
    """`serve --dev` that logs all it can."""
    with home_folder() as home, serving(home, "--dev", env={"LOG_LEVEL": "debug"}) as running:
        yield running


@pytest.fixture(scope="session")
def other_key(serve: Serve) -> str:
    """Of another organisation, with every permission."""
    return make_key(serve, "--org", "other", "--subject", "stranger")


@pytest.fixture(scope="session")
def reader_key(serve: Serve) -> str:
    """Of the organisation `dev`, for reading alone."""
    return make_key(serve, "--org", "dev", "--subject", "reader", "--permission", "read:external_agent")


@pytest.fixture
async def api(serve: Serve) -> AsyncIterator[httpx.AsyncClient]:
    async with serve.async_client() as client:
        yield client


@pytest.fixture
async def agent() -> AsyncIterator[Agent]:
    async with serve_agent() as running:
        yield running


def make_key(serve: Serve, *arguments: str) -> str:
    done = run("keys", "create", "--json", *arguments, home=serve.home)
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["key"])
