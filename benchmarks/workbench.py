"""What the cases work with: one PostgreSQL, one agent, and the services that are measured on them."""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import attrs
import psycopg
from psycopg import sql
from sqlalchemy import make_url

from benchmarks import forward, profiling
from benchmarks.counting import ACKNOWLEDGED, FIRST_ID, Expected, count
from benchmarks.estate import Estate, KnownAgent, furnish
from benchmarks.judging import Finding, Outcome, percentile
from benchmarks.processes import (
    HOST,
    Agent,
    RunningLoad,
    Server,
    Tree,
    running_agent,
    running_redis,
    running_serve,
    serving,
)
from external_agents.adapters.postgres.embedded import EmbeddedPostgres, owned
from external_agents.adapters.postgres.schema import migrate
from external_agents.adapters.rest.gunicorn_server import APP
from external_agents.settings import PREFIX, Settings

FORWARD = "benchmarks.forward:create_asgi_app()"
NAIVE = "benchmarks.naive:create_asgi_app()"
WARM_UP_S = 1.0
STARTS = 3
PAYLOAD = b'{"text": "' + b"x" * 188 + b'"}'
"""200 bytes, like the agent's answer."""


@attrs.frozen(kw_only=True)
class Plan:
    """How long and how much: each round lasts `seconds`, and `rows` are in the full table."""

    rounds: int
    seconds: float
    rows: int
    workers: int
    profile_folder: Path | None = None


@attrs.frozen(kw_only=True)
class Round:
    """
    What one round of load gave.

    Attributes:
        rate: Answers a second.
        elapsed_s: From the start to the last answer, or the time that was given.
        what: Tells it from the others of a case, where they differ.
        cpu_us: Microseconds of processor time an answer, by whose they are.
    """

    rate: float
    elapsed_s: float
    latencies_ms: Sequence[float] = attrs.field(repr=False)
    statuses: Mapping[str, int]
    cpu_us: Mapping[str, int]
    what: str = ""

    @property
    def summary(self) -> dict[str, object]:
        """For the JSON."""
        return {
            **({"what": self.what} if self.what else {}),
            "rate": round(self.rate, 1),
            "elapsed_s": round(self.elapsed_s, 3),
            **{f"p{rank}_ms": percentile(self.latencies_ms, rank) for rank in (50, 99) if self.latencies_ms},
            "statuses": self.statuses,
            "cpu_us": self.cpu_us,
        }


@attrs.frozen(kw_only=True)
class Site:
    """
    A furnished database, and what a service on it must be told.

    Attributes:
        path: Of the URL of its agents; each site has one of its own, so that their requests can be counted.
        since: Rows with a smaller id were there before.
    """

    url: str
    env: Mapping[str, str] = attrs.field(repr=False)
    path: str
    estate: Estate
    since: UUID = FIRST_ID


@attrs.define(kw_only=True)
class Variant:
    """
    Something that answers calls, and what has been asked of it so far.

    Attributes:
        start: Ends its server, if there is one, and gives a new one; of what is not started again always the same.
        requests: Calls of its open agents, whole HTTP requests.
        path: Of the agent's URL.
        site: None: it has no database.
    """

    name: str
    bench: Workbench
    start: Callable[[], Server] = attrs.field(repr=False)
    requests: Sequence[str] = attrs.field(repr=False)
    path: str
    site: Site | None = None
    rounds: list[Round] = attrs.field(factory=list)
    tally: Counter[str] = attrs.field(factory=Counter)
    faults: list[str] = attrs.field(factory=list)
    server: Server = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.server = self.start()

    @classmethod
    def on(cls, site: Site, bench: Workbench, name: str, start: Callable[[], Server]) -> Variant:
        requests = [call_of(agent) for agent in site.estate.agents if not agent.shut]
        return cls(name=name, bench=bench, start=start, requests=requests, path=site.path, site=site)

    def start_anew(self) -> None:
        self.server = self.start()

    def warm_up(self, connections: int, seconds: float = WARM_UP_S) -> None:
        """For so long, and never longer than three rounds."""
        self._load(connections=connections, seconds=min(seconds, 3 * self.bench.plan.seconds))

    def round(self, what: str = "", *, connections: int, **job: Any) -> Round:
        """One measured round; `job` is what the load generator takes beside."""
        done = attrs.evolve(self._load(connections=connections, **job), what=what)
        self.rounds.append(done)
        return done

    def begin(self, *, connections: int, requests: Sequence[str] | None = None, **job: Any) -> RunningLoad:
        """Load that runs beside other things; give it to `take`."""
        whole = {"address": [HOST, self.server.port], "requests": requests or self.requests, **job}
        return RunningLoad(self.bench.folder, {**whole, "connections": connections, "seed": self.bench.next_seed()})

    def take(self, running: RunningLoad, expected: Sequence[str] = ("200",), *, invokes: bool = True) -> Round:
        """What it gave, once it has ended. Any answer that is not expected is a fault."""
        result = running.result()
        if invokes:
            self.tally.update(result["statuses"])
        strange = {status: n for status, n in result["statuses"].items() if status not in expected}
        if strange or result["broken"]:
            told = "; ".join(result["complaints"])
            self.faults.append(f"unexpected answers {strange}, {result['broken']} broken connections: {told}")
        return Round(
            rate=result["answered"] / result["elapsed_s"],
            elapsed_s=result["elapsed_s"],
            latencies_ms=[us / 1000 for us in result["latencies_us"]],
            statuses=result["statuses"],
            cpu_us={"load": round(result["cpu_s"] * 1e6 / max(1, sum(result["statuses"].values())))},
        )

    def _load(self, *, connections: int, **job: Any) -> Round:
        trees = {"service": self.server.tree, "agent": self.bench.agent.tree, "postgres": self.bench.postgres_tree}
        if self.server.tree == self.bench.agent.tree:
            del trees["service"]
        before = {name: tree.cpu_s() for name, tree in trees.items()}
        done = self.take(self.begin(connections=connections, **job))
        answers = max(1, sum(done.statuses.values()))
        spent = {name: round((tree.cpu_s() - before[name]) * 1e6 / answers) for name, tree in trees.items()}
        return attrs.evolve(done, cpu_us={**spent, **done.cpu_us})

    def mismatches(self) -> list[str]:
        """What does not add up, all loads together."""
        acknowledged = sum(self.tally[status] for status in ACKNOWLEDGED)
        requests = self.bench.agent.requests(self.path)
        found = list(self.faults)
        if self.site is not None:
            expected = Expected(acknowledged=acknowledged, agent_requests=requests)
            found += count(dsn_of(self.site.url), self.site.since).mismatches(expected)
        elif requests != acknowledged:
            found.append(f"{acknowledged} answers, and the agent received {requests} requests")
        return [f"{self.name}: {fault}" for fault in found]

    @property
    def latencies_ms(self) -> list[float]:
        """Of all measured rounds."""
        return [latency_ms for done in self.rounds for latency_ms in done.latencies_ms]


class Workbench:
    """Made by `workbench`; gives variants for the length of a block."""

    def __init__(self, plan: Plan, folder: Path, postgres: EmbeddedPostgres, agent: Agent, tell: Callable[[str], None]):
        self.plan = plan
        self.folder = folder
        self.agent = agent
        self.tell = tell
        self._postgres = postgres
        self._seed = 0
        self._made = 0
        self._secret_keys = "k1:" + base64.b64encode(os.urandom(32)).decode()

    @property
    def postgres_tree(self) -> Tree:
        return Tree(self._postgres.pid)

    def next_seed(self) -> int:
        """The same ones in every run."""
        self._seed += 1
        return self._seed

    def connect(self, url: str | None = None) -> psycopg.Connection[Any]:
        """To a database by its URL, as its superuser, in autocommit; by default to the server's own."""
        return psycopg.connect(dsn_of(url or self._url("postgres")), autocommit=True)

    @contextmanager
    def database(self) -> Iterator[str]:
        """The URL of a new database with the newest schema, gone after the block."""
        self._made += 1
        name = f"benchmark_{self._made}"
        self._administer(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        try:
            url = self._url(name)
            migrate(url)
            yield url
        finally:
            self._administer(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

    @contextmanager
    def site(self, *, orgs: int = 1, agents_each: int = 1, shut_each: int = 0, slow: bool = False) -> Iterator[Site]:
        """A new database with organisations and agents in it, which live at one path of the agent."""
        with self.database() as url:
            env = self._environment(url)
            path = self._next_path(slow)
            estate = asyncio.run(
                furnish(
                    Settings.from_env(env),
                    url,
                    self.agent.url(path),
                    orgs=orgs,
                    agents_each=agents_each,
                    shut_each=shut_each,
                )
            )
            yield Site(url=url, env=env, path=path, estate=estate)

    @contextmanager
    def ours(self, site: Site, *, redis_url: str | None = None) -> Iterator[Variant]:
        """The service in gunicorn, as `serve` runs it; with Redis it keeps its limits there."""
        redis = {f"{PREFIX}_REDIS_URL": redis_url} if redis_url else {}
        with self._gunicorn("ours", APP, {**site.env, **redis}) as start:
            yield Variant.on(site, self, "ours", start)

    @contextmanager
    def confined(self, site: Site) -> Iterator[Variant]:
        """The same with a role that does not own the tables, under row security."""
        self._made += 1
        name = f"benchmark_role_{self._made}"
        role = sql.Identifier(name)
        self._administer(sql.SQL("CREATE ROLE {} LOGIN").format(role))
        try:
            migrate(site.url, name)
            url = make_url(site.url).set(username=name).render_as_string(hide_password=False)
            env = {**site.env, f"{PREFIX}_DATABASE_URL": url, f"{PREFIX}_ROW_SECURITY": "on"}
            with self._gunicorn("confined", APP, env) as start:
                yield Variant.on(site, self, "confined", start)
        finally:
            with self.connect(site.url) as connection:
                connection.execute(sql.SQL("DROP OWNED BY {}").format(role))
            self._administer(sql.SQL("DROP ROLE {}").format(role))

    @contextmanager
    def whole_serve(self, site: Site) -> Iterator[Variant]:
        """The command `external-agents serve`, so with its supervisor."""
        log = self._log("serve")
        with running_serve(site.env, workers=self.plan.workers, log=log) as server:
            yield Variant.on(site, self, "ours", lambda: server)

    @contextmanager
    def naive(self, site: Site) -> Iterator[Variant]:
        with self._gunicorn("naive", NAIVE, site.env) as start:
            yield Variant.on(site, self, "naive", start)

    @contextmanager
    def forward(self, *, slow: bool = False) -> Iterator[Variant]:
        path = self._next_path(slow)
        with self._gunicorn("forward", FORWARD, {forward.AGENT_URL: self.agent.url(path)}) as start:
            requests = [request_text("POST", "/api/external-agents/any/invoke", "none", PAYLOAD)]
            yield Variant(name="forward", bench=self, start=start, requests=requests, path=path)

    def direct(self) -> Variant:
        """The agent itself."""
        path = self._next_path(slow=False)
        requests = [request_text("POST", path, "none", PAYLOAD)]
        return Variant(name="direct", bench=self, start=lambda: self.agent, requests=requests, path=path)

    @contextmanager
    def redis(self) -> Iterator[str]:
        """Its URL."""
        self._made += 1
        with running_redis(self.folder / f"redis-{self._made}") as server:
            yield f"redis://{HOST}:{server.port}/0"

    def profile(self, variant: Variant, *, connections: int) -> None:
        """When asked for: one more round, unmeasured, with a profiler at one of the workers."""
        folder = self.plan.profile_folder
        if folder is not None:
            running = variant.begin(connections=connections, seconds=self.plan.seconds)
            written = profiling.sample(variant.server.tree, self.plan.seconds * 0.8, folder, variant.name)
            variant.take(running)
            self.tell(f"  profile: {written}")

    def keep_logs(self, folder: Path) -> None:
        """What the services have said so far, for whoever looks for the reason of a mismatch."""
        folder.mkdir(parents=True, exist_ok=True)
        for log in self.folder.glob("*.log"):
            shutil.copy(log, folder)

    def checkpoint(self) -> None:
        """So that every case begins with the same work behind it."""
        with self.connect() as connection:
            connection.execute("CHECKPOINT")

    @contextmanager
    def _gunicorn(self, name: str, app: str, env: Mapping[str, str]) -> Iterator[Callable[[], Server]]:
        """Each call ends the server that there is, and starts another."""
        log = self._log(name)
        with ExitStack() as running:

            def start() -> Server:
                running.close()
                return running.enter_context(serving(app, env, workers=self.plan.workers, log=log))

            yield start

    def _environment(self, url: str) -> dict[str, str]:
        settings = {
            "DATABASE_URL": url,
            "SECRET_KEYS": self._secret_keys,
            "EGRESS_ALLOW": "loopback",
            "LOG_FORMAT": "json",
            "LOG_LEVEL": "info",
            "HOME": str(self.folder / "home"),
        }
        return {f"{PREFIX}_{name}": text for name, text in settings.items()}

    def _log(self, name: str) -> Path:
        self._made += 1
        return self.folder / f"{name}-{self._made}.log"

    def _next_path(self, slow: bool) -> str:
        self._made += 1
        return f"/{'slow' if slow else 'fast'}/{self._made}"

    def _url(self, database: str) -> str:
        return make_url(self._postgres.url).set(database=database).render_as_string(hide_password=False)

    def _administer(self, statement: sql.Composed) -> None:
        with self.connect() as connection:
            connection.execute(statement)


@contextmanager
def workbench(plan: Plan, tell: Callable[[str], None], folder: Path | None = None) -> Iterator[Workbench]:
    """Everything that the cases share, in a new folder under `folder` (the system's temporary one by default)."""
    own = Path(tempfile.mkdtemp(prefix="external-agents-benchmark-", dir=folder))
    own.chmod(0o711)  # PostgreSQL may run under another account, which must pass through
    try:
        with owned(own / "postgres-home") as postgres, running_agent() as agent:
            yield Workbench(plan, own, postgres, agent, tell)
    finally:
        shutil.rmtree(own)


def interleaved(
    bench: Workbench, *variants: Variant, connections: int, warm_up_s: float = WARM_UP_S, **job: Any
) -> None:
    """
    `rounds` times one round of each variant, on servers that are warm.

    They are started anew now and then: two processes of one program differ by a tenth for as long as they live.
    """
    rounds = bench.plan.rounds
    beginnings = {rounds * start // STARTS for start in range(STARTS)}
    for number in range(rounds):
        if number in beginnings:
            for variant in variants:
                if number:
                    variant.start_anew()
                variant.warm_up(connections, warm_up_s)
            bench.checkpoint()
        rates = []
        for variant in variants:
            done = variant.round(connections=connections, seconds=bench.plan.seconds, **job)
            rates.append(f"{variant.name} {done.rate:,.0f}/s")
        bench.tell(f"  round {number + 1}: {', '.join(rates)}")


def median_rate(rounds: Sequence[Round]) -> float:
    """Answers a second."""
    return statistics.median(done.rate for done in rounds)


def outcome(findings: Sequence[Finding], *variants: Variant) -> Outcome:
    """Count, and put it together; while the variants are still there."""
    return Outcome(
        findings=findings,
        mismatches=[fault for variant in variants for fault in variant.mismatches()],
        rounds=[{"variant": variant.name, **done.summary} for variant in variants for done in variant.rounds],
    )


def call_of(agent: KnownAgent) -> str:
    return request_text("POST", f"/api/external-agents/{agent.id}/invoke", agent.key, PAYLOAD)


def request_text(method: str, target: str, key: str, body: bytes = b"") -> str:
    fields = [f"Host: {HOST}", f"Authorization: Bearer {key}"]
    if body:
        fields += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([f"{method} {target} HTTP/1.1", *fields, "", ""]) + body.decode("latin-1")


def dsn_of(url: str) -> str:
    """The URL as psycopg takes it."""
    return url.replace("+psycopg", "", 1)
