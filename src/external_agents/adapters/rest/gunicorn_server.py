"""
gunicorn as `serve` runs it: `python -P -m external_agents.adapters.rest.gunicorn_server OPTIONS`, a program of its own.

Unlike the command `gunicorn` it takes no settings from the current folder or the environment, and puts that folder on
no import path: a `secrets.py` that lies where somebody happens to stand must not be imported instead of the real one.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import attrs
from gunicorn.app.base import BaseApplication  # type: ignore[import-untyped]
from gunicorn.util import import_app  # type: ignore[import-untyped]

from external_agents.adapters.rest.worker import HELD_SIGNALS

APP = "external_agents.bootstrap:create_worker_app()"
BACKLOG = 2048
KEEPALIVE_S = 75
"""Longer than the idle time of the usual load balancers, so that it is they who close."""
OPEN_FILES = 65_536
MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108


@attrs.frozen(kw_only=True)
class GunicornOptions:
    """
    What of it can be chosen.

    Attributes:
        listener_fd: An inherited socket that already listens.
        app: What gunicorn's command line takes.
        child_exit: `module:name` of gunicorn's hook, called in its master when a worker has ended; None: nothing is.
    """

    listener_fd: int
    workers: int
    graceful_timeout_s: int
    app: str = APP
    child_exit: str | None = None

    def command(self) -> list[str]:
        return [sys.executable, "-P", "-m", __name__, json.dumps(attrs.asdict(self))]


class GunicornServer(BaseApplication):  # type: ignore[misc]
    def __init__(self, options: GunicornOptions) -> None:
        self._options = options
        super().__init__()

    def load_config(self) -> None:
        settings: dict[str, Any] = {
            "bind": f"fd://{self._options.listener_fd}",
            "backlog": BACKLOG,
            "workers": self._options.workers,
            "worker_class": "external_agents.adapters.rest.worker.Worker",
            "graceful_timeout": self._options.graceful_timeout_s,
            "keepalive": KEEPALIVE_S,
            "asgi_lifespan": "on",
            "asgi_loop": "asyncio",  # What else is installed must not choose another one, which nobody has tried.
            "control_socket_disable": True,
            "loglevel": "warning",
            "worker_tmp_dir": str(MEMORY_FOLDER) if os.access(MEMORY_FOLDER, os.W_OK) else None,
            "proc_name": "external-agents",
        }
        if self._options.child_exit:
            settings["child_exit"] = resolve_name(self._options.child_exit)
        for name, value in settings.items():
            self.cfg.set(name, value)

    def load(self) -> Any:
        return import_app(self._options.app)


def main() -> None:
    raise_open_files_limit()
    hold_signals_over_forks()
    GunicornServer(GunicornOptions(**json.loads(sys.argv[1]))).run()


def hold_signals_over_forks() -> None:
    """
    Until a worker has its own handlers it has the master's, which would take a SIGTERM and do nothing with it.

    So the signals wait: a worker lets them in when it is ready for them.
    """
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS),
    )


def raise_open_files_limit() -> None:
    """1,024, the usual soft limit, is less than the connections of one busy worker and its calls."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    main()
