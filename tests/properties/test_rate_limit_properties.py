"""Sliding windows beside a list of timestamps."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from external_agents.domain.rate_limit import RateWindows, Window, limits_of

STARTS_MS = st.sampled_from([0, 1, 1_199, 1_200, 1_700_000_000_000, 1_699_999_999_999, 1_772_539_201_337])
"""Monotonic time begins anywhere; the time of day is large."""


def steps_ms(window: Window) -> st.SearchStrategy[int]:
    """Pauses of every size: within a bucket, whole buckets, about a window, far beyond it."""
    bucket_ms = window.seconds * 1000 // 50
    return (
        st.integers(0, bucket_ms)
        | st.integers(0, 60).map(lambda buckets: buckets * bucket_ms)
        | st.integers(window.seconds * 1000 - 5, window.seconds * 1000 + 2 * bucket_ms)
        | st.integers(0, 3 * window.seconds * 1000)
    )


class OneWindow(RuleBasedStateMachine):
    """Admissions under one limit that may change, each judged by counting timestamps, in whole milliseconds."""

    @initialize(window=st.sampled_from(list(Window)), start_ms=STARTS_MS, limit=st.integers(0, 6))
    def begin(self, window: Window, start_ms: int, limit: int) -> None:
        self.window, self.now_ms, self.limit = window, start_ms, limit
        self.span_ms = window.seconds * 1000
        self.counted = RateWindows()
        self.admitted_ms: list[int] = []
        self.held: list[tuple[int, tuple[int, ...]]] = []

    @rule(data=st.data())
    def time_passes(self, data: st.DataObject) -> None:
        self.now_ms += data.draw(steps_ms(self.window))

    @rule(limit=st.integers(0, 6))
    def the_limit_changes(self, limit: int) -> None:
        self.limit = limit

    @rule(times=st.integers(1, 4))
    def admit(self, times: int) -> None:
        for _ in range(times):
            counted = self.counted.advanced(self.now_s)
            refusal = counted.refusal({self.window: self.limit}, self.now_s)
            strict = self.admitted_within(self.span_ms)
            late = self.admitted_within(self.span_ms + self.span_ms // 50)
            if refusal is None:
                assert strict < self.limit
                self.counted = counted.taken()
                self.admitted_ms.append(self.now_ms)
                self.held.append((self.now_ms, self.counted.heads))
            else:
                assert late >= self.limit

    @precondition(lambda self: self.held)
    @rule(data=st.data(), is_noticed_late=st.booleans())
    def a_place_is_given_back(self, data: st.DataObject, is_noticed_late: bool) -> None:
        taken_ms, heads = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        counted = self.counted.advanced(self.now_s) if is_noticed_late else self.counted
        self.counted = counted.given_back(heads)
        self.admitted_ms.remove(taken_ms)

    @rule()
    def what_is_given_back_at_once_was_never_taken(self) -> None:
        counted = self.counted.advanced(self.now_s)
        taken = counted.taken()
        assert taken.given_back(taken.heads) == counted
        limits = {self.window: self.limit}
        if counted.refusal(limits, self.now_s) is None:
            assert taken.quotas(limits, self.now_s).given_back() == counted.quotas(limits, self.now_s)

    @rule(earlier_ms=st.integers(1, 100_000))
    def the_clock_is_set_back(self, earlier_ms: int) -> None:
        earlier_s = max(0, self.now_ms - earlier_ms) / 1000
        assert self.counted.advanced(self.now_s).advanced(earlier_s) == self.counted.advanced(self.now_s)

    @rule()
    def whoever_waits_as_told_is_admitted(self) -> None:
        counted = self.counted.advanced(self.now_s)
        refusal = counted.refusal({self.window: self.limit}, self.now_s)
        if refusal is None or self.limit == 0:
            return
        _, retry_after_s = refusal
        assert 1 <= retry_after_s <= self.window.seconds + self.window.bucket_s + 1
        then_s = self.now_s + retry_after_s
        assert counted.advanced(then_s).refusal({self.window: self.limit}, then_s) is None
        before_s = self.now_s + counted[self.window].free_after_s(self.window, self.limit, self.now_s) - 0.001
        if before_s > self.now_s:
            assert counted.advanced(before_s).refusal({self.window: self.limit}, before_s) is not None

    @rule()
    def quotas_tell_the_same(self) -> None:
        counted = self.counted.advanced(self.now_s)
        [quota] = counted.quotas({self.window: self.limit}, self.now_s).quotas
        assert quota.used == counted[self.window].used >= self.admitted_within(self.span_ms)
        assert (quota.remaining == 0) == (counted.refusal({self.window: self.limit}, self.now_s) is not None)
        assert 0 <= quota.resets_in_s <= self.window.seconds * 1.02
        assert (quota.resets_in_s == 0) == (quota.used == 0 and self.limit > 0)

    @invariant()
    def the_state_is_bounded(self) -> None:
        if hasattr(self, "counted"):
            assert len(self.counted[self.window].counts) == 51
            assert min(self.counted[self.window].counts) >= 0

    @property
    def now_s(self) -> float:
        return self.now_ms / 1000

    def admitted_within(self, span_ms: int) -> int:
        return sum(1 for at_ms in self.admitted_ms if self.now_ms - span_ms < at_ms <= self.now_ms)


OneWindow.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestOneWindow = OneWindow.TestCase


@given(
    st.lists(st.integers(0, 90_000_000), max_size=30),
    st.fixed_dictionaries({}, optional={f"requests_per_{window.value}": st.integers(0, 5) for window in Window}),
)
def test_the_windows_are_taken_together(pauses_ms: list[int], config: dict[str, int]) -> None:
    """All or nothing: no stretch of any window holds more than its limit, and a refusal takes no place anywhere."""
    limits, windows, now_ms, admitted_ms = limits_of(config), RateWindows(), 1_700_000_000_000, []
    for pause_ms in pauses_ms:
        now_ms += pause_ms
        windows = windows.advanced(now_ms / 1000)
        refusal = windows.refusal(limits, now_ms / 1000)
        if refusal is None:
            windows = windows.taken()
            admitted_ms.append(now_ms)
        else:
            waits = {
                window: windows[window].free_after_s(window, limits[window], now_ms / 1000)
                for window in limits
                if windows[window].used >= limits[window]
            }
            assert waits[refusal[0]] == max(waits.values())
        for window, limit in limits.items():
            within = [at_ms for at_ms in admitted_ms if now_ms - window.seconds * 1000 < at_ms]
            assert len(within) <= limit
    assert [quota.window for quota in windows.quotas(limits, now_ms / 1000).quotas] == [
        window for window in Window if window in limits
    ]
