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
from chaos.controls import CAUGHT_BY
from chaos.plan import Options
from chaos.run import Report, Tell, run
from external_agents.settings import Settings

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
NAMED_MAX = 10


def main(arguments: Sequence[str] | None = None) -> int:
    options, keep = _options(arguments)
    began_s = time.monotonic()

    def tell(line: str) -> None:
        print(f"[{time.monotonic() - began_s:6.1f} s] {line}", flush=True)

    folder = Path(tempfile.mkdtemp(prefix="xa-chaos-"))
    folder.chmod(0o711)  # PostgreSQL may run as another account.
    useful = True
    try:
        tell(f"seed {options.seed}; files in {folder}")
        report = asyncio.run(_interruptible(options, folder, tell))
        good = _tell_result(report)
        useful = keep or not good
    except (KeyboardInterrupt, asyncio.CancelledError):
        useful = keep
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        if useful:
            print(f"log, journal and database are kept in {folder}", flush=True)
        else:
            shutil.rmtree(folder)
    return 0 if good else 1


async def _interruptible(options: Options, folder: Path, tell: Tell) -> Report:
    task = asyncio.ensure_future(run(options, folder, tell))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


def _tell_result(report: Report) -> bool:
    """Whether all is as it should be: every promise held; or, with a guard broken, the right check caught it."""
    print(f"\nrecorded: {_counts(report.statuses)}\nanswered: {_counts(report.answers)}")
    if report.events.get("redis"):
        print(f"Redis was killed {report.events['redis']} times")
    if not report.keyed:
        print("idempotency: skipped, this version does not replay an Idempotency-Key")
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
    print(f"\n{report.claim}")
    if (control := report.options.control) is not None:
        caught = bool(report.faults[CAUGHT_BY[control]])
        print(f"the broken guard {control!r} was {'' if caught else 'NOT '}caught by the check {CAUGHT_BY[control]!r}")
        return caught
    if not report.held:
        print(f"seed {report.options.seed} with {report.options}")
    return report.held


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def _options(arguments: Sequence[str] | None) -> tuple[Options, bool]:
    parser = argparse.ArgumentParser(
        prog="python -m chaos", description="Crash everything, then prove that nothing was lost."
    )
    parser.add_argument("--short", action="store_true", help="one of each event, in about a minute")
    parser.add_argument("--seed", type=int, help="by default a new one, which is printed")
    for name in (
        "invocations",
        "kills",
        "pauses",
        "database_crashes",
        "redis_crashes",
        "clients",
        "servers",
        "workers",
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    for name in ("duration_s", "calls_per_s", "lease_s"):
        parser.add_argument(f"--{name.removesuffix('_s').replace('_', '-')}", dest=name, type=float, metavar="S")
    parser.add_argument("--redis", action="store_true", help="keep the limits in a Redis, and kill that too")
    parser.add_argument("--control", choices=sorted(CAUGHT_BY), help="break this guard; success is to catch it")
    parser.add_argument("--keep", action="store_true", help="keep the files of a good run, too")
    given = vars(parser.parse_args(arguments))
    preset = SHORT if given.pop("short") else LONG
    keep = given.pop("keep")
    if given.pop("redis"):
        if not hasattr(Settings.from_env({}), "redis_url"):
            parser.exit(77, "skipped: this version keeps no limits in Redis\n")
        given["redis_crashes"] = given["redis_crashes"] or max(1, preset.database_crashes)
    if given["seed"] is None:
        given["seed"] = random.SystemRandom().randrange(1_000_000)
    return attrs.evolve(preset, **{name: value for name, value in given.items() if value is not None}), keep


if __name__ == "__main__":
    sys.exit(main())
