"""
Who the embedded PostgreSQL runs as, for it refuses to be root.

| we are | files belong to | it runs |
|---|---|---|
| an ordinary user | the user | as the user |
| root, or a user without a passwd entry (initdb wants one) | us | as us, under another name, in a user namespace |
| root, where there are no user namespaces | `nobody` | as `nobody` |
| root, and the data belongs to somebody else already | that account | as that account |
"""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Literal

import attrs
import platformdirs

from external_agents.adapters.postgres.embedded.child_process import ChildProcess, Launch
from external_agents.domain.errors import ExternalAgentsError

ROOT = 0
OVERFLOW_ID = 65534
NOBODY = "nobody"
SYSTEM_HOME = Path("/var/lib/external-agents")
PROBE_TIMEOUT_S = 10.0


class EmbeddedPostgresError(ExternalAgentsError):
    """The embedded PostgreSQL cannot be used; the message says what to change."""


@attrs.frozen(kw_only=True)
class Account:
    """`uid` and `gid`: what the server takes itself for. `owner_uid` and `owner_gid`: who owns its files, for us."""

    kind: Literal["same", "namespace", "account"]
    uid: int
    gid: int
    owner_uid: int
    owner_gid: int

    @property
    def launch_form(self) -> str:
        return "same" if self.kind == "same" else f"{self.kind}:{self.uid}:{self.gid}"

    @property
    def name(self) -> str:
        try:
            return pwd.getpwuid(self.owner_uid).pw_name
        except KeyError:
            return str(self.owner_uid)


def own_account() -> Account:
    uid, gid = os.geteuid(), os.getegid()
    return Account(kind="same", uid=uid, gid=gid, owner_uid=uid, owner_gid=gid)


def namespaced_account() -> Account:
    """Us, called `nobody` inside a user namespace of its own."""
    inside = _nobody()
    return Account(
        kind="namespace",
        uid=inside.pw_uid,
        gid=inside.pw_gid,
        owner_uid=os.geteuid(),
        owner_gid=os.getegid(),
    )


def nobody_account() -> Account:
    nobody = _nobody()
    return _account_of(nobody.pw_uid, nobody.pw_gid)


def account_for(data: Path) -> Account:
    """Who runs a server on this folder, which need not be there yet."""
    if os.geteuid() != ROOT:
        return own_account() if _has_passwd_entry() or not user_namespaces_available() else namespaced_account()
    if data.exists():
        owner = data.stat()
        if owner.st_uid != ROOT:
            return _account_of(owner.st_uid, owner.st_gid)
    return namespaced_account() if user_namespaces_available() else nobody_account()


def default_home() -> Path:
    """Where the data is when nobody says: the user's data folder, or the system's when the server must be `nobody`."""
    if os.geteuid() == ROOT and not user_namespaces_available():
        return SYSTEM_HOME
    return Path(platformdirs.user_data_dir("external-agents", appauthor=False))


@cache
def user_namespaces_available() -> bool:
    """Whether a child process really gets one: kernels, containers and security modules refuse each in its way."""
    probe = ChildProcess(
        Launch(
            argv=[sys.executable, "-I", "-S", "-c", ""],
            death_signal=signal.SIGKILL,
            account=f"namespace:{OVERFLOW_ID}:{OVERFLOW_ID}",
            output_fd=subprocess.DEVNULL,
        )
    )
    if not probe.wait(PROBE_TIMEOUT_S):
        probe.end()
    return probe.poll() == 0


def _account_of(uid: int, gid: int) -> Account:
    return Account(kind="account", uid=uid, gid=gid, owner_uid=uid, owner_gid=gid)


def _has_passwd_entry() -> bool:
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return True


def _nobody() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(NOBODY)
    except KeyError:
        raise EmbeddedPostgresError(
            "PostgreSQL does not run as root and there is no account `nobody`: run as an ordinary user, "
            "or set EXTERNAL_AGENTS_DATABASE_URL."
        ) from None
