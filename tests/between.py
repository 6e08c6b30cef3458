"""What stands between a client and PostgreSQL, and fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import quote, unquote


class Proxy:
    """
    Before a server's unix socket.

    Attributes:
        url: SQLAlchemy's.
        losing: A connection breaks before the answer to what holds this.
        dropping: A connection breaks before the server has got what holds this.
        stalling: What holds this is kept back, with all that comes after it on its connection, until `released`.
    """

    def __init__(self, url: str, server_socket: str) -> None:
        self.url = url
        self.losing: bytes | None = None
        self.dropping: bytes | None = None
        self.stalling: bytes | None = None
        self.stalled = asyncio.Event()
        self.released = asyncio.Event()
        self._server_socket = server_socket

    @classmethod
    @asynccontextmanager
    async def to(cls, url: str, folder: Path) -> AsyncIterator[Proxy]:
        """`folder`: an empty one of its own."""
        server_folder = unquote(url.partition("host=")[2])
        proxy = cls(url.replace(quote(server_folder), quote(str(folder))), f"{server_folder}/.s.PGSQL.5432")
        async with await asyncio.start_unix_server(proxy._serve, folder / ".s.PGSQL.5432"):
            yield proxy

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_unix_connection(self._server_socket)
        lost = asyncio.Event()
        answers = asyncio.create_task(self._pass_answers(server_reader, writer, lost))
        while not lost.is_set() and (chunk := await reader.read(65536)):
            if self.dropping and self.dropping in chunk:
                lost.set()
                server_writer.write_eof()
                break
            if self.stalling and self.stalling in chunk:
                self.stalled.set()
                await self.released.wait()
            if self.losing and self.losing in chunk:
                lost.set()
            server_writer.write(chunk)
        if not lost.is_set():
            server_writer.write_eof()
        await answers
        for stream in (writer, server_writer):
            stream.close()
            with suppress(OSError):
                await stream.wait_closed()

    async def _pass_answers(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lost: asyncio.Event
    ) -> None:
        while (chunk := await reader.read(65536)) and not lost.is_set():
            writer.write(chunk)
