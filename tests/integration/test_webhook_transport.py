"""What goes to an agent, what its answer amounts to, and the connections in between. The agent is a real one."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from importlib.metadata import version
from pathlib import Path

import pytest

from agents import Agent, Reply, Seen, Wire, serve_agent
from external_agents.adapters.webhook.transport import WebhookTransport
from external_agents.domain.auth import API_KEY, BASIC, BEARER, CUSTOM, NONE, FixedHeaders
from external_agents.domain.invocation import ErrorCode, Outcome
from external_agents.domain.retry import is_retried
from webhooks import open_transport, request_to


@pytest.fixture
async def transport() -> AsyncIterator[WebhookTransport]:
    async with open_transport() as transport:
        yield transport


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class TestWhatTheAgentReceives:
    @pytest.mark.parametrize(
        "body",
        [
            b'{"b":1.10,"a" : 12345678901234567890123, "b": 1e400}',
            b'\n "\xc3\xbc \\ud800 \\u0000" ',
            b"null",
            b"[]",
            b'"' + b"x" * 1_000_000 + b'"',
        ],
    )
    async def test_the_payload_byte_for_byte(self, transport: WebhookTransport, agent_server: Agent, body: bytes):
        outcome = await transport.exchange(request_to(agent_server.url, body=body))
        assert outcome.error is None
        (seen,) = agent_server.requests
        assert seen.method == "POST"
        assert seen.body == body
        assert seen.headers["content-type"] == "application/json"
        assert seen.headers["content-length"] == str(len(body))

    async def test_the_headers_of_the_request_and_no_others(self, transport: WebhookTransport, agent_server: Agent):
        headers = {"Idempotency-Key": "018f", "traceparent": "00-ab-cd-01"}
        await transport.exchange(request_to(agent_server.url, headers=headers))
        (seen,) = agent_server.requests
        assert seen.headers == {
            "host": f"127.0.0.1:{agent_server.port}",
            "accept": "*/*",
            "accept-encoding": "identity",
            "user-agent": f"external-agents/{version('external-agents')}",
            "content-type": "application/json",
            "content-length": "18",
            "idempotency-key": "018f",
            "traceparent": "00-ab-cd-01",
        }
        assert len(seen.raw_headers) == len(seen.headers)

    @pytest.mark.parametrize(
        ("scheme", "config", "name", "value"),
        [
            (API_KEY, {"key": "k-1", "header_name": "X-API-Key"}, "x-api-key", "k-1"),
            (BEARER, {"token": "t-1"}, "authorization", "Bearer t-1"),
            (BASIC, {"username": "ü", "password": "p:w"}, "authorization", "Basic w7w6cDp3"),
            (CUSTOM, {"headers": {"X-One": "1"}, "other": [2]}, "x-one", "1"),
            (CUSTOM, {"headers": {"User-Agent": "mine", "ACCEPT": "text/plain"}}, "user-agent", "mine"),
            (NONE, {}, "authorization", None),
        ],
    )
    async def test_the_credentials(self, transport, agent_server: Agent, scheme, config, name, value):
        await transport.exchange(request_to(agent_server.url, credentials=scheme.credentials(config)))
        (seen,) = agent_server.requests
        assert seen.headers.get(name) == value

    async def test_credentials_cannot_replace_what_the_exchange_stands_on(self, transport, agent_server: Agent):
        theirs = {"Accept-Encoding": "gzip", "content-TYPE": "text/plain", "IDEMPOTENCY-key": "theirs"}
        await transport.exchange(
            request_to(agent_server.url, headers={"Idempotency-Key": "ours"}, credentials=FixedHeaders(theirs))
        )
        (seen,) = agent_server.requests
        assert seen.headers["accept-encoding"] == "identity"
        assert seen.headers["content-type"] == "application/json"
        assert seen.headers["idempotency-key"] == "ours"

    async def test_credentials_never_steer_the_connection_or_what_we_vouch_for(self, transport, agent_server: Agent):
        """Whatever made them: an auth type of somebody else's may check nothing."""
        reserved = (
            "Host Connection Content-Length Content-Type Content-Location Transfer-Encoding TE Trailer Upgrade Expect"
            " Accept-Encoding Cookie Forwarded X-Forwarded-For X-Forwarded- Proxy-Authorization Proxy-Connection"
            " Idempotency-Key traceparent webhook-id webhook-signature"
        ).split()
        spelt = [name for word in reserved for name in (word, word.lower(), word.upper(), word.swapcase())]
        odd = ["", "X:Y", "X Y", "X\r\nHost", "\u017fet", "X\0"]
        theirs = dict.fromkeys([*spelt, *odd], "theirs") | {"X-Fine": "1", "x-fine": "2"}
        await transport.exchange(request_to(agent_server.url, credentials=FixedHeaders(theirs)))
        (seen,) = agent_server.requests
        assert "theirs" not in ", ".join(seen.headers.values())
        assert [value for name, value in seen.raw_headers if name.lower() == b"x-fine"] == [b"2"]
        assert seen.headers["host"] == f"127.0.0.1:{agent_server.port}"

    @pytest.mark.parametrize(
        "path", ["/hook", "/a%7Eb/%41?sp=%2Ftriggers%2Frun&sig=a%2Bb%3D&x='&&", "/%E2%82%AC;p=1", "//double"]
    )
    async def test_the_url_as_it_was_registered(self, transport: WebhookTransport, agent_server: Agent, path: str):
        await transport.exchange(request_to(agent_server.url_at(path)))
        assert [seen.path for seen in agent_server.requests] == [path]

    async def test_no_cookie_comes_back(self, transport: WebhookTransport, agent_server: Agent):
        agent_server.answers(Reply(headers=(("Set-Cookie", "session=1"),)))
        for _ in range(2):
            await transport.exchange(request_to(agent_server.url))
        assert all("cookie" not in seen.headers for seen in agent_server.requests)

    async def test_proxies_and_netrc_of_the_environment_are_ignored(self, agent_server: Agent, tmp_path: Path):
        netrc = tmp_path / "netrc"
        netrc.write_text("default login someone password secret\n")
        netrc.chmod(0o600)
        async with serve_agent() as proxy:
            names = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
            environment = {**os.environ, **dict.fromkeys(names, proxy.url_at("")), "NETRC": str(netrc), "NO_PROXY": ""}
            script = (
                "import asyncio, sys\n"
                "from webhooks import open_transport, request_to\n"
                "async def main():\n"
                "    async with open_transport() as transport:\n"
                "        print((await transport.exchange(request_to(sys.argv[1]))).status)\n"
                "asyncio.run(main())\n"
            )
            environment["PYTHONPATH"] = os.pathsep.join(sys.path)
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", script, agent_server.url),
                env=environment,
                stdout=subprocess.PIPE,
            )
            assert (await process.communicate())[0] == b"200\n"
            assert proxy.connections == 0
        assert "authorization" not in agent_server.requests[0].headers


class TestWhatAnAnswerAmountsTo:
    @pytest.mark.parametrize(
        ("reply", "text"),
        [
            (Reply(body=b'{"n":1.10, "n": 12345678901234567890123}'), '{"n":1.10, "n": 12345678901234567890123}'),
            (Reply(201, b'"x"', chunked=True), '"x"'),
            (Reply(202, b'{"a":"\\u0000"}'), '{"a":"\\u0000"}'),
            (Reply(200, b"[" * 512 + b"]" * 512), "[" * 512 + "]" * 512),
            (Reply(200, b""), "null"),
            (Reply(200, b"", chunked=True), "null"),
            (Reply(204, b""), "null"),
            (Reply(205, b""), "null"),
            (Reply(raw=b"HTTP/1.0 200 OK\r\n\r\n[1]", close=True), "[1]"),
            (Reply(raw=b"HTTP/1.1 200 F\xfcr Sie\r\nX: \xff\r\nContent-Length: 1\r\n\r\n2"), "2"),
            (Reply(raw=b"HTTP/1.1 200\r\nContent-Length: 1\r\n\r\n3"), "3"),
        ],
    )
    async def test_a_json_answer_is_kept_as_it_is(self, transport, agent_server: Agent, reply: Reply, text: str):
        agent_server.answers(reply)
        outcome = await transport.exchange(request_to(agent_server.url))
        assert outcome.error is None
        assert outcome.answer is not None
        assert outcome.answer.text == text

    @pytest.mark.parametrize(
        ("body", "value"),
        [
            (b"OK", "OK"),
            (b"NaN", "NaN"),
            (b'{"a": 1} trailing', '{"a": 1} trailing'),
            (b"nul\0 and \xff\xfe", "nul\0 and \ufffd\ufffd"),
            (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd"),
            (b"[" * 513 + b"]" * 513, "[" * 513 + "]" * 513),
            (b"\n", "\n"),
        ],
    )
    async def test_any_other_answer_is_kept_as_a_string(self, transport, agent_server: Agent, body: bytes, value: str):
        agent_server.answers(Reply(body=body, headers=()))
        outcome = await transport.exchange(request_to(agent_server.url))
        assert outcome.error is None
        assert outcome.answer is not None
        assert outcome.answer.value == value
        outcome.answer.text.encode("utf-8")
        assert "\0" not in outcome.answer.text

    @pytest.mark.parametrize("status", [300, 304, 307, 400, 401, 403, 404, 408, 413, 425, 429, 500, 501, 502, 503, 599])
    async def test_a_status_beyond_2xx_is_told_with_its_answer(self, transport, agent_server: Agent, status: int):
        agent_server.answers(Reply(status, b"" if status == 304 else b'{"error": 1}'))
        outcome = await transport.exchange(request_to(agent_server.url))
        assert (outcome.error, outcome.status, outcome.may_have_run) == (ErrorCode.HTTP_STATUS, status, False)
        assert outcome.message == f"The agent answered {status}."
        assert outcome.answer is not None
        assert outcome.answer.text == ("null" if status == 304 else '{"error": 1}')
        assert is_retried(outcome) == (status in {408, 425, 429, 500, 502, 503, 504})

    async def test_a_redirect_is_not_followed(self, transport: WebhookTransport, agent_server: Agent):
        for status in (301, 302, 303, 307, 308):
            agent_server.answers(Reply(status, headers=(("Location", agent_server.url_at("/elsewhere")),)))
            outcome = await transport.exchange(request_to(agent_server.url))
            assert (outcome.error, outcome.status) == (ErrorCode.HTTP_STATUS, status)
        assert len(agent_server.requests) == 5
        assert agent_server.requests_at("/elsewhere") == []

    @pytest.mark.parametrize(
        ("value", "seconds"),
        [
            ("7", 7.0),
            ("0", 0.0),
            ("-3", 0.0),
            ("1.5", 1.5),
            ("999999999999", 366 * 86400.0),
            ("soon", None),
            ("", None),
        ],
    )
    async def test_retry_after_in_seconds(self, transport, agent_server: Agent, value: str, seconds: float | None):
        agent_server.answers(Reply(503, headers=(("Retry-After", value),)))
        outcome = await transport.exchange(request_to(agent_server.url))
        assert outcome.retry_after_s == seconds

    @pytest.mark.parametrize(("ahead_s", "seconds"), [(90, 90.0), (-90, 0.0)])
    async def test_retry_after_as_a_date(self, transport, agent_server: Agent, ahead_s: int, seconds: float):
        moment = format_datetime(datetime.now(UTC) + timedelta(seconds=ahead_s), usegmt=True)
        agent_server.answers(Reply(429, headers=(("Retry-After", moment),)))
        outcome = await transport.exchange(request_to(agent_server.url))
        assert outcome.retry_after_s == pytest.approx(seconds, abs=15.0)


class TestWhenThereIsNoAnswer:
    async def test_nobody_listens(self, transport: WebhookTransport):
        outcome = await transport.exchange(request_to(f"http://127.0.0.1:{closed_port()}/"))
        assert outcome == Outcome(error=ErrorCode.CONNECTION_FAILED, message="The agent could not be reached.")
        assert is_retried(outcome)

    async def test_the_name_is_unknown(self):
        async with open_transport(resolve=_no_names) as transport:
            outcome = await transport.exchange(request_to("http://agent.example/"))
        message = "The agent has a name that could not be resolved."
        assert outcome == Outcome(error=ErrorCode.CONNECTION_FAILED, message=message)

    async def test_no_time_is_left(self, transport: WebhookTransport, agent_server: Agent):
        assert (await transport.exchange(request_to(agent_server.url))).error is None
        for timeout_s in (0.0, -1.0):
            outcome = await transport.exchange(request_to(agent_server.url, timeout_s=timeout_s))
            message = "There was no time left to reach the agent."
            assert outcome == Outcome(error=ErrorCode.TIMEOUT, message=message, may_have_run=False)
        assert len(agent_server.requests) == 1

    async def test_the_agent_is_too_slow(self, transport: WebhookTransport, agent_server: Agent):
        agent_server.answers(Reply(wait_for=asyncio.Event()))
        outcome = await transport.exchange(request_to(agent_server.url, timeout_s=1))
        assert (outcome.error, outcome.may_have_run) == (ErrorCode.TIMEOUT, True)
        assert is_retried(outcome)

    async def test_the_name_takes_too_long(self):
        async def never(host: str, org_id: str) -> list:
            await asyncio.Event().wait()
            return []

        async with open_transport(resolve=never) as transport:
            outcome = await transport.exchange(request_to("http://agent.example/", timeout_s=1))
        assert (outcome.error, outcome.may_have_run) == (ErrorCode.TIMEOUT, False)

    async def test_a_caller_who_is_cancelled_is_cancelled(self, transport: WebhookTransport, agent_server: Agent):
        held_back = asyncio.Event()
        agent_server.answers(Reply(wait_for=held_back))
        exchange = asyncio.create_task(transport.exchange(request_to(agent_server.url)))
        await agent_server.until(lambda: len(agent_server.requests) == 1)
        exchange.cancel()
        with pytest.raises(asyncio.CancelledError):
            await exchange
        held_back.set()
        await agent_server.until(lambda: agent_server.open_connections == 0)


class TestConnections:
    async def test_one_is_kept_for_the_next_exchange(self, transport: WebhookTransport, agent_server: Agent):
        for _ in range(5):
            assert (await transport.exchange(request_to(agent_server.url))).error is None
        assert [seen.connection for seen in agent_server.requests] == [1] * 5

    async def test_one_that_the_agent_has_closed_is_not_used_again(self, transport, agent_server: Agent):
        assert (await transport.exchange(request_to(agent_server.url))).error is None
        agent_server.drop_connections()
        await agent_server.until(lambda: agent_server.open_connections == 0)
        assert (await transport.exchange(request_to(agent_server.url))).error is None
        assert agent_server.connections == 2

    async def test_a_post_is_never_sent_again_by_itself(self, transport: WebhookTransport, agent_server: Agent):
        """The agent closes a kept connection just as the second request arrives: nobody knows whether it ran."""
        agent_server.answers(Reply(), _hang_up)
        assert (await transport.exchange(request_to(agent_server.url))).error is None
        outcome = await transport.exchange(request_to(agent_server.url))
        assert (outcome.error, outcome.may_have_run) == (ErrorCode.CONNECTION_FAILED, True)
        assert outcome.message == "The agent gave no complete answer."
        assert [seen.connection for seen in agent_server.requests] == [1, 1]

    async def test_one_is_given_up_after_its_lifetime(self, transport, agent_server: Agent, monkeypatch):
        for _ in range(2):
            await transport.exchange(request_to(agent_server.url))
        monkeypatch.setattr("external_agents.adapters.webhook.connector.LIFETIME_MAX_S", 0.0)
        for _ in range(2):
            assert (await transport.exchange(request_to(agent_server.url))).error is None
        assert [seen.connection for seen in agent_server.requests] == [1, 1, 2, 3]

    async def test_what_comes_in_while_it_is_idle_ends_it(self, transport: WebhookTransport, agent_server: Agent):
        """Or an agent could answer the next request, perhaps another organisation's, before it is asked."""

        async def answer_twice(seen: Seen, wire: Wire) -> None:
            await wire.send(Reply(body=b'"right"').wire)
            await answered.wait()
            await wire.flood(Reply(body=b'"wrong"').wire * 100)

        answered = asyncio.Event()
        agent_server.answers(answer_twice, Reply(body=b'"right"'))
        for _ in range(2):
            outcome = await transport.exchange(request_to(agent_server.url))
            assert outcome.answer is not None
            assert outcome.answer.value == "right"
            answered.set()
            await agent_server.until(lambda: agent_server.open_connections == agent_server.connections - 1)
        assert agent_server.connections == 2

    async def test_an_answer_after_the_answer_is_dropped(self, transport: WebhookTransport, agent_server: Agent):
        agent_server.answers(
            Reply(raw=Reply(body=b'"right"').wire + Reply(body=b'"wrong"').wire), Reply(body=b'"next"')
        )
        answers = [(await transport.exchange(request_to(agent_server.url))).answer for _ in range(2)]
        assert [answer and answer.value for answer in answers] == ["right", "next"]

    async def test_five_hundred_at_once(self, transport: WebhookTransport, agent_server: Agent):
        everyone_is_here = asyncio.Event()
        agent_server.answers(Reply(wait_for=everyone_is_here))
        requests = [request_to(agent_server.url, body=json.dumps(number)) for number in range(500)]
        exchanges = [asyncio.create_task(transport.exchange(request)) for request in requests]
        await agent_server.until(lambda: len(agent_server.requests) == 500)
        everyone_is_here.set()
        assert {outcome.status for outcome in await asyncio.gather(*exchanges)} == {200}
        assert sorted(seen.json for seen in agent_server.requests) == list(range(500))
        assert agent_server.connections == 500

    async def test_all_are_closed_at_the_end(self, agent_server: Agent):
        async with open_transport() as transport:
            await asyncio.gather(*(transport.exchange(request_to(agent_server.url)) for _ in range(20)))
            assert agent_server.open_connections == 20
        await agent_server.until(lambda: agent_server.open_connections == 0)


async def _no_names(host: str, org_id: str) -> list:
    raise OSError("no such name")


async def _hang_up(seen: Seen, wire: Wire) -> None:
    """The connection is closed in good order, without an answer."""
