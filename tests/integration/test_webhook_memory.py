"""What a hostile agent costs in memory: a process of its own, measured by the kernel."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import sys

import pytest

from agents import Program, Reply, Seen, Wire, serve_agent

LIMIT_BYTES = 8 * 1024 * 1024
"""Large, so that what an interpreter takes now and then is small beside it."""

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
MEGABYTE = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"

SCRIPT = """
import asyncio, json, sys
from pathlib import Path
from webhooks import open_transport, request_to

def peak_bytes():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])

async def main(url, limit_bytes):
    async with open_transport(limit_bytes=limit_bytes) as transport:
        assert (await transport.exchange(request_to(url + "plain"))).error is None
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_bytes()
        for _ in range(3):
            outcome = await transport.exchange(request_to(url + "hostile", timeout_s=20))
        print(json.dumps([outcome.error, outcome.message, peak_bytes() - before]))

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


def flooding(start: bytes, flood: bytes) -> Program:
    async def answer(seen: Seen, wire: Wire) -> None:
        await wire.send(start)
        await wire.flood(flood)

    return answer


def bomb() -> Reply:
    """Unpacked, eight times the limit."""
    return Reply(body=gzip.compress(bytes(8 * LIMIT_BYTES)), headers=(("Content-Encoding", "gzip"),))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel tells no peak here")
@pytest.mark.parametrize(
    ("hostile", "error"),
    [
        (flooding(HEAD, MEGABYTE), "response_too_large"),
        (flooding(HEAD, b"8\r\n12345678\r\n" * 10_000), "response_too_large"),
        (flooding(HEAD, b"1;" + b"x" * 1000 + b"\r\nx\r\n"), "response_too_large"),
        (flooding(HEAD + b"1;", b"x" * 1_000_000), "response_too_large"),
        (flooding(HEAD + b"0\r\n", b"X: y\r\n" * 100_000), "response_too_large"),
        (flooding(HEAD + b"0" * 1_000_000, b"0" * 1_000_000), "response_too_large"),
        (flooding(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 1_000_000), "response_too_large"),
        (flooding(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 100_000), "response_too_large"),
        (flooding(b"HTTP/1.1 200 OK\r\nX: ", b"x" * 1_000_000), "response_too_large"),
        (flooding(b"", b"HTTP/1.1 103 Early Hints\r\nX: y\r\n\r\n" * 10_000), "response_too_large"),
        (bomb(), "response_encoded"),
        (Reply(body=b"x" * LIMIT_BYTES, reset_after=LIMIT_BYTES), "connection_failed"),
    ],
    ids="chunks,small chunks,extensions,extension,trailers,chunk size,until closed,headers,header,1xx,bomb,reset".split(
        ","
    ),
)
async def test_it_grows_by_no_more_than_twice_the_limit(hostile: Program | Reply, error: str) -> None:
    async with serve_agent() as agent:
        agent.at("/hostile", hostile)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", SCRIPT, agent.url_at("/"), str(LIMIT_BYTES)),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=asyncio.subprocess.PIPE,
        )
        told, _ = await process.communicate()
    assert process.returncode == 0
    found, message, grown_bytes = json.loads(told)
    assert found in {error, "connection_failed"}, message
    assert grown_bytes < 2 * LIMIT_BYTES
