"""gunicorn's asgi worker, made fit for bursts of connections, for draining, and for the death of its parent."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import signal
import weakref
from typing import Any

from gunicorn.asgi.protocol import ASGIProtocol  # type: ignore[import-untyped]
from gunicorn.workers.gasgi import ASGIWorker  # type: ignore[import-untyped]

from external_agents.adapters.rest.connection import Connection, Patience

PR_SET_PDEATHSIG = 1
IDLE_SWEEP_S = 0.5
TIMING_S = 1.0
GARBAGE_THRESHOLDS = (20_000, 2, 2)
"""
With 700 young objects, Python's default, hundreds of invocations under way are gone through several times each. The
older generations come sooner in return: a connection that is over is of the oldest.
"""

ACCEPTED_AT_ONCE = 1
"""A turn of the event loop. A worker that empties the queue whenever it looks leaves the others idle for long."""

HELD_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT})
"""May be blocked when a worker begins; see `gunicorn_server`."""


class Worker(ASGIWorker):  # type: ignore[misc]
    """
    Serves like `-k asgi`, and beyond that

    - listens with gunicorn's `backlog`; asyncio would listen again, with 100, and drop what a burst brings beyond;
    - leaves connections to the other workers, too: asyncio would accept a hundred at a time;
    - closes connections that wait for no answer as soon as it drains: they would hold it until they time out, and one
      that never sent anything has no timeout;
    - lets in no head that is malformed or too large, and waits neither for heads nor for answers to be taken longer
      than its `patience`;
    - gives the application's own shutdown what is left of `graceful_timeout`, instead of 30 s;
    - forgets connections that are over;
    - dies with gunicorn's master, instead of draining on without it.
    """

    lifespan: Any
    patience = Patience()

    def init_process(self) -> None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
        if os.getppid() != self.ppid:
            os._exit(1)
        super().init_process()

    def load_wsgi(self) -> None:
        """The application is there to stay: the garbage collector need not look at it again and again."""
        super().load_wsgi()
        # It notes what it finds in the class that it is called on, and looks for it in this one.
        ASGIProtocol._check_h1c_protocol_available()
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GARBAGE_THRESHOLDS)

    def init_signals(self) -> None:
        super().init_signals()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)

    def _setup_event_loop(self) -> None:
        super()._setup_event_loop()
        self._connections: weakref.WeakSet[Connection] = weakref.WeakSet()
        create_server = self.loop.create_server

        async def create_deep_server(_factory: Any, *, sock: Any, **options: Any) -> asyncio.Server:
            def tracked() -> Connection:
                connection = Connection(self)
                self._connections.add(connection)
                return connection

            server: asyncio.Server = await create_server(tracked, sock=sock, backlog=ACCEPTED_AT_ONCE, **options)
            sock.listen(self.cfg.backlog)
            return server

        self.loop.create_server = create_deep_server
        self._timing = self.loop.create_task(self._keep_time())

    async def _shutdown(self) -> None:
        deadline = self.loop.time() + self.cfg.graceful_timeout
        for server in self.servers:
            server.close()
        sweeping = self.loop.create_task(self._close_idle_connections())
        lifespan = self.lifespan
        self.lifespan = None
        await super()._shutdown()
        sweeping.cancel()
        if lifespan is not None and not self._quick_shutdown:
            await self._end_lifespan(lifespan, deadline)

    async def _keep_time(self) -> None:
        while True:
            now_s = self.loop.time()
            for connection in list(self._connections):
                try:
                    connection.keep_time(now_s, self.patience)
                except Exception:
                    self.log.exception("a connection cannot be timed")
            await asyncio.sleep(TIMING_S)

    async def _close_idle_connections(self) -> None:
        while True:
            for connection in list(self._connections):
                if connection._awaiting_request:
                    connection.transport.close()
            await asyncio.sleep(IDLE_SWEEP_S)

    async def _end_lifespan(self, lifespan: Any, deadline: float) -> None:
        """Wait for the application first, for `lifespan.shutdown` gives up too early; then let that tidy up."""
        await lifespan._receive_queue.put({"type": "lifespan.shutdown"})
        finished = asyncio.ensure_future(lifespan._shutdown_complete.wait())
        while not finished.done() and not self._quick_shutdown and self.loop.time() < deadline:
            await asyncio.wait([finished], timeout=IDLE_SWEEP_S)
        finished.cancel()
        if not self._quick_shutdown:
            await lifespan.shutdown()
