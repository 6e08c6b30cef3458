"""Which secrets are taken, what signatures a receiver finds after any history of changes."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from external_agents import Principal, ValidationError
from external_agents.adapters.memory import memory_service
from external_agents.domain.signing import is_signing_secret
from external_agents.testing.builders import ALL_PERMISSIONS
from external_agents.testing.fakes import FakeClock, ScriptedTransport, SequentialIds
from external_agents.testing.strategies import signing_secrets
from two_services import signed_with

ALICE = Principal("acme", "alice", ALL_PERMISSIONS)
DOCUMENT: dict[str, Any] = {
    "name": "x",
    "provider": "custom",
    "webhook_url": "https://agent.example.com/",
    "auth_type": "none",
}
SECRETS = [f"whsec_{letter * 32}" for letter in "ABC"]
DAY_S = 24 * 3600.0

_FOUR = "[A-Za-z0-9+/]{4}"
WELL_FORMED = re.compile(
    rf"whsec_(?:(?:{_FOUR}){{8,21}}|(?:{_FOUR}){{8,21}}[A-Za-z0-9+/][AQgw]==|(?:{_FOUR}){{8,20}}[A-Za-z0-9+/]{{2}}[AEIMQUYcgkosw048]=)"
)
"""What base64 of 24 to 64 bytes looks like, said in another way."""


def altered(secret: str, place: int, inserted: str, removed: int) -> str:
    place %= len(secret) + 1
    return secret[:place] + inserted + secret[place + removed :]


near_misses = st.builds(
    altered,
    st.binary(max_size=80).map(lambda key: "whsec_" + base64.b64encode(key).decode()),
    st.integers(0, 200),
    st.sampled_from(["", "=", "-", "_", "\n", " ", "A", "B", "é", "\u0660", "whsec_"]) | st.text(max_size=3),
    st.integers(0, 2),
)


@given(near_misses | signing_secrets() | st.text())
def test_a_secret_is_the_base64_of_24_to_64_bytes(text: str) -> None:
    assert is_signing_secret(text) == bool(WELL_FORMED.fullmatch(text))


@given(near_misses.filter(lambda text: "\0" not in text and text.isprintable() and not is_signing_secret(text)))
def test_a_malformed_one_is_named_and_not_quoted(text: str) -> None:
    async def told() -> None:
        service = memory_service(ScriptedTransport())
        try:
            await service.create_agent(ALICE, {**DOCUMENT, "signing_secret": text})
        except ValidationError as invalid:
            [fault] = invalid.errors
            assert (fault.path, fault.message) == ("signing_secret", "must be whsec_ and the base64 of 24 to 64 bytes")
        else:
            raise AssertionError("it was taken")

    asyncio.run(told())


changes = st.fixed_dictionaries({}, optional={"signing_secret": st.sampled_from([*SECRETS, None])})
steps = changes | st.sampled_from([1.0, 3600.0, DAY_S / 2, DAY_S - 1, DAY_S])


@given(st.none() | st.sampled_from(SECRETS), st.lists(steps, max_size=12))
def test_what_signs_after_any_history(first: str | None, history: Sequence[dict[str, str | None] | float]) -> None:
    async def live() -> None:
        clock, transport = FakeClock(), ScriptedTransport()
        service = memory_service(transport, clock=clock, ids=SequentialIds(clock))
        agent = await service.create_agent(ALICE, {**DOCUMENT, "signing_secret": first})
        current, previous, changed_at = first, None, clock.now()
        for step in history:
            if isinstance(step, float):
                clock.advance(step)
            else:
                await service.update_agent(ALICE, agent.id, step)
                wanted = step.get("signing_secret", current)
                if wanted != current:
                    previous, current, changed_at = wanted and current, wanted, clock.now()
            await service.invoke_agent(ALICE, agent.id, None)
            is_kept = previous and clock.now() - changed_at < timedelta(hours=24)
            signing = [*filter(None, [current]), *([previous] if is_kept else [])]
            assert signed_with(transport.requests[-1], *SECRETS) == [SECRETS.index(secret) for secret in signing]

    asyncio.run(live())
