"""`python -m benchmarks`"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from benchmarks.cases import CASES
from benchmarks.judging import Outcome, succeeded
from benchmarks.machine import busy_note, facts
from benchmarks.processes import BenchmarkError
from benchmarks.report import table, write_json
from benchmarks.workbench import Plan, workbench
from external_agents.domain.errors import ExternalAgentsError

RESULTS = Path(__file__).with_name("results.json")


def main(arguments: Sequence[str] | None = None) -> int:
    """0: every floor was met and every count was right; 1: not so; 2: wrong usage; 130: interrupted."""
    options = _parser().parse_args(arguments)
    # SIGTERM and SIGHUP unwind like Ctrl-C, so that nothing that was started stays.
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, _interrupt)
    try:
        return _run(options)
    except (BenchmarkError, ExternalAgentsError) as error:
        _tell(f"The benchmark ended early: {error}")
        return 1
    except KeyboardInterrupt:
        _tell("Interrupted.")
        return 130


def _run(options: argparse.Namespace) -> int:
    plan = Plan(
        rounds=options.rounds,
        seconds=options.seconds,
        rows=options.rows,
        workers=options.workers,
        profile_folder=options.profile,
    )
    note = busy_note()
    outcomes: dict[str, Outcome] = {}
    with workbench(plan, _tell, options.folder) as bench:
        on = facts(bench)
        _tell("\n".join(f"{name:>12}  {fact}" for name, fact in on.items()))
        if note:
            on["note"] = note
            _tell(f"\n{note}")
        try:
            for name in options.cases:
                _tell(f"\n{name}: {_summary(name)}")
                outcomes[name] = CASES[name](bench)
                write_json(options.json, on, outcomes)
                if outcomes[name].mismatches:
                    bench.keep_logs(options.json.with_suffix(".logs"))
        finally:
            # A run that is broken off shows what it has.
            print(f"\n{table(outcomes)}\n\n{note or ''}\nDetails: {options.json}")
    return 0 if succeeded(list(outcomes.values())) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure the service against baselines. On an otherwise idle machine; it needs nothing running.",
        epilog="Cases: " + "; ".join(f"{name}: {_summary(name)}" for name in CASES),
    )
    parser.add_argument("--cases", type=_cases, default=list(CASES), metavar="NAME[,NAME…]", help="all by default")
    parser.add_argument("--rounds", type=_positive, default=9, help="of each variant, interleaved (default: 9)")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="of each round, fairness's four times as long (default: 3)"
    )
    parser.add_argument("--rows", type=_positive, default=10_000_000, help="in the full table (default: 10,000,000)")
    parser.add_argument("--workers", type=_positive, default=2, help="of gunicorn, for all variants (default: 2)")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="PATH", help="default: results.json beside this")
    parser.add_argument("--folder", type=Path, help="where the database lies (default: the temporary folder)")
    parser.add_argument(
        "--profile", type=Path, metavar="FOLDER", help="profile a worker in each case, too, with py-spy"
    )
    return parser


def _cases(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names).difference(CASES):
        raise argparse.ArgumentTypeError(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    return [name for name in CASES if name in names]


def _positive(text: str) -> int:
    number = int(text.replace(",", "").replace("_", ""))
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _summary(case: str) -> str:
    return (CASES[case].__doc__ or "").strip().splitlines()[0]


def _interrupt(_signum: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
