"""What is to happen in a run, drawn from its seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import attrs

ORGANISATIONS = ("acme", "globex", "initech")
PHASE_S = 10.0
"""Each organisation has one agent with a small budget for every such stretch, so that one is always nearly spent."""
HEARTBEATS_A_LEASE = 4.5
"""As in production."""
LEASE_MAX_S = 15.0
"""gunicorn kills a worker that has stood still for 30 s: a stop that lasts longer would be one more kill."""

PLENTY = Decimal("0.05"), Decimal(1_000_000)
SMALLEST = Decimal("0.000000001")


@attrs.frozen(kw_only=True)
class Options:
    """
    Attributes:
        invocations: At least so many are admitted, if that can be within three times `duration_s`.
        duration_s: How long the callers call, at least.
        calls_per_s: What they aim at, all together.
        lease_s: Of the workers; at most LEASE_MAX_S.
        control: A ledger of `controls` to be caught, instead of the real one.
    """

    seed: int
    invocations: int
    duration_s: float
    kills: int
    pauses: int
    database_crashes: int
    redis_crashes: int = 0
    clients: int = 32
    calls_per_s: float = 60.0
    servers: int = 2
    workers: int = 2
    lease_s: float = attrs.field(validator=attrs.validators.le(LEASE_MAX_S))
    control: str | None = None

    @property
    def heartbeat_s(self) -> float:
        return self.lease_s / HEARTBEATS_A_LEASE


@attrs.frozen(kw_only=True)
class AgentPlan:
    """An agent as it is registered; `per_minute` and `per_hour` are never changed afterwards."""

    org: str
    name: str
    reservation: Decimal | None = None
    cap: Decimal | None = None
    per_minute: int | None = None
    per_hour: int | None = None
    max_attempts: int = 3
    timeout_s: int = 2

    def document(self, webhook_url: str) -> dict[str, Any]:
        budget = {"max_cost_per_invocation": self.reservation, "max_monthly_cost": self.cap}
        limits = {"requests_per_minute": self.per_minute, "requests_per_hour": self.per_hour}
        limits = {name: limit for name, limit in limits.items() if limit is not None}
        return {
            "name": self.name,
            "provider": "custom",
            "webhook_url": webhook_url,
            "auth_type": "none",
            "timeout_s": self.timeout_s,
            "max_attempts": self.max_attempts,
            "budget_config": {name: str(amount) for name, amount in budget.items()} if self.cap is not None else None,
            "rate_limit_config": limits or None,
        }


@attrs.frozen(kw_only=True)
class Call:
    """
    What one caller asks for, once or, with a key, until it knows the outcome.

    Attributes:
        name: Of this call alone; it is in the payload.
        do: What the agent is to do; see `agent`.
        cost: The agent's figure.
        patience_s: When the caller hangs up.
    """

    name: str
    agent: AgentPlan
    do: str
    delay_s: float
    cost: str | None
    patience_s: float
    key: str | None = None

    @property
    def payload(self) -> dict[str, Any]:
        return {"call": self.name, "org": self.agent.org, "do": self.do, "delay_s": self.delay_s, "cost": self.cost}


@attrs.frozen(order=True)
class Event:
    """`kind`: `kill`, `pause`, `database`, `redis`. `lasts_s`: until what was stopped goes on."""

    at_s: float
    kind: str
    lasts_s: float


BEHAVIOURS = {
    "succeed": 54,
    "work": 20,
    "text": 3,
    "refuse": 6,
    "flaky": 5,
    "down": 2,
    "hang": 2,
    "drop": 5,
    "garbage": 3,
    "redirect": 1,
}
PATIENCE_S = 90.0
HASTE_S = 0.15
"""Some callers hang up so early."""


class Plan:
    def __init__(self, options: Options) -> None:
        self.options = options
        self._phases = 1 + round(3 * options.duration_s / PHASE_S)
        self.agents = list(self._agents(random.Random(f"{options.seed}/agents")))
        self._by_name = {(agent.org, agent.name): agent for agent in self.agents}
        self.events = sorted(self._events(random.Random(f"{options.seed}/events")))

    def _agents(self, chance: random.Random) -> Iterator[AgentPlan]:
        for org in ORGANISATIONS:
            yield AgentPlan(org=org, name="open", reservation=PLENTY[0], cap=PLENTY[1])
            yield AgentPlan(org=org, name="free", max_attempts=2)
            yield AgentPlan(org=org, name="flapping", reservation=PLENTY[0], cap=PLENTY[1])
            yield AgentPlan(org=org, name="minutely", per_minute=chance.randint(3, 12), per_hour=100_000)
            yield AgentPlan(
                org=org, name="hourly", per_hour=chance.randint(20, 60), reservation=PLENTY[0], cap=PLENTY[1]
            )
            for phase in range(self._phases):
                reservation = Decimal(chance.randint(1, 99)) / 100 + SMALLEST * chance.randint(0, 999)
                # Not always a multiple of the reservation, so that what is left over is sometimes too little for one.
                cap = reservation * chance.randint(4, 12) + chance.choice((Decimal(0), reservation / 2, -SMALLEST))
                yield AgentPlan(org=org, name=f"tight-{phase}", reservation=reservation, cap=round(cap, 9))

    def _events(self, chance: random.Random) -> Iterator[Event]:
        """Evenly over the time, each kind at its own pace, a little shifted."""
        options = self.options
        kinds = (
            ("kill", options.kills, 0.55),
            ("pause", options.pauses, 0.2),
            ("database", options.database_crashes, 0.75),
            ("redis", options.redis_crashes, 0.4),
        )
        for kind, count, offset in kinds:
            for number in range(count):
                at = (number + offset + chance.uniform(-0.1, 0.1)) / count
                yield Event(at * options.duration_s, kind, self._length_s(kind, chance))

    def _length_s(self, kind: str, chance: random.Random) -> float:
        if kind == "pause":
            # The last heartbeat may just have been sent, and recovery looks once a heartbeat.
            return self.options.lease_s * chance.uniform(1.1, 1.3) + 2 * self.options.heartbeat_s
        return chance.uniform(0.2, 2.5)

    def call(self, chance: random.Random, name: str, elapsed_s: float) -> Call:
        """What is asked for at that time."""
        [kind] = chance.choices(("open", "free", "flapping", "minutely", "hourly", "tight"), (44, 14, 12, 10, 6, 14))
        if kind == "tight":
            kind = f"tight-{min(int(elapsed_s / PHASE_S), self._phases - 1)}"
        agent = self._by_name[chance.choice(ORGANISATIONS), kind]
        [do] = chance.choices(list(BEHAVIOURS), list(BEHAVIOURS.values()))
        return Call(
            name=name,
            agent=agent,
            do=do,
            delay_s=round(chance.uniform(0.5, 1.7) if do == "work" else chance.choice((0.0, 0.0, 0.02)), 3),
            cost=self._cost(chance, agent),
            patience_s=HASTE_S if chance.random() < 0.03 else PATIENCE_S,
        )

    def _cost(self, chance: random.Random, agent: AgentPlan) -> str | None:
        """Never above the reservation: what is spent then never passes the cap."""
        if agent.reservation is None or chance.random() < 0.3:
            return None
        units = int(agent.reservation / SMALLEST)
        return f"{SMALLEST * chance.choice((units, chance.randint(0, units))):f}"
