"""
Becomes a child process of this project: run as a script, by path, and imports nothing but the standard library.

    python -I -S launch.py PARENT_PID DEATH_SIGNAL ACCOUNT [--reach PATH]… -- PROGRAM [ARGUMENT]…

It takes on ACCOUNT (`same`; `namespace:UID:GID`, which is what the caller's own account is called inside a new user
namespace; `account:UID:GID`), asks the kernel for DEATH_SIGNAL when the thread that started it ends, and executes
PROGRAM in its own place. A script, not a function between fork and exec: that would run Python in a copy of a process
whose other threads may hold locks.

Prints one line beginning with `launch: ` and exits with 77 when it cannot.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

CLONE_NEWUSER = 0x10000000
PR_SET_PDEATHSIG = 1
FAILED = 77


def main(arguments: list[str]) -> None:
    # Until PROGRAM has handlers of its own, the death signal ends this process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    options, program = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    parent_pid, death_signal, account = int(options[0]), int(options[1]), options[2]
    take_on(account)
    # After the account, because a change of credentials makes the kernel forget it; and then look whether the parent
    # died before it was set.
    call_libc("prctl", PR_SET_PDEATHSIG, death_signal)
    if os.getppid() != parent_pid:
        fail("the process that started this one has ended")
    for path in options[4::2]:
        require_reach(path)
    os.execv(program[0], program)  # noqa: S606  no shell is wanted


def take_on(account: str) -> None:
    kind, *ids = account.split(":")
    if kind == "namespace":
        outer_uid, outer_gid = os.geteuid(), os.getegid()
        call_libc("unshare", CLONE_NEWUSER)
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"{ids[0]} {outer_uid} 1")
        write("/proc/self/gid_map", f"{ids[1]} {outer_gid} 1")
        if os.geteuid() != int(ids[0]):
            fail("the user namespace did not map this account")
    elif kind == "account":
        uid, gid = int(ids[0]), int(ids[1])
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)


def require_reach(path: str) -> None:
    """Fail with the first folder on the way to `path` that this account cannot enter."""
    step = "/"
    for name in path.split("/"):
        step = os.path.join(step, name)
        if not os.access(step, os.X_OK):
            fail(f"cannot enter {step}")


def call_libc(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*map(ctypes.c_ulong, arguments)) != 0:
        fail(f"{name}: {os.strerror(ctypes.get_errno())}")


def write(path: str, text: str) -> None:
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError as error:
        fail(f"{path}: {error.strerror}")


def fail(reason: str) -> None:
    print(f"launch: {reason}", file=sys.stderr, flush=True)
    os._exit(FAILED)


if __name__ == "__main__":
    main(sys.argv[1:])
