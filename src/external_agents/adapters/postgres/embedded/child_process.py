"""Child processes that never outlive this one, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import attrs

LAUNCH_SCRIPT = Path(__file__).with_name("launch.py")


@attrs.frozen(kw_only=True)
class Launch:
    """
    What to start, and how.

    `death_signal` is what the kernel sends to the program when this process ends. `account` is one of the forms that
    the launch script takes, and `must_reach` are the folders that the program must be able to enter under it.
    `output_fd` takes both its output streams; None: they are ours.
    """

    argv: Sequence[str]
    death_signal: signal.Signals
    account: str = "same"
    must_reach: Sequence[Path] = ()
    env: Mapping[str, str] | None = None
    cwd: str | None = None
    umask: int = -1
    output_fd: int | None = None
    inherited_fds: Sequence[int] = ()

    def command(self) -> list[str]:
        reach = [word for path in self.must_reach for word in ("--reach", str(path))]
        return [
            *(sys.executable, "-I", "-S", str(LAUNCH_SCRIPT)),
            *(str(os.getpid()), str(int(self.death_signal)), self.account, *reach),
            *("--", *self.argv),
        ]


class ChildProcess:
    """
    A program in a session of its own: a terminal's Ctrl-C does not reach it, the death of this process does.

    To the kernel, the parent is the *thread* that forked. So each child has a thread that starts it and waits for it,
    and the caller's own thread may come and go. `on_end` is called on that thread.
    """

    def __init__(self, launch: Launch, *, on_end: Callable[[], None] = lambda: None) -> None:
        self._ended = threading.Event()
        started: Future[subprocess.Popen[bytes]] = Future()
        threading.Thread(target=self._run, args=(launch, started, on_end), name="child", daemon=True).start()
        self._process = started.result()
        self.pid = self._process.pid

    def _run(self, launch: Launch, started: Future[subprocess.Popen[bytes]], on_end: Callable[[], None]) -> None:
        try:
            process = subprocess.Popen(
                launch.command(),
                stdin=subprocess.DEVNULL,
                stdout=launch.output_fd,
                stderr=launch.output_fd,
                env=None if launch.env is None else dict(launch.env),
                cwd=launch.cwd,
                umask=launch.umask,
                pass_fds=launch.inherited_fds,
                start_new_session=True,
            )
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(process)
        process.wait()
        self._ended.set()
        on_end()

    def poll(self) -> int | None:
        """The exit status (negative: the signal that ended it), or None while it runs."""
        return self._process.returncode if self._ended.is_set() else None

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended within `timeout_s` seconds."""
        return self._ended.wait(timeout_s)

    def send(self, signum: signal.Signals) -> None:
        if not self._ended.is_set():
            self._process.send_signal(signum)

    def end(self, *steps: tuple[signal.Signals, float]) -> int | None:
        """Send each signal and give it its seconds, until it has ended; SIGKILL comes last without being named."""
        for signum, patience_s in (*steps, (signal.SIGKILL, 5.0)):
            self.send(signum)
            if self.wait(patience_s):
                break
        return self.poll()
