"""
The scripted agent, a program: `python -m chaos.agent LISTENER_FD JOURNAL DATABASE`.

It does what a request's payload asks for:

    succeed   a JSON answer with the cost asked for
    work      the same after `delay_s`, which is longer
    text      200, but no JSON
    refuse    422
    flaky     503 to the first request of an invocation, success to the next
    down      503
    hang      no answer, for longer than any attempt may take
    drop      reads the request and resets the connection
    garbage   an answer that is no HTTP
    redirect  302

Before it does anything it looks into the database, by a connection of its own, whether the invocation that it is asked
to carry out is recorded; and every request becomes one line of the journal: {"at", "id", "payload", "row"}, `row` being
the status, `absent`, or null when the database could not be asked.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from typing import Any

import psycopg

LOOK_S = 1.0
HANG_S = 60.0
BACKLOG = 2048
_STATUS = "SELECT status FROM external_agent_invocations WHERE org_id = %s AND id = %s"


class Records:
    """The database's record of invocations, as anybody may read it."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._one_at_a_time = asyncio.Lock()
        self._connection: psycopg.AsyncConnection | None = None

    async def status(self, org_id: str, invocation_id: str) -> str | None:
        """`absent` when there is no such row; None when the database cannot be asked."""
        async with self._one_at_a_time:
            try:
                async with asyncio.timeout(LOOK_S):
                    if self._connection is None:
                        self._connection = await psycopg.AsyncConnection.connect(self._dsn, autocommit=True)
                    row = await (await self._connection.execute(_STATUS, [org_id, invocation_id])).fetchone()
                    return str(row[0]) if row else "absent"
            except (psycopg.Error, TimeoutError):
                if self._connection is not None:
                    await self._connection.close()
                self._connection = None
                return None


class ScriptedAgent:
    def __init__(self, journal_fd: int, records: Records) -> None:
        self._journal_fd = journal_fd
        self._records = records
        self._seen: set[str] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                invocation_id, payload = await _request(reader)
                at = time.time()
                row = await self._records.status(payload["org"], invocation_id)
                line = {"at": at, "id": invocation_id, "payload": payload, "row": row}
                os.write(self._journal_fd, json.dumps(line).encode() + b"\n")
                first = invocation_id not in self._seen
                self._seen.add(invocation_id)
                if not await self._answer(payload, first, reader, writer):
                    break
        writer.transport.abort()

    async def _answer(
        self, payload: dict[str, Any], first: bool, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Whether the connection stays."""
        await asyncio.sleep(payload["delay_s"])
        match payload["do"]:
            case "hang":
                with suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(1), HANG_S)
                return False
            case "drop":
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                return False
            case "garbage":
                writer.write(b"\x00\xffthis is no HTTP\r\n\r\n")
                await writer.drain()
                return False
            case "refuse":
                writer.write(_wire(422, b'{"error": "no"}'))
            case "redirect":
                writer.write(_wire(302, b"", b"Location: /elsewhere\r\n"))
            case "text":
                writer.write(_wire(200, b"done, but said in words"))
            case "down":
                writer.write(_wire(503, b""))
            case "flaky" if first:
                writer.write(_wire(503, b""))
            case _:
                writer.write(_wire(200, json.dumps(success(payload)).encode()))
        await writer.drain()
        return True


def success(payload: dict[str, Any]) -> dict[str, Any]:
    """The answer of an agent that did its work."""
    cost = {} if payload["cost"] is None else {"cost": payload["cost"]}
    return {"done": payload["call"], "metadata": cost}


async def _request(reader: asyncio.StreamReader) -> tuple[str, dict[str, Any]]:
    head = await reader.readuntil(b"\r\n\r\n")
    fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:] if line)
    payload: dict[str, Any] = json.loads(await reader.readexactly(int(fields[b"content-length"])))
    return fields[b"idempotency-key"].strip().decode(), payload


def _wire(status: int, body: bytes, fields: bytes = b"") -> bytes:
    return b"HTTP/1.1 %d Status\r\n%bContent-Length: %d\r\n\r\n%b" % (status, fields, len(body), body)


async def main(listener_fd: int, journal: str, dsn: str) -> None:
    journal_fd = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    agent = ScriptedAgent(journal_fd, Records(dsn))
    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    server = await asyncio.start_server(agent.serve, sock=socket.socket(fileno=listener_fd), backlog=BACKLOG)
    await over.wait()
    server.close()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], sys.argv[3]))
