"""Signatures are those of Standard Webhooks, byte for byte; what secrets are malformed, and how that is told."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from external_agents.domain.catalog import BUILT_IN
from external_agents.domain.egress import EgressPolicy
from external_agents.domain.errors import Fault
from external_agents.domain.signing import SigningSecrets, key_of, signature

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER = "whsec_" + base64.b64encode(bytes(range(64))).decode()
MESSAGE_ID = "msg_p5jXN8AQM9LWM0D4loKWxJek"
TIMESTAMP_S = 1614265330
BODY = b'{"test": 2432232314}'
SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
"""The specification's own example."""
AT = datetime.fromtimestamp(TIMESTAMP_S, UTC)
DOCUMENT: dict[str, Any] = {
    "name": "x",
    "provider": "custom",
    "webhook_url": "https://agent.example.com/",
    "auth_type": "none",
}


def spelled(length: int) -> str:
    return "whsec_" + base64.b64encode(bytes(length)).decode()


def faults_of(secret: object) -> list[Fault]:
    return BUILT_IN.agent_faults({**DOCUMENT, "signing_secret": secret}, EgressPolicy())


def test_the_known_answer() -> None:
    assert signature(SECRET, message_id=MESSAGE_ID, timestamp_s=TIMESTAMP_S, body=BODY) == SIGNATURE
    assert SigningSecrets(SECRET).headers(MESSAGE_ID, BODY, AT + timedelta(milliseconds=999)) == {
        "webhook-id": MESSAGE_ID,
        "webhook-timestamp": str(TIMESTAMP_S),
        "webhook-signature": SIGNATURE,
    }


def test_both_sign_until_the_time_of_the_previous_one_is_over() -> None:
    rotated = SigningSecrets(OTHER).replaced_by(SECRET, AT - timedelta(hours=23))
    assert rotated is not None
    other = signature(OTHER, message_id=MESSAGE_ID, timestamp_s=TIMESTAMP_S, body=BODY)
    assert rotated.headers(MESSAGE_ID, BODY, AT)["webhook-signature"] == f"{SIGNATURE} {other}"
    over = AT + timedelta(hours=1)
    assert " " in rotated.headers(MESSAGE_ID, BODY, over - timedelta(microseconds=1))["webhook-signature"]
    assert " " not in rotated.headers(MESSAGE_ID, BODY, over)["webhook-signature"]
    assert rotated.at(over) == SigningSecrets(SECRET)


def test_no_secret_in_its_representation() -> None:
    assert repr(SigningSecrets(SECRET, OTHER, AT)) == f"SigningSecrets(previous_until={AT!r})"


@pytest.mark.parametrize("secret", [SECRET, OTHER, *(spelled(length) for length in (24, 25, 26, 27, 62, 63, 64)), None])
def test_well_formed(secret: str | None) -> None:
    assert faults_of(secret) == []


@pytest.mark.parametrize(
    "secret",
    [
        "",
        "whsec_",
        spelled(23),
        spelled(65),
        SECRET.removeprefix("whsec_"),
        SECRET.upper(),
        f"whsec_{SECRET}",
        f" {SECRET}",
        f"{SECRET}\n",
        f"{SECRET}=",
        f"{SECRET}====",
        spelled(25).rstrip("="),
        spelled(25)[:-1],
        "whsec_" + "A" * 33 + "B==",
        "whsec_" + "-_" * 16,
        "whsec_" + "A" * 31 + "é",
        "whsec_" + "A" * 20 + " " + "A" * 12,
        "whpk_" + "A" * 32,
    ],
)
def test_malformed(secret: str) -> None:
    assert faults_of(secret) == [Fault("signing_secret", "must be whsec_ and the base64 of 24 to 64 bytes")]
    with pytest.raises(ValueError, match=r"^[a-z 0-9]+$") as raised:
        key_of(secret)
    assert raised.value.__cause__ is None


@pytest.mark.parametrize("secret", [1, True, [SECRET], {"secret": SECRET}])
def test_no_text(secret: object) -> None:
    assert faults_of(secret) == [Fault("signing_secret", "must be a string or null")]
