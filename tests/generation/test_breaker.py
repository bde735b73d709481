"""The breaker before the model: when it opens, for how long, and who tries."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app.generation.breaker import MOST_S, PAUSE_S, TRIP_AFTER, Breaker, Entry
from tests.support.clock import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    """Stands still."""
    return FakeClock()


@pytest.fixture
def breaker(clock: FakeClock) -> Breaker:
    """Closed."""
    return Breaker(clock)


def call(breaker: Breaker, *, well: bool | None, pause_s: float | None = None) -> bool:
    """One call after the other; whether it went through."""
    entry = breaker.enter()
    if entry is not None:
        breaker.leave(entry, well=well, pause_s=pause_s)
    return entry is not None


def trip(breaker: Breaker) -> None:
    """Fail until it is open."""
    for _ in range(TRIP_AFTER):
        assert call(breaker, well=False)
    assert not breaker.closed


def test_it_opens_after_failures_in_a_row_only(breaker: Breaker) -> None:
    for _ in range(5):
        for _ in range(TRIP_AFTER - 1):
            call(breaker, well=False)
        call(breaker, well=None)
        call(breaker, well=True)
    assert breaker.closed
    trip(breaker)
    assert not call(breaker, well=True)


def test_one_call_tries_when_the_pause_is_over(breaker: Breaker, clock: FakeClock) -> None:
    trip(breaker)
    clock.advance(int(PAUSE_S * 1000) - 1)
    assert breaker.enter() is None
    clock.advance(1)
    assert breaker.enter() == "trial"
    assert breaker.enter() is None
    breaker.leave("trial", well=True)
    assert breaker.closed
    assert breaker.enter() == "call"


def test_pause_doubles_up_to_a_bound_while_tries_fail_and_begins_anew(breaker: Breaker, clock: FakeClock) -> None:
    trip(breaker)
    pause_s = PAUSE_S
    for _ in range(6):
        clock.advance(int(pause_s * 1000) - 1)
        assert not call(breaker, well=False)
        clock.advance(1)
        assert call(breaker, well=False)
        pause_s = min(MOST_S, 2 * pause_s)
    clock.advance(int(MOST_S * 1000))
    assert call(breaker, well=True)
    trip(breaker)
    clock.advance(int(PAUSE_S * 1000))
    assert call(breaker, well=True)


@pytest.mark.parametrize(("asked_s", "waited_s"), [(6.0, 6.0), (59.0, 59.0), (3_600.0, MOST_S)])
def test_it_opens_at_once_when_the_endpoint_asks_for_a_long_pause(
    breaker: Breaker, clock: FakeClock, asked_s: float, waited_s: float
) -> None:
    call(breaker, well=False, pause_s=asked_s)
    clock.advance(int(waited_s * 1000) - 1)
    assert not call(breaker, well=True)
    clock.advance(1)
    assert call(breaker, well=True)


def test_it_opens_again_when_a_try_fails_though_few_calls_have(breaker: Breaker, clock: FakeClock) -> None:
    call(breaker, well=False, pause_s=6.0)
    clock.advance(6_000)
    assert call(breaker, well=False)
    assert not call(breaker, well=True)


@pytest.mark.parametrize("asked_s", [0.0, 1.0, PAUSE_S])
def test_it_stays_closed_when_the_pause_is_short(breaker: Breaker, asked_s: float) -> None:
    call(breaker, well=False, pause_s=asked_s)
    assert breaker.closed


def test_calls_that_began_before_it_opened_tell_nothing_of_now(breaker: Breaker, clock: FakeClock) -> None:
    early: list[Entry] = [entry for _ in range(5) if (entry := breaker.enter()) is not None]
    trip(breaker)
    breaker.leave(early[0], well=True)
    assert not breaker.closed
    for entry in early[1:]:
        breaker.leave(entry, well=False, pause_s=MOST_S)
    clock.advance(int(PAUSE_S * 1000))
    assert breaker.enter() == "trial"


def test_place_of_a_try_is_free_when_nobody_waits_for_it_any_more(breaker: Breaker, clock: FakeClock) -> None:
    trip(breaker)
    clock.advance(int(PAUSE_S * 1000))
    assert call(breaker, well=None)
    assert not breaker.closed
    assert breaker.enter() == "trial"


class Calls(RuleBasedStateMachine):
    """Calls in any order: at most one tries, and an endpoint that is well again is found out in bounded time."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.breaker = Breaker(self.clock)
        self.entries: list[Entry] = []

    @rule()
    def enter(self) -> None:
        """Somebody comes."""
        if (entry := self.breaker.enter()) is not None:
            self.entries.append(entry)

    @precondition(lambda self: self.entries)
    @rule(place=st.integers(0, 99), well=st.sampled_from([True, False, None]), pause_s=st.none() | st.floats(0, 1e6))
    def leave(self, place: int, well: bool | None, pause_s: float | None) -> None:
        """Somebody is answered."""
        self.breaker.leave(self.entries.pop(place % len(self.entries)), well=well, pause_s=pause_s)

    @rule(ms=st.integers(0, 70_000))
    def wait(self, ms: int) -> None:
        """Time passes."""
        self.clock.advance(ms)

    @invariant()
    def one_tries(self) -> None:
        """Never two, and none while it is closed."""
        tries = self.entries.count("trial")
        assert tries <= 1
        assert not (tries and self.breaker.closed)

    def teardown(self) -> None:
        """Whatever happened, it recovers."""
        for entry in self.entries:
            self.breaker.leave(entry, well=None)
        self.clock.advance(int(MOST_S * 1000))
        assert call(self.breaker, well=True)
        assert self.breaker.closed


TestCalls = Calls.TestCase
TestCalls.settings = settings(max_examples=50, deadline=None)
