"""An issuer's keys: how often they are asked for, how long they serve, and what an outage means."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest

from agents import Reply, Seen, Wire, serve_agent
from external_agents.adapters.identity.jwt import IssuerKeys, JwksEndpoint, JwtAuthenticator, KeySet, KeySetUnavailable
from external_agents.adapters.identity.jwt.issuer_keys import (
    AGAIN_S,
    FRESH_S,
    NOTHING_KEPT_AGAIN_S,
    OLD_S,
    STALE_MAX_S,
)
from external_agents.adapters.identity.jwt.jwks_endpoint import DOCUMENT_LIMIT_BYTES
from external_agents.domain.errors import Unavailable
from external_agents.testing.fakes import FakeClock
from token_issuer import SigningKey, TokenIssuer, passes

DOWN = Reply(503, b"")


def pass_time(issuer: TokenIssuer, clock: FakeClock, seconds: float) -> None:
    clock.advance(seconds)
    issuer.now += seconds


async def fetched(issuer: TokenIssuer, times: int) -> None:
    """Until the endpoint was asked so often, and the answer is there."""
    await issuer.server.until(lambda: issuer.fetches >= times)
    flights = [task for task in asyncio.all_tasks() if task.get_name() == "external-agents JWKS"]
    if flights:
        await asyncio.wait(flights, timeout=10)
    assert issuer.fetches == times


async def test_fifty_at_once_make_one_request(issuer: TokenIssuer, door: JwtAuthenticator) -> None:
    assert issuer.fetches == 0
    tokens = [issuer.token(sub=f"subject-{number}") for number in range(50)]
    principals = await asyncio.gather(*map(door.authenticate, tokens))
    assert [principal.subject for principal in principals] == [f"subject-{number}" for number in range(50)]
    assert issuer.fetches == 1


async def test_who_goes_away_takes_nothing_from_the_others(issuer: TokenIssuer, door: JwtAuthenticator) -> None:
    may_answer = asyncio.Event()
    issuer.answers(Reply(body=issuer.reply(Seen("", "", (), b"", 0)).body, wait_for=may_answer))
    first, second = (asyncio.create_task(door.authenticate(issuer.token())) for _ in range(2))
    await issuer.server.until(lambda: issuer.fetches == 1)
    first.cancel()
    may_answer.set()
    assert (await second).subject == "alice"
    assert issuer.fetches == 1


async def test_a_new_key_is_found_at_once(issuer: TokenIssuer, door: JwtAuthenticator) -> None:
    old = issuer.token()
    assert await passes(door, old)
    issuer.rotate(keeps_old=True)
    assert await passes(door, issuer.token())
    assert await passes(door, old)
    assert issuer.fetches == 2


async def test_an_unknown_name_costs_one_request_in_ten_seconds(
    issuer: TokenIssuer, door: JwtAuthenticator, clock: FakeClock
) -> None:
    assert await passes(door, issuer.token())
    strangers = [SigningKey(kid=f"stranger-{number}").token(issuer.claims()) for number in range(30)]
    assert not any(await asyncio.gather(*(passes(door, token) for token in strangers)))
    for token in strangers:
        assert not await passes(door, token)
    assert issuer.fetches == 2
    issuer.rotate(keeps_old=True)
    pass_time(issuer, clock, AGAIN_S - 0.1)
    assert not await passes(door, issuer.token())
    assert issuer.fetches == 2
    pass_time(issuer, clock, 0.1)
    assert await passes(door, issuer.token())
    assert issuer.fetches == 3


async def test_an_unknown_name_at_the_very_first_costs_no_second_request(
    issuer: TokenIssuer, door: JwtAuthenticator
) -> None:
    assert not await passes(door, SigningKey(kid="stranger").token(issuer.claims()))
    assert issuer.fetches == 1


async def test_keys_are_fetched_again_in_the_background(
    issuer: TokenIssuer, door: JwtAuthenticator, clock: FakeClock
) -> None:
    old = issuer.key
    assert await passes(door, issuer.token())
    issuer.rotate()
    pass_time(issuer, clock, FRESH_S - 1)
    assert await passes(door, old.token(issuer.claims()))
    assert issuer.fetches == 1
    pass_time(issuer, clock, 1)
    assert await passes(door, old.token(issuer.claims()))
    await fetched(issuer, 2)
    assert not await passes(door, old.token(issuer.claims(sub="bob")))


async def test_old_keys_do_not_serve_before_they_are_confirmed(
    issuer: TokenIssuer, door: JwtAuthenticator, clock: FakeClock
) -> None:
    old = issuer.key
    assert await passes(door, issuer.token())
    issuer.rotate()
    pass_time(issuer, clock, OLD_S)
    assert not await passes(door, old.token(issuer.claims()))
    assert issuer.fetches == 2


async def test_what_was_proved_with_a_key_ends_with_it(
    issuer: TokenIssuer, door: JwtAuthenticator, clock: FakeClock
) -> None:
    old = issuer.token()
    assert await passes(door, old)
    issuer.rotate()
    assert await passes(door, issuer.token())
    assert not await passes(door, old)


async def test_without_an_issuer_nothing_is_known_until_it_is_back(
    issuer: TokenIssuer, door: JwtAuthenticator, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    issuer.answers(DOWN)
    for _ in range(20):
        with pytest.raises(Unavailable, match=r"^The token issuer's key set is not available\.$"):
            await door.authenticate(issuer.token())
    assert issuer.fetches == 1
    assert "the token issuer's JWK set cannot be fetched: it answers 503" in caplog.text
    pass_time(issuer, clock, NOTHING_KEPT_AGAIN_S)
    with pytest.raises(Unavailable):
        await door.authenticate(issuer.token())
    assert issuer.fetches == 2
    issuer.recovers()
    pass_time(issuer, clock, NOTHING_KEPT_AGAIN_S)
    assert await passes(door, issuer.token())
    assert issuer.fetches == 3


async def test_kept_keys_outlive_an_outage_for_an_hour(
    issuer: TokenIssuer, door: JwtAuthenticator, clock: FakeClock
) -> None:
    assert await passes(door, issuer.token())
    issuer.answers(DOWN)
    waited_s = 0.0
    while waited_s < STALE_MAX_S - FRESH_S:
        pass_time(issuer, clock, FRESH_S)
        waited_s += FRESH_S
        assert await passes(door, issuer.token())
        await fetched(issuer, 1 + round(waited_s / FRESH_S))
    pass_time(issuer, clock, FRESH_S - 1)
    assert await passes(door, issuer.token())
    pass_time(issuer, clock, 1)
    with pytest.raises(Unavailable):
        await door.authenticate(issuer.token())
    issuer.recovers()
    pass_time(issuer, clock, NOTHING_KEPT_AGAIN_S)
    assert await passes(door, issuer.token())


async def test_in_an_outage_the_keys_are_tried_every_ten_seconds(
    issuer: TokenIssuer, door: JwtAuthenticator, clock: FakeClock
) -> None:
    assert await passes(door, issuer.token())
    issuer.answers(DOWN)
    pass_time(issuer, clock, FRESH_S)
    for times in (2, 3):
        for _ in range(10):
            assert await passes(door, issuer.token())
            await fetched(issuer, times)
        pass_time(issuer, clock, AGAIN_S)
    issuer.recovers()
    assert await passes(door, issuer.token())
    await fetched(issuer, 4)
    pass_time(issuer, clock, FRESH_S - 1)
    assert await passes(door, issuer.token())
    assert issuer.fetches == 4


async def test_an_unknown_name_cannot_be_judged_in_an_outage(issuer: TokenIssuer, door: JwtAuthenticator) -> None:
    assert await passes(door, issuer.token())
    issuer.rotate()
    issuer.answers(DOWN)
    for _ in range(5):
        with pytest.raises(Unavailable):
            await door.authenticate(issuer.token())
    assert issuer.fetches == 2


async def test_an_issuer_that_withdraws_all_keys_is_heard(issuer: TokenIssuer, door: JwtAuthenticator) -> None:
    token = issuer.token()
    assert await passes(door, token)
    issuer.published = []
    assert not await passes(door, SigningKey(kid="stranger").token(issuer.claims()))
    assert not await passes(door, token)


async def test_a_fault_of_ours_leaves_nobody_waiting(clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    async def fetch() -> KeySet:
        raise ZeroDivisionError

    keys = IssuerKeys(fetch, clock)
    with pytest.raises(Unavailable):
        await keys.for_kid("key-1")
    assert "ZeroDivisionError" in caplog.text


async def test_closing_ends_what_is_under_way(issuer: TokenIssuer, clock: FakeClock) -> None:
    async def silent(seen: Seen, wire: Wire) -> None:
        await wire.until_gone()

    issuer.answers(silent)
    keys = IssuerKeys(JwksEndpoint(issuer.url).fetch, clock)
    waiting = asyncio.create_task(keys.for_kid("key-1"))
    await issuer.server.until(lambda: issuer.fetches == 1)
    await keys.aclose()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await issuer.server.until(lambda: not issuer.server.open_connections)


async def test_it_is_asked_in_the_open(issuer: TokenIssuer) -> None:
    assert len((await JwksEndpoint(issuer.url).fetch()).keys) == 1
    [request] = issuer.server.requests
    assert request.method == "GET"
    assert request.headers["accept"] == "application/jwk-set+json, application/json"
    assert request.headers["accept-encoding"] == "identity"
    assert "authorization" not in request.headers
    assert "cookie" not in request.headers


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(404, b"{}"), "it answers 404"),
        (Reply(204, b""), "it answers 204"),
        (Reply(headers=(("Content-Encoding", "gzip"),)), "encoded"),
        (Reply(body=b" " * (DOCUMENT_LIMIT_BYTES + 1)), f"over {DOCUMENT_LIMIT_BYTES} bytes"),
        (Reply(body=b" " * (DOCUMENT_LIMIT_BYTES + 1), chunked=True), f"over {DOCUMENT_LIMIT_BYTES} bytes"),
        (Reply(body=b"<html>"), "not JSON"),
        (Reply(reset_after=20), "cannot be reached"),
        (Reply(raw=b"SSH-2.0-OpenSSH\r\n\r\n", close=True), "cannot be reached"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_what_no_key_set_comes_from(issuer: TokenIssuer, reply: Reply, reason: str) -> None:
    issuer.answers(reply)
    with pytest.raises(KeySetUnavailable, match=reason):
        await JwksEndpoint(issuer.url).fetch()


async def test_an_endless_answer_is_given_up_on(issuer: TokenIssuer) -> None:
    issuer.answers(Reply(drip_s=0.05))
    with pytest.raises(KeySetUnavailable, match=r"does not answer within 0\.3 s"):
        await JwksEndpoint(issuer.url, timeout_s=0.3).fetch()
    await issuer.server.until(lambda: not issuer.server.open_connections)


async def test_redirects_are_not_followed(issuer: TokenIssuer) -> None:
    async with serve_agent(Reply(body=json.dumps({"keys": issuer.published}).encode())) as other:
        for status in (301, 302, 307, 308):
            issuer.answers(Reply(status, b"", (("Location", other.url),)))
            with pytest.raises(KeySetUnavailable, match=f"it answers {status}"):
                await JwksEndpoint(issuer.url).fetch()
        assert other.connections == 0


async def test_nobody_listens() -> None:
    async with serve_agent() as gone:
        url = gone.url
    with pytest.raises(KeySetUnavailable, match="cannot be reached"):
        await JwksEndpoint(url).fetch()


async def test_what_is_skipped_is_said_once(
    issuer: TokenIssuer, door: JwtAuthenticator, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    issuer.published = [*issuer.published, {"kty": "AKP"}]
    assert await passes(door, issuer.token())
    pass_time(issuer, clock, OLD_S)
    assert await passes(door, issuer.token())
    assert issuer.fetches == 2
    assert [record.getMessage() for record in caplog.records if "not used" in record.getMessage()] == [
        "of the token issuer's JWK set, not used: key 2 is of no kind that is used here: "
        "RSA, EC with P-256, OKP with Ed25519"
    ]
