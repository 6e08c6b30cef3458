"""Where the time of a worker goes, by py-spy, which looks from outside and slows it little."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from pathlib import Path

from benchmarks.processes import BenchmarkError, Tree

SAMPLES_A_SECOND = 250
TOP = 40
MARGIN_S = 30.0


def program() -> str | None:
    """py-spy of this environment, or of the PATH."""
    own = Path(sysconfig.get_path("scripts")) / "py-spy"
    return str(own) if own.exists() else shutil.which("py-spy")


def sample(tree: Tree, seconds: float, folder: Path, name: str) -> Path:
    """
    Watch the busiest process of a service. Returns the path of the summary; the folded stacks lie beside it
    (`.folded`, for a flame graph).

    Raises:
        BenchmarkError: py-spy is not there, or may not look.
    """
    found = program()
    if found is None:
        raise BenchmarkError("--profile needs py-spy: pip install py-spy")
    folder.mkdir(parents=True, exist_ok=True)
    base = re.sub(r"\W+", "-", name)
    number = sum(1 for _ in folder.glob(f"{base}-*.folded")) + 1
    folded = folder / f"{base}-{number}.folded"
    done = subprocess.run(
        [
            *(found, "record", "--pid", str(_worker(tree)), "--duration", str(max(1, round(seconds)))),
            *("--rate", str(SAMPLES_A_SECOND), "--format", "raw", "--output", str(folded)),
        ],
        capture_output=True,
        text=True,
        timeout=seconds + MARGIN_S,
        check=False,
    )
    if done.returncode != 0 or not folded.exists():
        raise BenchmarkError(f"py-spy failed (it may need the right to trace processes):\n{done.stderr.strip()}")
    summary = folded.with_suffix(".txt")
    summary.write_text(summarised(folded.read_text()))
    return summary


def summarised(folded: str) -> str:
    """The functions that were running (`self`), and those that were on the stack (`total`), in per cent of samples."""
    own: Counter[str] = Counter()
    total: Counter[str] = Counter()
    samples = 0
    for line in folded.splitlines():
        stack, _, times = line.rpartition(" ")
        # Without the line numbers: a function is one entry.
        frames = [re.sub(r":\d+\)$", ")", frame) for frame in stack.split(";") if frame]
        if not frames:
            continue
        samples += int(times)
        own[frames[-1]] += int(times)
        for frame in set(frames):
            total[frame] += int(times)
    lines = [f"{samples} samples"]
    for title, counts in (("self", own), ("total", total)):
        lines += ["", f"{title:>6}"]
        lines += [f"{times / samples:6.1%}  {frame}" for frame, times in counts.most_common(TOP)]
    return "\n".join(lines) + "\n"


def _worker(tree: Tree) -> int:
    """The first of the processes that have no children: masters and supervisors have some."""
    leaves = [pid for pid in tree.pids() if Tree(pid).pids() == [pid]]
    return min(leaves)
