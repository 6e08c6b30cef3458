"""Tokens by client credentials: asked for once, kept, shared with nobody, replaced once after a 401."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from uuid import UUID

import pytest

from agents import Agent, Issuer, Reply, Seen, serve_agent
from external_agents.adapters.webhook import oauth2
from external_agents.adapters.webhook.transport import WebhookTransport
from external_agents.domain.auth import FixedHeaders
from external_agents.domain.invocation import ErrorCode, Outcome
from external_agents.domain.retry import is_retried
from webhooks import MovableClock, client_of, open_transport, request_to


@pytest.fixture
def clock() -> MovableClock:
    return MovableClock()


@pytest.fixture
async def transport(clock: MovableClock) -> AsyncIterator[WebhookTransport]:
    async with open_transport(clock=clock) as transport:
        yield transport


def tokens_seen(agent: Agent) -> list[str]:
    return [seen.headers["authorization"] for seen in agent.requests_at("/hook")]


class TestAsking:
    async def test_the_agent_receives_the_token(self, transport: WebhookTransport, agent_server: Agent):
        token_url = agent_server.at("/token", Issuer())
        credentials = client_of(token_url, scope="read write", audience="https://api.example/")
        outcome = await transport.exchange(request_to(agent_server.url, credentials=credentials))
        assert outcome.error is None
        assert tokens_seen(agent_server) == ["Bearer token-1"]
        (asked,) = agent_server.requests_at("/token")
        assert asked.method == "POST"
        assert asked.headers["content-type"] == "application/x-www-form-urlencoded"
        assert asked.headers["accept"] == "application/json"
        assert asked.headers["authorization"] == f"Basic {base64.b64encode(b'kaizen:s3cret').decode()}"
        assert asked.form == {
            "grant_type": "client_credentials",
            "scope": "read write",
            "audience": "https://api.example/",
        }
        assert "idempotency-key" not in asked.headers

    async def test_nothing_is_sent_that_was_not_set(self, transport: WebhookTransport, agent_server: Agent):
        await transport.exchange(
            request_to(agent_server.url, credentials=client_of(agent_server.at("/token", Issuer())))
        )
        assert agent_server.requests_at("/token")[0].form == {"grant_type": "client_credentials"}

    async def test_id_and_secret_are_urlencoded_first(self, transport: WebhookTransport, agent_server: Agent):
        issuer = Issuer(client_id="a:b c", client_secret="ü%:+ ", takes=frozenset({"basic"}))
        credentials = client_of(agent_server.at("/token", issuer), client_id="a:b c", client_secret="ü%:+ ")
        assert (await transport.exchange(request_to(agent_server.url, credentials=credentials))).error is None
        shown = agent_server.requests_at("/token")[0].headers["authorization"].removeprefix("Basic ")
        assert base64.b64decode(shown) == b"a%3Ab+c:%C3%BC%25%3A%2B+"

    @pytest.mark.parametrize(
        "refusal",
        [
            Reply(401, b'{"error": "access_denied"}'),
            Reply(400, b'{"error": "invalid_client"}'),
            Reply(400, b'{"error": "invalid_request"}'),
            Reply(400, b"who are you?"),
        ],
    )
    async def test_an_endpoint_that_takes_the_secret_in_the_body_alone(self, transport, agent_server: Agent, refusal):
        issuer = Issuer(takes=frozenset({"body"}), expires_in=0)

        def answer(seen: Seen) -> Reply:
            return refusal if "authorization" in seen.headers else issuer(seen)

        credentials = client_of(agent_server.at("/token", answer))
        for _ in range(3):
            assert (await transport.exchange(request_to(agent_server.url, credentials=credentials))).error is None
        assert ["authorization" in seen.headers for seen in agent_server.requests_at("/token")] == [
            *(True, False),  # found out once,
            *(False, False),  # remembered from then on.
        ]

    @pytest.mark.parametrize("error", ["invalid_scope", "unauthorized_client", "unsupported_grant_type"])
    async def test_a_refusal_of_something_else_is_not_tried_again(self, transport, agent_server: Agent, error: str):
        credentials = client_of(agent_server.at("/token", Reply(400, b'{"error": "%b"}' % error.encode())))
        outcome = await transport.exchange(request_to(agent_server.url, credentials=credentials))
        assert outcome.message == f"The token endpoint answered 400 ({error})."
        assert len(agent_server.requests_at("/token")) == 1


class TestKeeping:
    @pytest.mark.parametrize(
        ("expires_in", "kept_s"),
        [(3600, 3570), ("3600", 3570), (100, 90), (None, 54), ("soon", 54), ([], 54), (1e300, 86370)],
    )
    async def test_until_shortly_before_it_expires(self, transport, clock, agent_server: Agent, expires_in, kept_s):
        credentials = client_of(agent_server.at("/token", Issuer(expires_in=expires_in)))
        for ahead_s in (0, 0, kept_s - 25 if kept_s > 60 else kept_s - 45):
            clock.ahead_s += ahead_s
            await transport.exchange(request_to(agent_server.url, credentials=credentials))
        assert tokens_seen(agent_server) == ["Bearer token-1"] * 3
        clock.ahead_s = kept_s + 1
        await transport.exchange(request_to(agent_server.url, credentials=credentials))
        assert tokens_seen(agent_server)[3:] == ["Bearer token-2"]

    @pytest.mark.parametrize("expires_in", [0, -5, "0"])
    async def test_not_at_all_when_it_has_expired(self, transport, agent_server: Agent, expires_in):
        credentials = client_of(agent_server.at("/token", Issuer(expires_in=expires_in)))
        for _ in range(2):
            assert (await transport.exchange(request_to(agent_server.url, credentials=credentials))).error is None
        assert tokens_seen(agent_server) == ["Bearer token-1", "Bearer token-2"]

    @pytest.mark.parametrize(
        "other",
        [
            {"org_id": "other"},
            {"agent_id": UUID(int=7)},
            {"client_id": "other"},
            {"client_secret": "other"},
            {"scope": "other"},
            {"audience": "other"},
        ],
    )
    async def test_for_nobody_else(self, transport: WebhookTransport, agent_server: Agent, other: dict):
        counter = iter(range(1, 9))
        token_url = agent_server.at("/token", lambda seen: _token(f"token-{next(counter)}"))
        request_fields = {name: value for name, value in other.items() if name in {"org_id", "agent_id"}}
        client_fields = {name: value for name, value in other.items() if name not in request_fields}
        for fields, client in (({}, {}), (request_fields, client_fields), ({}, {})):
            await transport.exchange(request_to(agent_server.url, credentials=client_of(token_url, **client), **fields))
        assert tokens_seen(agent_server) == ["Bearer token-1", "Bearer token-2", "Bearer token-1"]

    async def test_a_bounded_number(self, agent_server: Agent, monkeypatch):
        async with open_transport() as transport:
            monkeypatch.setattr(transport._tokens, "_tokens_max", 2)
            credentials = client_of(agent_server.at("/token", Issuer()))
            for number in (1, 2, 1, 3, 1, 2):
                request = request_to(agent_server.url, credentials=credentials, agent_id=UUID(int=number))
                await transport.exchange(request)
        assert [text.removeprefix("Bearer token-") for text in tokens_seen(agent_server)] == list("121314")


class TestSingleFlight:
    async def test_many_at_once_share_one_request(self, transport: WebhookTransport, agent_server: Agent):
        may_answer = asyncio.Event()
        credentials = client_of(agent_server.at("/token", Issuer(wait_for=may_answer)))
        request = request_to(agent_server.url, credentials=credentials)
        exchanges = [asyncio.create_task(transport.exchange(request)) for _ in range(100)]
        await agent_server.until(lambda: len(agent_server.requests) == 1)
        may_answer.set()
        assert {outcome.error for outcome in await asyncio.gather(*exchanges)} == {None}
        assert tokens_seen(agent_server) == ["Bearer token-1"] * 100
        assert len(agent_server.requests_at("/token")) == 1

    async def test_one_who_goes_away_takes_nothing_from_the_others(self, transport, agent_server: Agent):
        may_answer = asyncio.Event()
        credentials = client_of(agent_server.at("/token", Issuer(wait_for=may_answer)))
        first = asyncio.create_task(transport.exchange(request_to(agent_server.url, credentials=credentials)))
        await agent_server.until(lambda: len(agent_server.requests) == 1)
        hasty = request_to(agent_server.url, credentials=credentials, timeout_s=0.05)
        patient = asyncio.create_task(transport.exchange(request_to(agent_server.url, credentials=credentials)))
        outcome = await transport.exchange(hasty)
        message = "The token endpoint did not answer in time."
        assert outcome == Outcome(error=ErrorCode.TIMEOUT, message=message, may_have_run=False)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        may_answer.set()
        assert (await patient).error is None
        assert len(agent_server.requests_at("/token")) == 1

    async def test_a_failure_is_shared_and_not_kept(self, transport: WebhookTransport, agent_server: Agent):
        may_answer = asyncio.Event()
        token_url = agent_server.at("/token", Reply(503, b"", wait_for=may_answer), Issuer())
        request = request_to(agent_server.url, credentials=client_of(token_url))
        exchanges = [asyncio.create_task(transport.exchange(request)) for _ in range(10)]
        await agent_server.until(lambda: len(agent_server.requests) == 1)
        may_answer.set()
        assert {outcome.error for outcome in await asyncio.gather(*exchanges)} == {ErrorCode.AGENT_AUTH_FAILED}
        assert (await transport.exchange(request)).error is None
        assert len(agent_server.requests_at("/token")) == 2


class TestA401:
    async def test_the_token_is_replaced_once(self, transport: WebhookTransport, agent_server: Agent):
        agent_server.answers(Reply(401), Reply())
        credentials = client_of(agent_server.at("/token", Issuer()))
        for _ in range(2):
            assert (await transport.exchange(request_to(agent_server.url, credentials=credentials))).error is None
        assert tokens_seen(agent_server) == ["Bearer token-1", "Bearer token-2", "Bearer token-2"]

    async def test_a_second_one_ends_it(self, transport: WebhookTransport, agent_server: Agent):
        agent_server.answers(Reply(401, b'{"why": "no"}'))
        credentials = client_of(agent_server.at("/token", Issuer()))
        outcome = await transport.exchange(request_to(agent_server.url, credentials=credentials))
        assert (outcome.error, outcome.status) == (ErrorCode.AGENT_AUTH_FAILED, 401)
        assert (outcome.may_have_run, is_retried(outcome)) == (False, False)
        assert outcome.message == "The agent answered 401, to a new token as well."
        assert tokens_seen(agent_server) == ["Bearer token-1", "Bearer token-2"]

    async def test_another_failure_after_it_is_itself(self, transport: WebhookTransport, agent_server: Agent):
        agent_server.answers(Reply(401), Reply(500))
        credentials = client_of(agent_server.at("/token", Issuer()))
        outcome = await transport.exchange(request_to(agent_server.url, credentials=credentials))
        assert (outcome.error, outcome.status) == (ErrorCode.HTTP_STATUS, 500)

    async def test_one_that_is_too_large_is_one_all_the_same(self, transport: WebhookTransport, agent_server: Agent):
        agent_server.answers(Reply(401, b"x" * 200_000), Reply())
        credentials = client_of(agent_server.at("/token", Issuer()))
        assert (await transport.exchange(request_to(agent_server.url, credentials=credentials))).error is None

    async def test_no_token_is_asked_for_without_need(self, transport: WebhookTransport, agent_server: Agent):
        agent_server.answers(Reply(401))
        token_url = agent_server.at("/token", Issuer())
        credentials = FixedHeaders({"Authorization": "Bearer mine"})
        outcome = await transport.exchange(request_to(agent_server.url, credentials=credentials))
        assert (outcome.error, outcome.status) == (ErrorCode.HTTP_STATUS, 401)
        assert len(agent_server.requests) == 1
        assert token_url

    @pytest.mark.parametrize("same_text", [False, True])
    async def test_a_hundred_at_once_cause_one_replacement(self, transport, agent_server: Agent, same_text: bool):
        """Whether a 401 comes before or after the replacement; even when the provider gives the same text again."""
        early, late = asyncio.Event(), asyncio.Event()
        issued = iter(range(1, 9))
        token_url = agent_server.at("/token", lambda seen: _token("same" if same_text else f"token-{next(issued)}"))

        def answer(seen: Seen) -> Reply:
            number = len(agent_server.requests_at("/hook"))
            if number <= 100:
                return Reply(401, wait_for=early if number <= 50 else late)
            return Reply(401 if same_text else 200)

        agent_server.answers(answer)
        request = request_to(agent_server.url, credentials=client_of(token_url))
        exchanges = [asyncio.create_task(transport.exchange(request)) for _ in range(100)]
        await agent_server.until(lambda: len(agent_server.requests_at("/hook")) == 100)
        early.set()
        await agent_server.until(lambda: len(agent_server.requests_at("/hook")) == 150)
        late.set()
        expected = ErrorCode.AGENT_AUTH_FAILED if same_text else None
        assert {outcome.error for outcome in await asyncio.gather(*exchanges)} == {expected}
        assert len(agent_server.requests_at("/token")) == 2
        assert len(agent_server.requests_at("/hook")) == 200


class TestFailures:
    @pytest.mark.parametrize(
        ("reply", "message"),
        [
            (Reply(401, b'{"error": "invalid_client"}'), "The token endpoint answered 401 (invalid_client)."),
            (Reply(400, b'{"error": "<script>"}'), "The token endpoint answered 400."),
            (Reply(403, b"s3cret"), "The token endpoint answered 403."),
            (Reply(302, headers=(("Location", "/elsewhere"),)), "The token endpoint answered 302."),
            (Reply(501), "The token endpoint answered 501."),
            (Reply(200, b"not json"), "The token endpoint gave no usable token."),
            (Reply(200, b"[]"), "The token endpoint gave no usable token."),
            (Reply(200, b"{}"), "The token endpoint gave no usable token."),
            (Reply(204, b""), "The token endpoint gave no usable token."),
            (Reply(200, b'{"access_token": ""}'), "The token endpoint gave no usable token."),
            (Reply(200, b'{"access_token": 7}'), "The token endpoint gave no usable token."),
            (Reply(200, b'{"access_token": "a\\r\\nX-Evil: 1"}'), "The token endpoint gave no usable token."),
            (Reply(200, b'{"access_token": "%b"}' % (b"x" * 8193)), "The token endpoint gave no usable token."),
            (Reply(200, b'{"access_token": "t", "token_type": "mac"}'), "The token endpoint gave no bearer token."),
            (Reply(200, b" " * 65537), "The token endpoint's answer has over 65536 bytes."),
            (
                Reply(headers=(("Content-Encoding", "gzip"),)),
                "The token endpoint's answer has a content coding, which was not asked for.",
            ),
        ],
    )
    async def test_an_endpoint_that_gives_none(self, transport, agent_server: Agent, reply: Reply, message: str):
        credentials = client_of(agent_server.at("/token", reply))
        outcome = await transport.exchange(request_to(agent_server.url, credentials=credentials))
        assert outcome == Outcome(error=ErrorCode.AGENT_AUTH_FAILED, message=message)
        assert not is_retried(outcome)
        assert agent_server.requests_at("/hook") == []
        assert agent_server.requests_at("/elsewhere") == []

    @pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
    async def test_one_that_may_recover_is_tried_again_later(self, transport, agent_server: Agent, status: int):
        moment = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
        credentials = client_of(agent_server.at("/token", Reply(status, headers=(("Retry-After", moment),))))
        outcome = await transport.exchange(request_to(agent_server.url, credentials=credentials))
        assert (outcome.error, outcome.status) == (ErrorCode.AGENT_AUTH_FAILED, None)
        assert is_retried(outcome)
        assert outcome.retry_after_s == pytest.approx(60, abs=15)

    async def test_one_that_does_not_listen(self, transport: WebhookTransport, agent_server: Agent):
        async with serve_agent() as gone:
            token_url = gone.url_at("/token")
        outcome = await transport.exchange(request_to(agent_server.url, credentials=client_of(token_url)))
        message = "The token endpoint could not be reached."
        assert outcome == Outcome(error=ErrorCode.CONNECTION_FAILED, message=message)

    async def test_one_that_breaks_off(self, transport: WebhookTransport, agent_server: Agent):
        credentials = client_of(agent_server.at("/token", Reply(reset_after=30)))
        outcome = await transport.exchange(request_to(agent_server.url, credentials=credentials))
        message = "The token endpoint gave no complete answer."
        assert outcome == Outcome(error=ErrorCode.CONNECTION_FAILED, message=message, may_have_run=False)

    async def test_one_that_is_slow_for_everybody(self, transport, agent_server: Agent, monkeypatch):
        monkeypatch.setattr(oauth2, "TOKEN_TIMEOUT_S", 0.2)
        credentials = client_of(agent_server.at("/token", Reply(wait_for=asyncio.Event())))
        outcome = await transport.exchange(request_to(agent_server.url, credentials=credentials))
        message = "The token endpoint did not answer in time."
        assert outcome == Outcome(error=ErrorCode.TIMEOUT, message=message, may_have_run=False)

    async def test_a_deadline_while_the_token_is_replaced(self, transport: WebhookTransport, agent_server: Agent):
        """The agent's 401 was a complete answer: it has not run."""
        agent_server.answers(Reply(401))
        credentials = client_of(agent_server.at("/token", Issuer(), Reply(wait_for=asyncio.Event())))
        outcome = await transport.exchange(request_to(agent_server.url, credentials=credentials, timeout_s=1))
        assert (outcome.error, outcome.may_have_run) == (ErrorCode.TIMEOUT, False)


def _token(text: str) -> Reply:
    return Reply(body=b'{"access_token": "%b", "token_type": "bearer", "expires_in": 3600}' % text.encode())
