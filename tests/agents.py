"""
A real HTTP agent on the loopback address, for tests.

    async with serve_agent() as agent:
        agent.answers(Reply(503), Reply(body=b'{"ok": true}'))    # in turn; the last one stays
        ... # POST to agent.url
        assert agent.requests[0].headers["authorization"] == "Bearer s3cret"

It keeps what it received down to the bytes, and can misbehave in every way that HTTP allows, and in some
that it does not. A path can have answers of its own: `agent.at("/token", Issuer())` makes it a token endpoint too.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import inspect
import json
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeAlias
from urllib.parse import parse_qs, unquote_plus

import attrs

PATIENCE_S = 20.0
REASONS = {200: "OK", 302: "Found", 401: "Unauthorized", 503: "Service Unavailable"}


@attrs.frozen
class Seen:
    """A request as it came in."""

    method: str
    path: str
    raw_headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    connection: int
    """Counted from 1: equal numbers came over the same connection."""
    server_name: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """By lower-case names; several of one name are joined by a comma."""
        joined: dict[str, str] = {}
        for name, value in self.raw_headers:
            key, text = name.decode("latin-1").lower(), value.decode("latin-1")
            joined[key] = f"{joined[key]}, {text}" if key in joined else text
        return joined

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def form(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(self.body.decode(), keep_blank_values=True).items()}


@attrs.frozen
class Reply:
    """
    An answer.

    Attributes:
        wait_for: The answer is held back until this is set.
        delay_s: How long the agent works.
        chunked: The body goes as one chunk instead of with a Content-Length.
        drip_s: Every byte of the answer waits this long for the one before.
        reset_after: Bytes of the answer after which the connection is reset.
        close: Closes the connection in good order after the answer.
        raw: Sent as it is in place of everything.
    """

    status: int = 200
    body: bytes = b'{"ok": true}'
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "application/json"),)
    wait_for: asyncio.Event | None = None
    delay_s: float = 0.0
    chunked: bool = False
    drip_s: float | None = None
    reset_after: int | None = None
    close: bool = False
    raw: bytes | None = None

    @property
    def wire(self) -> bytes:
        if self.raw is not None:
            return self.raw
        fields = list(self.headers)
        body = self.body
        if self.chunked:
            fields.append(("Transfer-Encoding", "chunked"))
            body = (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + b"0\r\n\r\n"
        elif self.status not in (204, 304):
            fields.append(("Content-Length", str(len(body))))
        if self.close:
            fields.append(("Connection", "close"))
        head = f"HTTP/1.1 {self.status} {REASONS.get(self.status, 'Status')}\r\n"
        return (head + "".join(f"{name}: {value}\r\n" for name, value in fields) + "\r\n").encode("latin-1") + body


class Wire:
    """The connection itself, for an answer that is a program."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, octets: bytes) -> None:
        """Waits while the other side does not read."""
        self._writer.write(octets)
        await self._writer.drain()

    async def flood(self, octets: bytes) -> None:
        """For ever, until the other side has gone."""
        while True:
            await self.send(octets)

    async def until_gone(self) -> None:
        """Until the other side has closed the connection; what it still sends is dropped."""
        while await self._reader.read(65536):
            pass

    def reset(self) -> None:
        _reset(self._writer)


Program: TypeAlias = Callable[[Seen, Wire], Coroutine[Any, Any, None]]
Answer: TypeAlias = "Reply | Program | Callable[[Seen], Reply]"


class Agent:
    """
    What listens; see `serve_agent`.

    Attributes:
        requests: Complete ones, in the order in which they came.
        connections: How many were ever opened.
        broken_off: Connections that ended in the middle of a request, or were reset.
        reads: While it is cleared, nothing is read from new connections.
    """

    def __init__(self, ssl_context: ssl.SSLContext | None = None) -> None:
        self.requests: list[Seen] = []
        self.connections = 0
        self.broken_off = 0
        self.reads = asyncio.Event()
        self.reads.set()
        self._ssl_context = ssl_context
        self._answers: dict[str | None, list[Answer]] = {None: [Reply()]}
        self._open: set[asyncio.StreamWriter] = set()
        self._changed = asyncio.Condition()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def url(self) -> str:
        return f"http{'s' if self._ssl_context else ''}://127.0.0.1:{self.port}/hook"

    def url_at(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http{'s' if self._ssl_context else ''}://{host}:{self.port}{path}"

    def answers(self, *answers: Answer) -> None:
        """In turn, to requests for any path that has none of its own; the last one stays."""
        self._answers[None] = list(answers)

    def at(self, path: str, *answers: Answer) -> str:
        """Likewise for one path. Returns its URL."""
        self._answers[path] = list(answers)
        return self.url_at(path)

    def requests_at(self, path: str) -> list[Seen]:
        return [seen for seen in self.requests if seen.path == path]

    @property
    def open_connections(self) -> int:
        return len(self._open)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds; it is looked at whenever a request comes in or a connection opens or closes."""
        async with asyncio.timeout(PATIENCE_S), self._changed:
            await self._changed.wait_for(condition)

    def drop_connections(self) -> None:
        """Closes all of them in good order, as a server does with idle ones."""
        for writer in set(self._open):
            writer.close()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._ssl_context, backlog=2048)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in set(self._open):
            writer.transport.abort()
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        self._open.add(writer)
        await self._tell()
        try:
            await self.reads.wait()
            with contextlib.suppress(ConnectionError, ssl.SSLError, TimeoutError):
                while seen := await self._read(reader, writer, number):
                    self.requests.append(seen)
                    await self._tell()
                    if not await self._answer(seen, reader, writer):
                        break
        finally:
            writer.close()
            self._open.discard(writer)
            await self._tell()

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> Seen | None:
        try:
            return await _read_request(reader, writer, number)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.broken_off += 1
            return None

    async def _answer(self, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection stays."""
        script = self._answers.get(seen.path, self._answers[None])
        answer = script.pop(0) if len(script) > 1 else script[0]
        if inspect.iscoroutinefunction(answer):
            await answer(seen, Wire(reader, writer))
            return False
        return await _send(answer if isinstance(answer, Reply) else answer(seen), writer)

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


@contextlib.asynccontextmanager
async def serve_agent(*answers: Answer, ssl_context: ssl.SSLContext | None = None) -> AsyncIterator[Agent]:
    """An agent that answers 200 with JSON, or as told; gone at the end."""
    agent = Agent(ssl_context)
    if answers:
        agent.answers(*answers)
    await agent.start()
    try:
        yield agent
    finally:
        await agent.stop()


@contextlib.asynccontextmanager
async def hasty_agent(answer: bytes) -> AsyncIterator[tuple[str, Callable[[], Coroutine[Any, Any, int]]]]:
    """
    An agent for one connection that answers at once, without reading what it was asked. Yields its URL, and what tells
    how many bytes of the request come after all until the connection ends.
    """
    may_read = asyncio.Event()
    received: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def answer_at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await may_read.wait()
        count = 0
        with contextlib.suppress(ConnectionError):
            while octets := await reader.read(1 << 20):
                count += len(octets)
        writer.transport.abort()
        received.set_result(count)

    async def reading() -> int:
        may_read.set()
        async with asyncio.timeout(PATIENCE_S):
            return await received

    server = await asyncio.start_server(answer_at_once, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/", reading
        await reading()


@attrs.define
class Issuer:
    """
    The answers of a token endpoint: `token-1`, `token-2`, …

    Attributes:
        takes: The ways of showing the secret that it understands.
        fields: Beside the token, in place of the usual ones.
    """

    client_id: str = "kaizen"
    client_secret: str = "s3cret"
    takes: frozenset[str] = frozenset({"basic", "body"})
    expires_in: Any = 3600
    fields: Mapping[str, Any] = attrs.field(factory=dict)
    wait_for: asyncio.Event | None = None
    issued: int = 0

    def __call__(self, seen: Seen) -> Reply:
        if self._shown(seen) != (self.client_id, self.client_secret):
            return Reply(401, b'{"error": "invalid_client"}')
        self.issued += 1
        token = {"access_token": f"token-{self.issued}", "token_type": "Bearer", "expires_in": self.expires_in}
        answer = {name: value for name, value in {**token, **self.fields}.items() if value is not None}
        return Reply(body=json.dumps(answer).encode(), wait_for=self.wait_for)

    def _shown(self, seen: Seen) -> tuple[str, str] | None:
        kind, _, credentials = seen.headers.get("authorization", "").partition(" ")
        if kind == "Basic" and "basic" in self.takes:
            client_id, _, secret = base64.b64decode(credentials).decode().partition(":")
            return unquote_plus(client_id), unquote_plus(secret)
        if "client_secret" in seen.form and "body" in self.takes:
            return seen.form["client_id"], seen.form["client_secret"]
        return None


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: int) -> Seen | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    line, *fields = head[:-4].split(b"\r\n")
    method, path, _ = line.decode("latin-1").split(" ", 2)
    raw_headers = tuple((name, value.strip()) for name, _, value in (field.partition(b":") for field in fields))
    lengths = [int(value) for name, value in raw_headers if name.lower() == b"content-length"]
    body = await reader.readexactly(lengths[0]) if lengths else b""
    tls = writer.get_extra_info("ssl_object")
    return Seen(method, path, raw_headers, body, connection, getattr(tls, "told_server_name", None))


async def _send(reply: Reply, writer: asyncio.StreamWriter) -> bool:
    if reply.wait_for is not None:
        await reply.wait_for.wait()
    if reply.delay_s:
        await asyncio.sleep(reply.delay_s)
    wire = reply.wire if reply.reset_after is None else reply.wire[: reply.reset_after]
    if reply.drip_s is None:
        writer.write(wire)
        await writer.drain()
    else:
        for octet in wire:
            writer.write(bytes([octet]))
            await writer.drain()
            await asyncio.sleep(reply.drip_s)
    if reply.reset_after is not None:
        _reset(writer)
        return False
    return not reply.close


def _reset(writer: asyncio.StreamWriter) -> None:
    """What was written goes out, then a RST: the socket is closed with a linger time of zero."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
