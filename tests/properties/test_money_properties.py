"""Amounts, and the ledger's accounts beside a list of bookings."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any
from uuid import UUID

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from external_agents.adapters.memory import MemoryAgentWriter, MemoryLedger, MemoryStore
from external_agents.domain.budget import BudgetAccount, BudgetConfig, Money, parse_amount, reported_cost
from external_agents.domain.invocation import ExternalAgentInvocation
from external_agents.domain.json_values import JsonText, dumps
from external_agents.domain.refusals import BudgetExceeded
from external_agents.ports.ledger import LEASE_S
from external_agents.testing.builders import (
    conclude,
    costing,
    id_at,
    make_agent,
    make_request,
    next_version,
    refused,
    timed_out,
)
from external_agents.testing.fakes import FakeClock
from external_agents.testing.strategies import amounts

BILLION = 10**9


def is_amount(value: Fraction) -> bool:
    return 0 <= value < 10**12 and (value * BILLION).denominator == 1


@st.composite
def wild_decimals(draw: st.DrawFn) -> Decimal:
    """Near the bounds, with more digits than Decimal's arithmetic keeps."""
    digits = draw(st.text("0129", min_size=1, max_size=60))
    return draw(st.sampled_from([1, 1, 1, -1])) * Decimal((0, tuple(map(int, digits)), draw(st.integers(-60, 15))))


@given(amounts())
def test_an_amount_is_read_alike_from_every_form(amount: Decimal) -> None:
    plain = Money(amount, "USD").plain_amount
    assert Fraction(plain) == Fraction(amount)
    assert "E" not in plain.upper()
    assert plain == "0" or (not plain.endswith(".") and (not plain.endswith("0") or "." not in plain))
    for form in (amount, plain, f"{amount:f}", amount.normalize(), amount.quantize(Decimal("1.000000000"))):
        read = parse_amount(form)
        assert read is not None
        assert read == amount
    assert "." not in plain or parse_amount(plain + "0" * 9) == amount
    for text in (plain, f'"{plain}"', dumps(amount)):
        assert reported_cost(JsonText(f'{{"metadata":{{"cost":{text}}}}}')) == amount


@settings(max_examples=400)
@given(wild_decimals() | st.decimals(-(10**13), 10**13) | st.decimals(allow_nan=True, allow_infinity=True, places=12))
def test_exactly_the_amounts_within_bounds_are_read(number: Decimal) -> None:
    read = parse_amount(number)
    if not number.is_finite():
        assert read is None
    else:
        assert (read is not None) == is_amount(Fraction(number))
        assert read is None or Fraction(read) == Fraction(number)
        assert read is None or len(f"{read:f}") <= 22


@given(st.text(max_size=20) | st.from_regex(r"[0-9]{1,14}(\.[0-9]{0,11})?"))
def test_text_is_read_only_in_plain_form(text: str) -> None:
    read = parse_amount(text)
    if read is not None:
        assert Fraction(read) == Fraction(text)
        assert is_amount(Fraction(text))
        assert set(text) <= set("0123456789.")


@given(st.none() | st.booleans() | st.lists(st.integers()) | st.dictionaries(st.text(), st.integers()))
def test_nothing_else_is_an_amount(value: Any) -> None:
    assert parse_amount(value) is None


@given(st.floats())
def test_floats_are_read_as_they_are_written(value: float) -> None:
    read = parse_amount(value)
    written = Decimal(repr(value))
    assert (read is not None) == (written.is_finite() and is_amount(Fraction(written)))
    assert read is None or read == written


small_amounts = st.integers(0, 30).map(lambda tenths: Decimal(tenths) / 10)


@given(small_amounts, small_amounts, st.none() | small_amounts, st.none() | st.sampled_from([-1, 0, 1]))
def test_the_rule_of_admission(spent: Decimal, reserved: Decimal, per: Decimal | None, over: int | None) -> None:
    """Around the cap: a billionth less than what is needed, exactly that, a billionth more."""
    cap = None if over is None else max(Decimal(0), spent + reserved + (per or 0) + Decimal(over).scaleb(-9))
    admits = BudgetAccount(spent=spent, reserved=reserved).admits(BudgetConfig(per_invocation=per, monthly_cap=cap))
    if cap is None:
        assert admits
    elif per is None:
        assert admits == (spent + reserved < cap)
    else:
        assert admits == (spent + reserved + per <= cap)


@attrs.define
class Booking:
    """The model: one admitted invocation."""

    invocation: ExternalAgentInvocation
    instance: MemoryLedger
    month: int
    currency: str
    reserved: Fraction
    spent: Fraction = Fraction(0)
    open: bool = True


MONTHS = [datetime(2026, month, 15, 12, tzinfo=UTC) for month in (1, 2, 3)]
CURRENCIES = st.sampled_from(["USD", "EUR"])
PER_INVOCATION = st.none() | small_amounts | st.just(Decimal("0.000000001"))


class Budgets(RuleBasedStateMachine):
    """Admissions and ends of one agent over three months and two currencies, summed up from a list."""

    @initialize()
    def begin(self) -> None:
        self.runner = asyncio.Runner()
        self.clock, self.store = FakeClock(MONTHS[-1]), MemoryStore()
        self.writer = MemoryAgentWriter(self.store)
        self.agent = make_agent()
        self.run(self.writer.create(self.agent))
        self.ledger = self.new_ledger()
        self.bookings: list[Booking] = []

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    def new_ledger(self) -> MemoryLedger:
        ledger = MemoryLedger(self.store, self.clock)
        self.run(ledger.heartbeat())
        return ledger

    @rule(per=PER_INVOCATION, cap=st.none() | small_amounts, currency=CURRENCIES)
    def the_budget_changes(self, per: Decimal | None, cap: Decimal | None, currency: str) -> None:
        config: dict[str, Any] = {"currency": currency}
        config |= {} if per is None else {"max_cost_per_invocation": per}
        config |= {} if cap is None else {"max_monthly_cost": f"{cap:f}"}
        self.agent = next_version(self.agent, budget_config=config)
        self.run(self.writer.update(self.agent))

    @rule(month=st.sampled_from([0, 1, 2, 2, 2]))
    def admit(self, month: int) -> None:
        budget = self.agent.budget
        committed = self.total("spent", month, budget.currency) + self.total("reserved", month, budget.currency)
        per = Fraction(budget.per_invocation or 0)
        cap = budget.monthly_cap
        fits = cap is None or (committed < cap if budget.per_invocation is None else committed + per <= Fraction(cap))
        request = make_request(self.agent, invocation_id=id_at(MONTHS[month] + timedelta(hours=len(self.bookings))))
        try:
            invocation = self.run(self.ledger.admit(request)).invocation
        except BudgetExceeded:
            assert not fits
            return
        assert fits
        self.bookings.append(Booking(invocation, self.ledger, month, budget.currency, per))

    @precondition(lambda self: any(booking.open for booking in self.bookings))
    @rule(data=st.data(), cost=st.none() | small_amounts, ending=st.sampled_from(["answer", "failure", "timeout"]))
    def settle(self, data: st.DataObject, cost: Decimal | None, ending: str) -> None:
        booking = data.draw(st.sampled_from([booking for booking in self.bookings if booking.open]))
        outcome = {
            "answer": costing(None if cost is None else f"{cost:f}"),
            "failure": refused(),
            "timeout": timed_out(),
        }[ending]
        self.run(booking.instance.settle(conclude(booking.invocation, outcome, currency=booking.currency)))
        if ending == "answer" and cost is not None:
            self.close(booking, Fraction(cost))
        else:
            self.close(booking, Fraction(0) if ending == "failure" else booking.reserved)

    @precondition(lambda self: any(not booking.open for booking in self.bookings))
    @rule(data=st.data())
    def settle_again(self, data: st.DataObject) -> None:
        booking = data.draw(st.sampled_from([booking for booking in self.bookings if not booking.open]))
        again = conclude(booking.invocation, costing("9"), currency=booking.currency)
        assert self.run(self.ledger.settle(again)).cost != again.cost

    @rule()
    def the_instance_dies(self) -> None:
        self.ledger = self.new_ledger()
        self.clock.advance(LEASE_S + 1)
        self.run(self.ledger.heartbeat())
        left = [booking for booking in self.bookings if booking.open and booking.instance is not self.ledger]
        assert self.run(self.ledger.recover()) == len(left)
        for booking in left:
            self.close(booking, booking.reserved)

    def close(self, booking: Booking, spent: Fraction) -> None:
        booking.reserved, booking.spent, booking.open = Fraction(0), spent, False

    def total(self, what: str, month: int, currency: str) -> Fraction:
        return sum(
            (
                getattr(booking, what)
                for booking in self.bookings
                if (booking.month, booking.currency) == (month, currency)
            ),
            Fraction(0),
        )

    @invariant()
    def the_accounts_are_the_sums(self) -> None:
        if not hasattr(self, "bookings"):
            return
        for month in range(3):
            for currency in ("USD", "EUR"):
                key = ((self.agent.org_id, self.agent.id), currency, MONTHS[month].date().replace(day=1))
                account = self.store.accounts.get(key, BudgetAccount())
                assert Fraction(account.spent) == self.total("spent", month, currency)
                assert Fraction(account.reserved) == self.total("reserved", month, currency)
        forecast = self.run(self.ledger.forecast(self.agent.org_id, self.agent.id))
        assert Fraction(forecast.account.spent) == self.total("spent", 2, self.agent.budget.currency)

    @invariant()
    def the_record_agrees(self) -> None:
        if not hasattr(self, "bookings"):
            return
        rows: dict[UUID, ExternalAgentInvocation] = self.store.invocations_of(self.agent.org_id)
        assert len(rows) == len(self.bookings)
        for booking in self.bookings:
            row = rows[booking.invocation.id]
            assert row.has_ended is not booking.open
            assert Fraction(row.charged_amount) == booking.spent

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.runner.close()


Budgets.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestBudgets = Budgets.TestCase
