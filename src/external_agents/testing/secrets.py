"""What SecretBox promises."""

from __future__ import annotations

import attrs
import pytest

from external_agents.domain.errors import SecretUnreadable
from external_agents.ports.secrets import SecretBox, SecretContext

CONTEXT = SecretContext(
    org_id="acme",
    agent_id="0190d1e5-0000-7000-8000-000000000001",
    field="auth_config.key",
    destination="https://agent.example.com:443",
)
PLAINTEXT = b'"a secret that is long enough to be recognised"'


class SecretBoxContract:
    """
    For SecretBox.

    Fixtures:
        secret_box (SecretBox): of any scope.
    """

    @pytest.mark.parametrize("plaintext", [b"", b"\x00", PLAINTEXT, bytes(range(256)) * 400], ids=len)
    def test_what_was_sealed_is_opened(self, secret_box: SecretBox, plaintext: bytes) -> None:
        assert secret_box.open(secret_box.seal(plaintext, CONTEXT), CONTEXT) == plaintext

    def test_every_envelope_is_a_new_one(self, secret_box: SecretBox) -> None:
        envelopes = {secret_box.seal(PLAINTEXT, CONTEXT) for _ in range(100)}
        assert len(envelopes) == 100
        assert {secret_box.open(envelope, CONTEXT) for envelope in envelopes} == {PLAINTEXT}

    def test_an_envelope_does_not_show_what_is_in_it(self, secret_box: SecretBox) -> None:
        envelope = secret_box.seal(PLAINTEXT, CONTEXT)
        assert b"recognised" not in envelope
        assert "recognised" not in repr(secret_box)

    @pytest.mark.parametrize(
        "changes",
        [
            {"org_id": "acmes"},
            {"org_id": "", "agent_id": "acme" + CONTEXT.agent_id},
            {"agent_id": "0190d1e5-0000-7000-8000-000000000002"},
            {"field": "auth_config.token"},
            {"destination": ""},
            {"destination": "https://agent.example.com:8443"},
            {"field": CONTEXT.field + CONTEXT.destination, "destination": ""},
            {"org_id": CONTEXT.agent_id, "agent_id": CONTEXT.org_id},
        ],
    )
    def test_an_envelope_opens_in_its_own_context_only(self, secret_box: SecretBox, changes: dict[str, str]) -> None:
        envelope = secret_box.seal(PLAINTEXT, CONTEXT)
        with pytest.raises(SecretUnreadable):
            secret_box.open(envelope, attrs.evolve(CONTEXT, **changes))

    def test_an_altered_envelope_does_not_open(self, secret_box: SecretBox) -> None:
        envelope = secret_box.seal(PLAINTEXT, CONTEXT)
        altered = [b"", envelope[:-1], envelope[1:], envelope + b"\x00", b"\x00" * len(envelope), PLAINTEXT]
        for index in range(len(envelope)):
            altered.append(envelope[:index] + bytes([envelope[index] ^ 0x40]) + envelope[index + 1 :])
        for other in altered:
            with pytest.raises(SecretUnreadable):
                secret_box.open(other, CONTEXT)

    def test_the_error_tells_nothing_of_the_secret(self, secret_box: SecretBox) -> None:
        envelope = secret_box.seal(PLAINTEXT, CONTEXT)
        with pytest.raises(SecretUnreadable) as unreadable:
            secret_box.open(envelope, attrs.evolve(CONTEXT, org_id="other"))
        assert "secret that is" not in str(unreadable.value)
