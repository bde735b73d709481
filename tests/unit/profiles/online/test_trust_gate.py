"""The trust gate: a look is good for 50 ms, and whatever is in doubt is not trusted."""

from __future__ import annotations

import pytest

from app.errors import StoreUnavailable
from app.profiles.online.cache_protocol import CHECK_VALID_S, HOLD_BACK_S, TrustGate
from tests.support.clock import FakeClock


class Ledger:
    def __init__(self) -> None:
        self.owed = False
        self.failing = False
        self.looks = 0
        self.told = 0

    def any_owed(self) -> bool:
        self.looks += 1
        if self.failing:
            raise StoreUnavailable("locked")
        return self.owed

    def on_owed(self) -> None:
        self.told += 1


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(monotonic_s=0.0)


@pytest.fixture
def gate(ledger: Ledger, clock: FakeClock) -> TrustGate:
    return TrustGate(ledger.any_owed, clock, ledger.on_owed)


def test_hold_back_is_longer_than_any_look_is_valid() -> None:
    assert HOLD_BACK_S >= 2 * CHECK_VALID_S > 0


def test_gate_looks_before_it_holds_when_it_is_new(gate: TrustGate, ledger: Ledger) -> None:
    ledger.owed = True
    assert not gate.holds()
    assert ledger.looks == 1


@pytest.mark.parametrize(("age_ms", "looks"), [(0, 1), (49, 1), (51, 2), (60_000, 2)])
def test_gate_looks_again_after_50_ms(
    gate: TrustGate, ledger: Ledger, clock: FakeClock, age_ms: int, looks: int
) -> None:
    assert gate.holds()
    ledger.owed = True
    clock.advance(age_ms)
    assert gate.holds() is (looks == 1)
    assert ledger.looks == looks


def test_no_look_outlives_the_hold_back(gate: TrustGate, ledger: Ledger, clock: FakeClock) -> None:
    assert gate.holds()
    ledger.owed = True
    clock.advance(round(HOLD_BACK_S * 1000))
    assert not gate.holds()


def test_validity_counts_from_the_start_of_a_look(clock: FakeClock, ledger: Ledger) -> None:
    def slow_look() -> bool:
        owed = ledger.any_owed()
        clock.advance(40)
        return owed

    gate = TrustGate(slow_look, clock, ledger.on_owed)
    assert gate.holds()
    clock.advance(11)
    ledger.owed = True
    assert not gate.holds(), "the first look saw the table as it was 51 ms ago"


def test_gate_distrusts_when_the_look_fails(gate: TrustGate, ledger: Ledger, clock: FakeClock) -> None:
    ledger.failing = True
    assert not gate.holds()
    ledger.failing = False
    assert not gate.holds(), "not before the next look"
    clock.advance(51)
    assert gate.holds()


def test_unproven_values_are_allowed_only_when_the_look_fails(
    gate: TrustGate, ledger: Ledger, clock: FakeClock
) -> None:
    assert not gate.allows_unproven(), "the look shows that nothing is owed"
    ledger.failing = True
    clock.advance(51)
    assert gate.allows_unproven()
    ledger.failing = False
    clock.advance(51)
    assert not gate.allows_unproven()


@pytest.mark.parametrize("looked_before", [True, False])
def test_unproven_values_are_refused_when_the_last_look_does_not_clear_them(
    gate: TrustGate, ledger: Ledger, clock: FakeClock, *, looked_before: bool
) -> None:
    if looked_before:
        ledger.owed = True
        assert not gate.allows_unproven()
        clock.advance(51)
    ledger.failing = True
    assert not gate.allows_unproven()


def test_gate_looks_again_when_the_clock_went_backwards(gate: TrustGate, ledger: Ledger, clock: FakeClock) -> None:
    clock.advance(10_000)
    assert gate.holds()
    ledger.owed = True
    clock._monotonic_s = 1.0
    assert not gate.holds()


def test_gate_logs_owed_rows_once_a_look(gate: TrustGate, ledger: Ledger, clock: FakeClock) -> None:
    assert gate.holds()
    assert ledger.told == 0
    ledger.owed = True
    clock.advance(51)
    gate.holds()
    gate.holds()
    assert ledger.told == 1


def test_gate_ignores_the_wall_clock(gate: TrustGate, ledger: Ledger, clock: FakeClock) -> None:
    """The wall clock means nothing here, whichever way it steps."""
    assert gate.holds()
    clock.step_to(0)
    assert gate.holds()
    assert ledger.looks == 1
