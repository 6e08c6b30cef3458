"""An issuer of tokens, and the door that lets in whom it vouches for."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from external_agents.adapters.identity.jwt import JwtAuthenticator
from external_agents.testing.fakes import FakeClock
from token_issuer import TokenIssuer, door_of, serve_issuer


@pytest.fixture
async def issuer() -> AsyncIterator[TokenIssuer]:
    async with serve_issuer() as issuer:
        yield issuer


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def door(issuer: TokenIssuer, clock: FakeClock) -> AsyncIterator[JwtAuthenticator]:
    async with door_of(issuer, clock) as door:
        yield door
