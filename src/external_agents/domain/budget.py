"""Money and monthly budgets: reserve before the call, charge or release after it. Decimal throughout, never float."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import date, datetime
from decimal import Decimal

import attrs

from external_agents.domain.errors import Fault
from external_agents.domain.json_values import JsonText, JsonValue
from external_agents.domain.schema import register_format

AMOUNT_BELOW = Decimal(10) ** 12
AMOUNT_DECIMALS = 9
DEFAULT_CURRENCY = "USD"

_AMOUNT_TEXT = re.compile(r"(?:0|[1-9]\d{0,11})(?:\.\d{1,20})?", re.ASCII)


@attrs.frozen
class Money:
    amount: Decimal
    currency: str

    def __str__(self) -> str:
        return f"{self.plain_amount} {self.currency}"

    @property
    def plain_amount(self) -> str:
        return plain(self.amount)


def plain(amount: Decimal) -> str:
    """`0.05`: no exponent, no trailing zeros."""
    text = f"{amount:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def parse_amount(value: JsonValue) -> Decimal | None:
    """A number or decimal string, ≥ 0, < 10^12, with at most 9 decimals; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        value = Decimal(value) if _AMOUNT_TEXT.fullmatch(value) else None
    elif isinstance(value, float):
        value = Decimal(repr(value))
    if not isinstance(value, int | Decimal):
        return None
    amount = Decimal(value)
    if not amount.is_finite() or not 0 <= amount < AMOUNT_BELOW:
        return None
    return abs(amount.normalize()) if _decimals(amount) <= AMOUNT_DECIMALS else None


def _decimals(amount: Decimal) -> int:
    """Places behind the point, trailing zeros apart; exact, where Decimal's own arithmetic rounds to 28 digits."""
    _, digits, exponent = amount.as_tuple()
    if not amount or not isinstance(exponent, int):
        return 0
    return len(bytes(digits).rstrip(b"\0")) - len(digits) - exponent


register_format(
    "amount",
    lambda text: parse_amount(text) is not None,
    "must be a decimal from 0 to below 10^12 with at most 9 decimals",
)

_AMOUNT_SCHEMA = {
    "anyOf": [
        {
            "type": "number",
            "minimum": 0,
            "exclusiveMaximum": int(AMOUNT_BELOW),
            "description": "a number from 0 to below 10^12 with at most 9 decimals",
        },
        {"type": "string", "format": "amount", "maxLength": 32, "description": "the same as a decimal string"},
    ],
}

BUDGET_CONFIG_SCHEMA = {
    "type": "object",
    "description": "What invocations of the agent may cost. Months are UTC.",
    "properties": {
        "max_cost_per_invocation": {
            **_AMOUNT_SCHEMA,
            "description": "Reserved for every invocation until its cost is known.",
        },
        "max_monthly_cost": {**_AMOUNT_SCHEMA, "description": "Spent plus reserved never passes it at admission."},
        "currency": {
            "type": "string",
            "pattern": "^[A-Z]{3}$",
            "description": f"Three capital letters (ISO 4217); {DEFAULT_CURRENCY} when absent.",
        },
    },
    "additionalProperties": False,
    "examples": [{"max_cost_per_invocation": "0.10", "max_monthly_cost": 100, "currency": "EUR"}],
}

_AMOUNTS = ("max_cost_per_invocation", "max_monthly_cost")


def decimals_faults(config: Mapping[str, JsonValue], path: str = "budget_config") -> Iterator[Fault]:
    """What the schema cannot say of numbers: that they have few enough decimals (`multipleOf` knows floats only)."""
    for name in _AMOUNTS:
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, int | Decimal):
            continue
        if 0 <= value < AMOUNT_BELOW and parse_amount(value) is None:
            yield Fault(f"{path}.{name}", f"must have at most {AMOUNT_DECIMALS} decimals")


@attrs.frozen(kw_only=True)
class BudgetConfig:
    """A budget_config that has been validated."""

    per_invocation: Decimal | None = None
    monthly_cap: Decimal | None = None
    currency: str = DEFAULT_CURRENCY

    @classmethod
    def of(cls, config: Mapping[str, JsonValue] | None) -> BudgetConfig:
        config = config or {}
        return cls(
            per_invocation=parse_amount(config.get("max_cost_per_invocation")),
            monthly_cap=parse_amount(config.get("max_monthly_cost")),
            currency=config.get("currency", DEFAULT_CURRENCY),
        )


@attrs.frozen(kw_only=True)
class BudgetAccount:
    """What one agent has spent and reserved in one currency and month."""

    spent: Decimal = Decimal(0)
    reserved: Decimal = Decimal(0)

    def admits(self, config: BudgetConfig) -> bool:
        """Whether another invocation may be reserved for under the cap."""
        if config.monthly_cap is None:
            return True
        committed = self.spent + self.reserved
        if config.per_invocation is None:
            return committed < config.monthly_cap
        return committed + config.per_invocation <= config.monthly_cap

    def reserve(self, amount: Decimal) -> BudgetAccount:
        return attrs.evolve(self, reserved=self.reserved + amount)

    def settle(self, reservation: Decimal, charge: Decimal) -> BudgetAccount:
        """End a reservation: what was charged is spent, the rest is free again."""
        assert 0 <= reservation <= self.reserved, "a reservation is settled once, and was made before"
        return BudgetAccount(spent=self.spent + charge, reserved=self.reserved - reservation)


def budget_month(at: datetime) -> date:
    """The first day of the month of `at`, an aware time in UTC."""
    return date(at.year, at.month, 1)


def reported_cost(answer: JsonText | None) -> Decimal | None:
    """`metadata.cost` of an agent's answer, when it is there and within bounds."""
    if answer is None or ('"metadata"' not in answer.text and "\\" not in answer.text):
        return None
    value = answer.exact()
    metadata = value.get("metadata") if isinstance(value, dict) else None
    return parse_amount(metadata.get("cost")) if isinstance(metadata, dict) else None
