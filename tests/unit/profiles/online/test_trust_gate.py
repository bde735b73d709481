"""The trust gate: a query is good for 50 ms, and whatever is in doubt is not trusted.

On SQLite the query runs on the caller's thread; on PostgreSQL it is awaited.
"""

import asyncio

import pytest

from app.errors import StoreUnavailable
from app.profiles.online.cache_protocol import CHECK_VALID_S, HOLD_BACK_S, TrustGate
from app.profiles.ports import EVERY_SLOT, State
from tests.support.clock import FakeClock

CLEAR = State(owed=frozenset(), server="a", generation=1)


class FakeState:
    """An observed state that is queried on the caller's thread, or awaited if `takes` is given."""

    def __init__(self, clock: FakeClock, *, awaited: bool) -> None:
        self.last = State()
        self.current = CLEAR
        self.failing = False
        self.takes_ms = 0
        self.queries = 0
        self.told = 0
        self.answer = asyncio.Event()
        self.answer.set()
        self._clock = clock
        self._awaited = awaited

    def look(self) -> State | None:
        return None if self._awaited else self._query()

    async def query(self) -> State:
        await self.answer.wait()
        return self._query()

    def on_owed(self) -> None:
        self.told += 1

    def _query(self) -> State:
        self.queries += 1
        if self.failing:
            raise StoreUnavailable("locked")
        self.last = self.current
        self._clock.advance(self.takes_ms)
        return self.last

    def owe(self) -> None:
        self.current = self.current._replace(owed=frozenset({7}))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(monotonic_s=0.0)


@pytest.fixture(params=["sqlite", "postgres"])
async def state(clock: FakeClock, request: pytest.FixtureRequest) -> FakeState:
    return FakeState(clock, awaited=request.param == "postgres")


@pytest.fixture
async def gate(state: FakeState, clock: FakeClock) -> TrustGate:
    """A gate that has queried once: its reads build keys by the state that it has seen."""
    gate = TrustGate(state, clock, state.on_owed)
    await gate.distrusted()
    state.queries = state.told = 0
    clock.advance(51)
    return gate


def test_hold_back_is_longer_than_any_query_is_valid() -> None:
    assert HOLD_BACK_S >= 2 * CHECK_VALID_S > 0


async def test_gate_queries_before_it_holds_when_it_is_new(state: FakeState, clock: FakeClock) -> None:
    state.owe()
    assert await TrustGate(state, clock, state.on_owed).distrusted()
    assert state.queries == 1


@pytest.mark.parametrize(("age_ms", "queries"), [(0, 1), (49, 1), (51, 2), (60_000, 2)])
async def test_gate_queries_again_after_50_ms(
    gate: TrustGate, state: FakeState, clock: FakeClock, age_ms: int, queries: int
) -> None:
    assert not await gate.distrusted()
    state.owe()
    clock.advance(age_ms)
    assert bool(await gate.distrusted()) is (queries != 1)
    assert state.queries == queries


async def test_no_query_outlives_the_hold_back(gate: TrustGate, state: FakeState, clock: FakeClock) -> None:
    assert not await gate.distrusted()
    state.owe()
    clock.advance(round(HOLD_BACK_S * 1000))
    assert await gate.distrusted()


async def test_validity_counts_from_the_start_of_a_query(gate: TrustGate, state: FakeState, clock: FakeClock) -> None:
    state.takes_ms = 40
    assert not await gate.distrusted()
    clock.advance(11)
    state.owe()
    assert await gate.distrusted(), "the first query saw the table as it was 51 ms ago"


async def test_gate_distrusts_when_the_query_fails(gate: TrustGate, state: FakeState, clock: FakeClock) -> None:
    state.failing = True
    assert await gate.distrusted()
    state.failing = False
    assert await gate.distrusted(), "not before the next query"
    clock.advance(51)
    assert not await gate.distrusted()


async def test_unproven_values_are_allowed_only_when_the_query_fails(
    gate: TrustGate, state: FakeState, clock: FakeClock
) -> None:
    assert not await gate.allows_unproven(), "the query shows that nothing is owed"
    state.failing = True
    clock.advance(51)
    assert await gate.allows_unproven()
    state.failing = False
    clock.advance(51)
    assert not await gate.allows_unproven()


@pytest.mark.parametrize("queried_before", [True, False])
async def test_unproven_values_are_refused_when_the_last_query_does_not_clear_them(
    state: FakeState, clock: FakeClock, *, queried_before: bool
) -> None:
    gate = TrustGate(state, clock, state.on_owed)
    if queried_before:
        state.owe()
        assert not await gate.allows_unproven()
        clock.advance(51)
    state.failing = True
    assert not await gate.allows_unproven()


async def test_gate_queries_again_when_the_clock_went_backwards(
    gate: TrustGate, state: FakeState, clock: FakeClock
) -> None:
    clock.advance(10_000)
    assert not await gate.distrusted()
    state.owe()
    clock.monotonic_s = 1.0
    assert await gate.distrusted()


async def test_owed_rows_are_reported_once_a_query(gate: TrustGate, state: FakeState, clock: FakeClock) -> None:
    assert not await gate.distrusted()
    assert state.told == 0
    state.owe()
    clock.advance(51)
    await gate.distrusted()
    await gate.distrusted()
    assert state.told == 1


async def test_gate_ignores_the_wall_clock(gate: TrustGate, state: FakeState, clock: FakeClock) -> None:
    assert not await gate.distrusted()
    clock.step_to(0)
    assert not await gate.distrusted()
    assert state.queries == 1


@pytest.fixture
async def remote(clock: FakeClock) -> FakeState:
    return FakeState(clock, awaited=True)


async def test_reads_share_a_query_that_takes_a_round_trip(remote: FakeState, clock: FakeClock) -> None:
    gate = TrustGate(remote, clock, remote.on_owed)
    await gate.distrusted()
    clock.advance(51)
    remote.answer.clear()
    checks = [gate.check() for _ in range(5)]
    clock.advance(51)
    late = gate.check()
    remote.answer.set()
    assert not any([isinstance(check, frozenset) or await check() for check in checks])
    assert not isinstance(late, frozenset)
    assert not await late()
    assert remote.queries == 3, "one before, one that five reads share, and one that began after the sixth"


@pytest.mark.parametrize("change", [{"generation": 2}, {"server": "b"}, {"database_id": "promoted"}])
async def test_values_are_not_served_when_their_keys_were_replaced_meanwhile(
    remote: FakeState, clock: FakeClock, change: dict[str, object]
) -> None:
    gate = TrustGate(remote, clock, remote.on_owed)
    await gate.distrusted()
    clock.advance(51)
    check = gate.check()  # the keys are built by the old state
    remote.current = CLEAR._replace(**change)  # type: ignore[arg-type]
    assert not isinstance(check, frozenset)
    assert await check() == {EVERY_SLOT}
    assert gate.check() == frozenset(), "the next read builds its keys by the new state"
    assert not await gate.allows_unproven()


async def test_gate_distrusts_only_the_owed_slots(gate: TrustGate, state: FakeState, clock: FakeClock) -> None:
    state.owe()
    clock.advance(51)
    assert await gate.distrusted()
    assert gate.check() == frozenset({7})
    state.failing = True
    clock.advance(51)
    assert await gate.distrusted()
    assert gate.check() == frozenset({EVERY_SLOT})
