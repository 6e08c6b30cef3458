"""Agents that mean harm, or are broken: each costs at most its own exchange."""

from __future__ import annotations

import gzip
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agents import Agent, Reply, Seen, Wire, hasty_agent
from external_agents.adapters.webhook.transport import WebhookTransport
from external_agents.domain.invocation import ErrorCode, Outcome
from external_agents.domain.retry import is_retried
from webhooks import LIMIT_BYTES, open_transport, request_to

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNK = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"


@pytest.fixture
async def transport() -> AsyncIterator[WebhookTransport]:
    async with open_transport() as transport:
        yield transport


def told(outcome: Outcome) -> tuple[ErrorCode | None, int | None, bool]:
    return outcome.error, outcome.status, outcome.may_have_run


def holding(start: bytes) -> Callable[[Seen, Wire], Awaitable[None]]:
    async def answer(seen: Seen, wire: Wire) -> None:
        await wire.send(start)
        await wire.until_gone()

    return answer


def flooding(start: bytes, flood: bytes) -> Callable[[Seen, Wire], Awaitable[None]]:
    async def answer(seen: Seen, wire: Wire) -> None:
        await wire.send(start)
        await wire.flood(flood)

    return answer


class TestSize:
    @pytest.mark.parametrize("chunked", [False, True])
    @pytest.mark.parametrize("length", [LIMIT_BYTES - 1, LIMIT_BYTES])
    async def test_the_limit_itself_is_taken(self, transport, agent_server: Agent, length: int, chunked: bool):
        agent_server.answers(Reply(body=b"x" * length, chunked=chunked))
        outcome = await transport.exchange(request_to(agent_server.url))
        assert told(outcome) == (None, 200, False)
        assert outcome.answer is not None
        assert outcome.answer.value == "x" * length

    @pytest.mark.parametrize(("status", "may_have_run"), [(200, True), (299, True), (302, False), (503, False)])
    @pytest.mark.parametrize("chunked", [False, True])
    async def test_a_byte_more_is_refused(
        self, transport, agent_server, chunked: bool, status: int, may_have_run: bool
    ):
        agent_server.answers(Reply(status, b"x" * (LIMIT_BYTES + 1), chunked=chunked))
        outcome = await transport.exchange(request_to(agent_server.url))
        assert told(outcome) == (ErrorCode.RESPONSE_TOO_LARGE, status, may_have_run)
        assert outcome.message == f"The agent's answer has over {LIMIT_BYTES} bytes."
        assert outcome.answer is None
        assert not is_retried(outcome)

    @pytest.mark.parametrize("length", ["65537", "9" * 18, "9" * 30, "0" * 400])
    async def test_an_announced_size_is_believed(self, transport, agent_server: Agent, length: str):
        """The agent never sends a body; waiting for it would end in a timeout."""
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n".encode()
        agent_server.answers(holding(head))
        outcome = await transport.exchange(request_to(agent_server.url, timeout_s=15))
        assert outcome.error in {ErrorCode.RESPONSE_TOO_LARGE, ErrorCode.CONNECTION_FAILED}

    @pytest.mark.parametrize(
        "answer",
        [
            flooding(HEAD, CHUNK),
            flooding(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65536),
            flooding(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", b"x" * 65536),
        ],
        ids=["chunked", "until closed", "announced"],
    )
    async def test_an_endless_answer_is_cut_off(self, transport, agent_server: Agent, answer):
        agent_server.answers(answer)
        outcome = await transport.exchange(request_to(agent_server.url))
        assert told(outcome) == (ErrorCode.RESPONSE_TOO_LARGE, 200, True)
        await agent_server.until(lambda: agent_server.open_connections == 0)

    async def test_memory_stays_within_twice_the_limit(self, agent_server: Agent):
        limit_bytes = 1024 * 1024
        agent_server.answers(flooding(HEAD, CHUNK))
        async with open_transport(limit_bytes=limit_bytes) as transport:
            await transport.exchange(request_to(agent_server.url))
            tracemalloc.start()
            try:
                outcome = await transport.exchange(request_to(agent_server.url))
                _, peak_bytes = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
        assert outcome.error is ErrorCode.RESPONSE_TOO_LARGE
        assert peak_bytes < 2 * limit_bytes

    async def test_a_flood_of_one_byte_chunks_is_counted_by_its_bytes(self, transport, agent_server: Agent):
        agent_server.answers(flooding(HEAD, b"1\r\nx\r\n" * 10_000))
        outcome = await transport.exchange(request_to(agent_server.url))
        assert outcome.error is ErrorCode.RESPONSE_TOO_LARGE

    @pytest.mark.parametrize(
        "head",
        [
            b"X-Large: " + b"x" * 20_000 + b"\r\n",
            b"X" * 20_000 + b": 1\r\n",
            (b"X-Many: " + b"x" * 8_000 + b"\r\n") * 100,
        ],
        ids=["value", "name", "all"],
    )
    async def test_headers_are_bounded(self, transport: WebhookTransport, agent_server: Agent, head: bytes):
        agent_server.answers(Reply(raw=b"HTTP/1.1 200 OK\r\n" + head + b"Content-Length: 0\r\n\r\n"))
        outcome = await transport.exchange(request_to(agent_server.url))
        assert told(outcome) == (ErrorCode.RESPONSE_TOO_LARGE, None, True)
        assert outcome.message == "The agent's answer has too much around its body."

    async def test_the_number_of_headers_is_bounded(self, transport: WebhookTransport, agent_server: Agent):
        agent_server.answers(Reply(raw=b"HTTP/1.1 200 OK\r\n" + b"X: 1\r\n" * 1_000 + b"Content-Length: 0\r\n\r\n"))
        outcome = await transport.exchange(request_to(agent_server.url))
        assert told(outcome) == (ErrorCode.CONNECTION_FAILED, None, True)

    @pytest.mark.parametrize(
        "start",
        [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 ", b"", HEAD + b"0\r\n", HEAD + b"1;"],
        ids=["value", "fields", "reason", "nothing", "trailers", "extension"],
    )
    async def test_an_endless_head_ends(self, transport: WebhookTransport, agent_server: Agent, start: bytes):
        agent_server.answers(flooding(start, b"x: y\r\n" * 1_000 if start.endswith(b"\n") else b"x" * 10_000))
        outcome = await transport.exchange(request_to(agent_server.url, timeout_s=10))
        assert outcome.error in {ErrorCode.RESPONSE_TOO_LARGE, ErrorCode.CONNECTION_FAILED}
        assert outcome.may_have_run

    async def test_the_pool_is_sound_after_a_refused_answer(self, agent_server: Agent):
        """A complete answer over the limit stands in a buffer, its connection is free already."""
        async with open_transport(limit_bytes=1024) as transport:
            for length in (2_000, 60_000, 200_000, 2_000_000):
                agent_server.answers(Reply(body=b"x" * length, chunked=True), Reply())
                outcomes = [await transport.exchange(request_to(agent_server.url, timeout_s=10)) for _ in range(2)]
                assert [outcome.error for outcome in outcomes] == [ErrorCode.RESPONSE_TOO_LARGE, None]


class TestEncoding:
    @pytest.mark.parametrize(("status", "may_have_run"), [(200, True), (503, False)])
    @pytest.mark.parametrize(
        "headers",
        [
            [("Content-Encoding", "gzip")],
            [("content-encoding", "br")],
            [("Content-Encoding", "identity, GZIP")],
            [("Content-Encoding", "identity"), ("Content-Encoding", "deflate")],
            [("Content-Encoding", "x-unheard-of")],
        ],
    )
    async def test_an_encoded_answer_is_refused(self, transport, agent_server, headers, status, may_have_run):
        agent_server.answers(Reply(status, gzip.compress(b"{}"), headers=tuple(headers)))
        outcome = await transport.exchange(request_to(agent_server.url))
        assert told(outcome) == (ErrorCode.RESPONSE_ENCODED, status, may_have_run)
        assert not is_retried(outcome)

    @pytest.mark.parametrize("coding", ["identity", "Identity", "", "identity,identity"])
    async def test_identity_is_no_encoding(self, transport, agent_server: Agent, coding: str):
        agent_server.answers(Reply(headers=(("Content-Encoding", coding),)))
        assert (await transport.exchange(request_to(agent_server.url))).error is None

    async def test_a_transfer_coding_is_refused_too(self, transport: WebhookTransport, agent_server: Agent):
        raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
        agent_server.answers(Reply(raw=raw))
        outcome = await transport.exchange(request_to(agent_server.url))
        assert outcome.error in {ErrorCode.RESPONSE_ENCODED, ErrorCode.CONNECTION_FAILED}
        assert outcome.may_have_run

    async def test_a_bomb_is_not_unpacked(self, transport: WebhookTransport, agent_server: Agent):
        bomb = gzip.compress(b"0" * 50_000_000)
        assert len(bomb) < LIMIT_BYTES
        agent_server.answers(Reply(body=bomb, headers=(("Content-Encoding", "gzip"),)))
        assert (await transport.exchange(request_to(agent_server.url))).error is ErrorCode.RESPONSE_ENCODED


class TestTime:
    @pytest.mark.parametrize("drip_s", [0.01])
    @pytest.mark.parametrize(
        "raw",
        [
            b"HTTP/1.1 200 OK\r\n" + b"X-Drip: 1\r\n" * 100,
            b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + b" " * 5000,
            HEAD + b"1\r\nx\r\n" * 1000,
        ],
        ids=["headers", "body", "chunks"],
    )
    async def test_the_deadline_is_for_the_whole_exchange(self, transport, agent_server, raw: bytes, drip_s: float):
        """Something arrives all the time, so no bound on a single read would end it."""
        agent_server.answers(Reply(raw=raw, drip_s=drip_s))
        began_s = time.monotonic()
        outcome = await transport.exchange(request_to(agent_server.url, timeout_s=1))
        assert told(outcome) == (ErrorCode.TIMEOUT, None, True)
        assert outcome.message == "The agent did not answer in time."
        assert time.monotonic() - began_s < 0.01 * len(raw)

    @pytest.mark.parametrize("interim", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Hints\r\nX: 1\r\n\r\n"])
    async def test_a_flood_of_interim_answers_is_cut_off(self, transport, agent_server: Agent, interim: bytes):
        agent_server.answers(flooding(interim, interim * 100))
        outcome = await transport.exchange(request_to(agent_server.url))
        assert told(outcome) == (ErrorCode.RESPONSE_TOO_LARGE, None, True)
        await agent_server.until(lambda: agent_server.open_connections == 0)

    async def test_a_drip_of_interim_answers_ends(self, transport: WebhookTransport, agent_server: Agent):
        agent_server.answers(Reply(raw=b"HTTP/1.1 100 Continue\r\n\r\n" * 100, drip_s=0.01))
        outcome = await transport.exchange(request_to(agent_server.url, timeout_s=1))
        assert told(outcome) == (ErrorCode.TIMEOUT, None, True)

    async def test_an_interim_answer_is_skipped(self, transport: WebhookTransport, agent_server: Agent):
        agent_server.answers(Reply(raw=b"HTTP/1.1 102 Processing\r\n\r\n" + Reply(body=b"7").wire))
        outcome = await transport.exchange(request_to(agent_server.url))
        assert outcome.answer is not None
        assert outcome.answer.value == 7

    async def test_a_change_of_protocol_is_none_of_ours(self, transport: WebhookTransport, agent_server: Agent):
        switch = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
        agent_server.answers(flooding(switch, b"x" * 1000))
        outcome = await transport.exchange(request_to(agent_server.url))
        assert told(outcome) == (ErrorCode.CONNECTION_FAILED, None, True)

    async def test_an_agent_that_never_reads_holds_no_memory_afterwards(self, transport, agent_server: Agent):
        """Closing a connection would wait until the unsent rest is read: the connection has to be cut."""
        body = b'"' + b"x" * 32_000_000 + b'"'  # More than the sockets' buffers hold.
        agent_server.reads.clear()
        outcome = await transport.exchange(request_to(agent_server.url, body=body, timeout_s=1))
        assert told(outcome) == (ErrorCode.TIMEOUT, None, True)
        agent_server.reads.set()
        await agent_server.until(lambda: agent_server.open_connections == 0)
        assert agent_server.broken_off == 1
        assert agent_server.requests == []

    async def test_an_answer_before_the_request_is_read_is_an_answer(self, transport: WebhookTransport):
        async with hasty_agent(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\n{}") as (url, reading):
            body = b'"' + b"x" * 32_000_000 + b'"'  # More than the sockets' buffers hold.
            outcome = await transport.exchange(request_to(url, body=body, timeout_s=10))
            assert told(outcome) == (ErrorCode.HTTP_STATUS, 413, False)
            assert await reading() < len(body)


class TestBrokenAnswers:
    async def test_a_reset_at_every_byte(self, transport: WebhookTransport, agent_server: Agent):
        wire = Reply(body=b'{"a": 1}', headers=(("A", "b"),)).wire
        agent_server.answers(*(Reply(body=b'{"a": 1}', headers=(("A", "b"),), reset_after=n) for n in range(len(wire))))
        for position in range(len(wire)):
            outcome = await transport.exchange(request_to(agent_server.url))
            assert told(outcome) == (ErrorCode.CONNECTION_FAILED, None, True), position
            assert outcome.message == "The agent gave no complete answer."
            assert is_retried(outcome)

    @pytest.mark.parametrize(
        "raw",
        [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"SSH-2.0-OpenSSH_9.2\r\n",
            b"HTTP/9.9 200 OK\r\n\r\n",
            b"HTTP/1.1 2000 OK\r\n\r\n",
            b"HTTP/1.1 -1 OK\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nNo colon\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nA\0: b\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc",
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc",
            b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc",
            b"\r\n\r\n",
        ],
    )
    async def test_what_is_no_http_is_no_answer(self, transport: WebhookTransport, agent_server: Agent, raw: bytes):
        agent_server.answers(Reply(raw=raw, close=True))
        outcome = await transport.exchange(request_to(agent_server.url))
        assert told(outcome) == (ErrorCode.CONNECTION_FAILED, None, True)

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    async def test_no_bytes_raise_anything(self, transport: WebhookTransport, agent_server: Agent, data: Any):
        wire = bytearray(data.draw(st.sampled_from([Reply().wire, HEAD + b"3\r\nabc\r\n0\r\nT: 1\r\n\r\n"])))
        for _ in range(data.draw(st.integers(1, 4))):
            position = data.draw(st.integers(0, len(wire)))
            wire[position : position + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
        agent_server.answers(Reply(raw=bytes(wire), close=True))
        outcome = await transport.exchange(request_to(agent_server.url, timeout_s=5))
        assert outcome.error in {None, *ErrorCode} - {ErrorCode.EGRESS_REFUSED, ErrorCode.TIMEOUT}
        if outcome.answer is not None:
            outcome.answer.text.encode("utf-8")
