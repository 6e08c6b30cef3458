"""`python -m chaos`: see `chaos`."""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from chaos.checks import CHECKS
from chaos.controls import CAUGHT_BY, FORGETFUL_REDIS
from chaos.plan import Options
from chaos.run import Report, Tell, run

SHORT = Options(
    seed=0,
    invocations=300,
    duration_s=24,
    kills=1,
    pauses=1,
    database_crashes=1,
    clients=32,
    calls_per_s=60,
    lease_s=3,
)
LONG = Options(
    seed=0,
    invocations=20_000,
    duration_s=560,
    kills=40,
    pauses=10,
    database_crashes=8,
    clients=64,
    calls_per_s=120,
    lease_s=12,
)
COUNTS = (
    "invocations",
    "kills",
    "pauses",
    "database_crashes",
    "redis_crashes",
    "clients",
    "servers",
    "workers",
)
PACES = {"duration_s": "--duration", "lease_s": "--lease", "calls_per_s": "--rate"}
NAMED_MAX = 10
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    if given.controls:
        return _every_control()
    return _run(_options(given), keep=given.keep)


def _every_control() -> int:
    statuses = {}
    for control in sorted(CAUGHT_BY):
        print(f"\n--- {control}", flush=True)
        statuses[control] = main(["--short", "--control", control])
    print("\n" + "\n".join(f"{'NOT CAUGHT' if status else 'caught':<10}  {name}" for name, status in statuses.items()))
    return 1 if any(statuses.values()) else 0


def _run(options: Options, *, keep: bool) -> int:
    """The exit status."""
    began_s = time.monotonic()

    def tell(line: str) -> None:
        print(f"[{time.monotonic() - began_s:6.1f} s] {line}", flush=True)

    folder = Path(tempfile.mkdtemp(prefix="xa-chaos-"))
    folder.chmod(0o711)  # PostgreSQL may run as another account.
    useful = True
    try:
        tell(f"seed {options.seed}; files in {folder}")
        status = _tell_result(asyncio.run(_interruptible(options, folder, tell)))
        useful = keep or status != 0
    except (KeyboardInterrupt, asyncio.CancelledError):
        useful, status = keep, INTERRUPTED
        print("interrupted", file=sys.stderr)
    finally:
        if useful:
            print(f"log, journal and database are kept in {folder}", flush=True)
        else:
            shutil.rmtree(folder)
    return status


async def _interruptible(options: Options, folder: Path, tell: Tell) -> Report:
    task = asyncio.ensure_future(run(options, folder, tell))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


def _tell_result(report: Report) -> int:
    """The exit status: 0 when every promise held; or, with a guard broken, when the right check caught it."""
    print(f"\nrecorded: {_counts(report.statuses)}\nanswered: {_counts(report.answers)}")
    if report.events.get("redis"):
        print(f"Redis was killed {report.events['redis']} times")
    if report.late:
        print(f"note: {report.late} attempts were begun after the verdict, by processes stopped past their lease")
    for named in CHECKS:
        found = report.faults[named.name]
        print(f"{'ok   ' if not found else 'WRONG'}  {named.name:<13}  {named.promise}")
        for fault in found[:NAMED_MAX]:
            print(f"         {fault}")
        if len(found) > NAMED_MAX:
            print(f"         and {len(found) - NAMED_MAX} more")
    for fault in report.uncovered:
        print(f"WRONG  covered        The run proves too little: {fault}")
    print(f"\n{report.claim}", flush=True)
    if (control := report.options.control) is not None:
        return _tell_control(report, control)
    if not report.held:
        print(f"seed {report.options.seed} with {report.options}")
    return 0 if report.held else 1


def _tell_control(report: Report, control: str) -> int:
    caught = bool(report.faults[CAUGHT_BY[control]])
    print(f"the broken guard {control!r} was {'' if caught else 'NOT '}caught by the check {CAUGHT_BY[control]!r}")
    return 0 if caught else 1


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m chaos", description="Crash everything, then prove that nothing was lost."
    )
    parser.add_argument("--short", action="store_true", help="one of each event, in about a minute")
    parser.add_argument("--seed", type=int, help="by default a new one, which is printed")
    for name in COUNTS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    for name, flag in PACES.items():
        parser.add_argument(flag, dest=name, type=float, metavar=name.upper())
    parser.add_argument("--redis", action="store_true", help="keep the limits in a Redis, and kill that too")
    parser.add_argument("--control", choices=sorted(CAUGHT_BY), help="break this guard; success is to catch it")
    parser.add_argument("--controls", action="store_true", help="break every guard in turn, in short runs")
    parser.add_argument("--keep", action="store_true", help="keep the files of a good run, too")
    return parser


def _options(given: argparse.Namespace) -> Options:
    preset = SHORT if given.short else LONG
    chosen = {name: getattr(given, name) for name in (*COUNTS, *PACES, "seed", "control")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if given.redis or given.redis_crashes or given.control == FORGETFUL_REDIS:
        chosen.setdefault("redis_crashes", max(1, preset.database_crashes))
    chosen.setdefault("seed", random.SystemRandom().randrange(1_000_000))
    return attrs.evolve(preset, **chosen)


if __name__ == "__main__":
    sys.exit(main())
