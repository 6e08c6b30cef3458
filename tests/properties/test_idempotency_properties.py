"""Fingerprints beside equality of values, and keys beside a dictionary of them."""

from __future__ import annotations

import asyncio
import json
from fractions import Fraction
from typing import Any

import attrs
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from external_agents.adapters.memory import MemoryAgentWriter, MemoryLedger, MemoryStore
from external_agents.domain.idempotency import KEPT_FOR, fingerprint
from external_agents.domain.invocation import ExternalAgentInvocation
from external_agents.domain.json_values import PAYLOAD_DEPTH_MAX, JsonText
from external_agents.domain.refusals import IdempotencyKeyInFlight, IdempotencyKeyReused, RateLimited
from external_agents.testing.builders import conclude, make_agent, make_request, next_version
from external_agents.testing.fakes import FakeClock
from external_agents.testing.strategies import payloads


@attrs.frozen
class Number:
    """A number as it is spelt: digits, and the power of ten that they count."""

    digits: int
    exponent: int

    @property
    def value(self) -> Fraction:
        return self.digits * Fraction(10) ** self.exponent


numbers = st.builds(Number, st.integers(-(10**25), 10**25) | st.integers(-20, 20), st.integers(-40, 40))


def values(scalars: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab\u00e9\U0001f511", max_size=2), inner),
        max_leaves=8,
    )


documents = values(st.none() | st.booleans() | numbers | st.text("a1/\u00e9\U0001f511\ud800", max_size=3))


@st.composite
def spelt(draw: st.DrawFn, value: Any) -> str:
    """The value as some JSON text, in any of the ways that JSON leaves open."""
    space = draw(st.sampled_from(["", " ", "\n\t"]))
    if isinstance(value, Number):
        return draw(_number(value))
    if isinstance(value, str):
        return draw(_string(value))
    if isinstance(value, list):
        return f"[{space}" + f",{space}".join(draw(spelt(item)) for item in value) + f"{space}]"
    if isinstance(value, dict):
        names = draw(st.permutations(list(value)))
        members = [f"{draw(_string(name))}{space}:{space}{draw(spelt(value[name]))}" for name in names]
        if members and draw(st.booleans()):
            members.insert(0, f"{draw(_string(names[-1]))}:[]")  # Given twice: the last one counts.
        return "{" + f"{space},".join(members) + f"{space}}}"
    return json.dumps(value)


@st.composite
def _number(draw: st.DrawFn, number: Number) -> str:
    zeros = draw(st.integers(0, 3))
    digits, exponent = str(abs(number.digits) * 10**zeros), number.exponent - zeros
    point = draw(st.integers(-3, len(digits)))
    if point > 0 and point < len(digits):
        text, exponent = f"{digits[:point]}.{digits[point:]}", exponent + len(digits) - point
    elif point <= 0:
        text, exponent = f"0.{'0' * -point}{digits}", exponent + len(digits) - point
    else:
        text = digits
    sign = "-" if number.digits < 0 or (number.digits == 0 and draw(st.booleans())) else ""
    if exponent == 0 and draw(st.booleans()):
        return sign + text
    plus = "" if exponent < 0 else draw(st.sampled_from(["", "+", "0", "+00"]))
    return f"{sign}{text}{draw(st.sampled_from('eE'))}{plus}{exponent}"


@st.composite
def _string(draw: st.DrawFn, text: str) -> str:
    written = ""
    for char in text:
        if char >= "\ud800" and char <= "\udfff":
            written += f"\\u{ord(char):04X}"
            continue
        in_two = json.dumps(char)[1:-1]
        units = char.encode("utf-16-be")
        escaped = "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))
        written += draw(st.sampled_from([char if char not in '"\\' else in_two, escaped, in_two]))
    return f'"{written.replace("/", draw(st.sampled_from(["/", chr(92) + "/"])))}"'


def comparable(value: Any) -> Any:
    """Equal for equal JSON alone: `True` is no 1, a number no string."""
    if isinstance(value, Number):
        return ("number", value.value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return ("number", Fraction(value))
    if isinstance(value, list):
        return ("array", tuple(map(comparable, value)))
    if isinstance(value, dict):
        return ("object", frozenset((name, comparable(item)) for name, item in value.items()))
    return (type(value).__name__, value)


def print_of(text: str) -> bytes:
    return fingerprint(JsonText.parse(text.encode()))


@settings(max_examples=300)
@given(st.data())
def test_equal_json_has_one_fingerprint_however_it_is_spelt(data: st.DataObject) -> None:
    document = data.draw(documents)
    first, second = data.draw(spelt(document)), data.draw(spelt(document))
    assert print_of(first) == print_of(second), (first, second)
    assert len(print_of(first)) == 32


@settings(max_examples=500)
@given(st.data())
def test_other_json_has_another_fingerprint(data: st.DataObject) -> None:
    first = data.draw(documents)
    second = data.draw(documents | changed(first))
    same = comparable(first) == comparable(second)
    assert (print_of(data.draw(spelt(first))) == print_of(data.draw(spelt(second)))) is same


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A value next to this one: one thing in it another, wrapped, unwrapped, a number written as a string."""
    if isinstance(value, list) and value and draw(st.booleans()):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], draw(changed(value[at])), *value[at + 1 :]]
    if isinstance(value, dict) and value and draw(st.booleans()):
        name = draw(st.sampled_from(sorted(value)))
        return {**value, name: draw(changed(value[name]))}
    near: list[Any] = [[value], {"a": value}, None, 0, "", [], {}]
    if isinstance(value, Number):
        near += [Number(value.digits + 1, value.exponent), Number(value.digits, value.exponent + 1)]
        near += [Number(-value.digits, value.exponent), f"{value.digits}e{value.exponent}", str(value.digits)]
    if isinstance(value, list | dict):
        near += list(value)
    chosen = draw(st.sampled_from(near))
    return Number(0, 0) if chosen == 0 and not isinstance(chosen, bool) else chosen


@given(payloads(), payloads())
def test_python_values_too(first: Any, second: Any) -> None:
    texts = [JsonText.of(first), JsonText.of(second)]
    same = comparable(json.loads(texts[0].text)) == comparable(json.loads(texts[1].text))
    assert (fingerprint(texts[0]) == fingerprint(texts[1])) is same


@given(st.integers(-(10**30), 10**30), st.integers(-(10**40), 10**40), st.integers(0, 5))
def test_exponents_of_any_size(digits: int, exponent: int, zeros: int) -> None:
    assume(digits)
    shifted = f"{digits}{'0' * zeros}e{exponent - zeros}"
    assert print_of(f"{digits}e{exponent}") == print_of(shifted)
    assert print_of(f"{digits}e{exponent}") != print_of(f"{digits}e{exponent + 1}")
    assert print_of(f"0e{exponent}") == print_of("-0.0")


def test_absurd_numbers_take_no_time() -> None:
    many = 1_000_000
    texts = [f"1e{'9' * many}", f"1e-{'9' * many}", "1" * many, f"0.{'0' * many}1", f"1{'0' * many}", "1e999999999"]
    assert len({print_of(text) for text in texts}) == len(texts)
    assert print_of(f"10e{'9' * many}") == print_of(f"1e1{'0' * many}")


def test_the_deepest_payload_has_one() -> None:
    levels = PAYLOAD_DEPTH_MAX - 1
    for opening, closing in [("[", "]"), ('{"a":', "}")]:
        first, second = (f"{opening * levels}{innermost}{closing * levels}" for innermost in ("[]", "{}"))
        assert print_of(first) == print_of(f" {first} ") != print_of(second)


@attrs.define
class Entry:
    """The model: the last invocation under a key."""

    payload: int
    admitted_at_s: float
    invocation: ExternalAgentInvocation
    ended: bool = False


class Keys(RuleBasedStateMachine):
    """One agent with room for a few calls in an hour; what every request must come to follows from a dictionary."""

    @initialize()
    def begin(self) -> None:
        self.runner = asyncio.Runner()
        self.clock, self.store = FakeClock(), MemoryStore()
        self.agent = make_agent(rate_limit_config={"requests_per_hour": 4})
        self.writer = MemoryAgentWriter(self.store)
        self.run(self.writer.create(self.agent))
        self.ledgers = [MemoryLedger(self.store, self.clock) for _ in range(2)]
        self.entries: dict[str, Entry] = {}
        self.admitted_at_s: list[float] = []

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    @rule(key=st.sampled_from("abc"), payload=st.integers(0, 1), ledger=st.integers(0, 1), zeros=st.integers(0, 2))
    def admit(self, key: str, payload: int, ledger: int, zeros: int) -> None:
        text = JsonText(f"{payload}{'.' if zeros else ''}{'0' * zeros}")
        request = make_request(self.agent, idempotency_key=key, request=text)
        now_s, entry = self.clock.monotonic_s(), self.entries.get(key)
        if entry is not None and now_s >= entry.admitted_at_s + KEPT_FOR.total_seconds():
            entry = None
        full = sum(1 for at_s in self.admitted_at_s if at_s > now_s - 3600) >= 4
        try:
            admission = self.run(self.ledgers[ledger].admit(request))
        except IdempotencyKeyReused:
            assert entry is not None
            assert entry.payload != payload
        except IdempotencyKeyInFlight:
            assert entry is not None
            assert (entry.payload, entry.ended) == (payload, False)
        except RateLimited:
            assert full
            assert entry is None
        else:
            if admission.replayed:
                assert entry is not None
                assert (entry.payload, entry.ended, entry.invocation) == (payload, True, admission.invocation)
            else:
                assert entry is None
                assert not full
                assert admission.invocation.id == request.invocation_id
                self.entries[key] = Entry(payload, now_s, admission.invocation)
                self.admitted_at_s.append(now_s)

    @precondition(lambda self: any(not entry.ended for entry in self.entries.values()))
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from([entry for entry in self.entries.values() if not entry.ended]))
        entry.invocation, entry.ended = self.run(self.ledgers[0].settle(conclude(entry.invocation))), True

    @rule(seconds=st.sampled_from([1, 3672, 43_200, 86_399, 86_400]))
    def time_passes(self, seconds: int) -> None:
        self.clock.advance(seconds)

    @rule()
    def the_agent_changes(self) -> None:
        self.agent = next_version(self.agent)
        self.run(self.writer.update(self.agent))

    @invariant()
    def every_admission_took_one_place_and_left_one_row(self) -> None:
        if hasattr(self, "admitted_at_s"):
            assert len(self.store.invocations_of(self.agent.org_id)) == len(self.admitted_at_s)

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.runner.close()


Keys.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestKeys = Keys.TestCase
