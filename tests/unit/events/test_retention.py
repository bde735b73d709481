"""Old events go for good, night by night; a clock that is wrong for a night takes three days' worth at most."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import StoreUnavailable
from app.events.retention import LARGEST_MOVE_MS, STEP, Retention, next_cutoff
from app.features.clock import DAY_MS
from app.stores.sql.database import Database
from app.stores.sql.retention import SqlCutoffs
from tests.support.clock import NOW_MS, no_pause
from tests.support.consumption import ConsumerFixture
from tests.support.database import column
from tests.support.events import feedback, served
from tests.support.retention import night

pytestmark = pytest.mark.both_engines

DAYS = 180
OLDEST = NOW_MS - DAYS * DAY_MS


@pytest.fixture
def consumption(database: Database) -> ConsumerFixture:
    return ConsumerFixture(database)


@pytest.fixture
def retention(consumption: ConsumerFixture) -> Retention:
    return Retention({"events": (consumption.log, DAYS)}, SqlCutoffs(consumption.database), consumption.clock)


async def ages(consumption: ConsumerFixture) -> list[object]:
    """How many days ago the stored events were, by the clock that is right."""
    return await column(
        consumption.database, f"SELECT ({NOW_MS} - occurred_at_ms) / {DAY_MS} FROM event_log ORDER BY 1"
    )


async def test_old_events_go_for_good(consumption: ConsumerFixture, retention: Retention) -> None:
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    kept = served("ann", OLDEST, event_id="kept")
    await consumption.store(
        kept, *(served("ann", OLDEST - 1 - number) for number in range(STEP + 5)), feedback("ann", OLDEST - 1)
    )
    await retention.move_cutoffs()
    assert await retention.prune(pause) == {"events": STEP + 6}
    assert await column(consumption.database, "SELECT event_id FROM event_log") == ["kept"]
    assert await column(consumption.database, "SELECT seq FROM tip_views") == [1]
    assert await column(consumption.database, "SELECT seq FROM tip_feedback") == []
    assert len(pauses) == 2
    (seq,) = await consumption.store(served("ann", event_id="next"))
    assert seq == STEP + 8, "a sequence number came again"


async def test_interrupted_pruning_is_continued(consumption: ConsumerFixture, retention: Retention) -> None:
    async def interrupt(_: float) -> None:
        raise StoreUnavailable("locked")

    await night(retention)
    await consumption.store(
        *(served("ann", OLDEST + DAY_MS) for _ in range(STEP + 1)), served("ann", OLDEST + 5 * DAY_MS)
    )
    assert await retention.prune(no_pause, thorough=False) == {"events": 0}
    consumption.clock.advance(40 * DAY_MS)
    assert await retention.prune(no_pause, thorough=False) == {"events": 0}, "the cutoff has not moved"
    assert await retention.move_cutoffs(1)
    with pytest.raises(StoreUnavailable):
        await retention.prune(interrupt)
    assert await retention.prune(no_pause, thorough=False) == {"events": 1}
    assert await retention.prune(no_pause, thorough=False) == {"events": 0}
    assert await column(consumption.database, "SELECT COUNT(*) FROM event_log") == [1]


async def test_cutoff_moves_once_a_night(consumption: ConsumerFixture, retention: Retention) -> None:
    cutoffs = SqlCutoffs(consumption.database)
    assert await retention.move_cutoffs(1)
    consumption.clock.advance(DAY_MS)
    assert not await retention.move_cutoffs(1)
    assert await cutoffs.cutoff("events") == OLDEST
    assert await retention.move_cutoffs(2)
    assert await cutoffs.cutoff("events") == OLDEST + DAY_MS


async def test_wrong_clock_deletes_three_days_at_most(consumption: ConsumerFixture, retention: Retention) -> None:
    await consumption.store(*(served("ann", NOW_MS - days * DAY_MS) for days in (0, 90, 176, 178, 180)))
    await night(retention)
    for wrong_days in (400, 40, 4_000, -10_000):
        consumption.clock.step_to(NOW_MS + wrong_days * DAY_MS)
        await night(retention)
        consumption.clock.step_to(NOW_MS)
        await night(retention)
    assert await ages(consumption) == [0, 90, 176]
    consumption.clock.advance(3 * DAY_MS)
    assert await night(retention) == {"events": 0}
    consumption.clock.advance(2 * DAY_MS)
    assert await night(retention) == {"events": 1}, "it does not go on after a clock that was behind"


async def test_longer_retention_keeps_later_events(consumption: ConsumerFixture, retention: Retention) -> None:
    await night(retention)
    await consumption.store(served("ann", OLDEST - 90 * DAY_MS))
    longer = Retention({"events": (consumption.log, 2 * DAYS)}, SqlCutoffs(consumption.database), consumption.clock)
    for _ in range(3):
        assert await night(longer) == {"events": 0}


async def test_cutoff_of_an_earlier_release_counts_as_deleted(
    consumption: ConsumerFixture, retention: Retention
) -> None:
    """It did not store what it had deleted, and its cutoff moves back at the next run."""
    cutoffs, ahead_ms = SqlCutoffs(consumption.database), OLDEST + 2 * DAY_MS
    assert await cutoffs.deleted_before("events") == 0
    await consumption.database.execute(
        "INSERT INTO service (name, value) VALUES ('pruned events', ?)", (str(ahead_ms),)
    )
    for _ in range(2):
        assert await cutoffs.deleted_before("events") == ahead_ms
        await night(retention)
    assert await cutoffs.cutoff("events") == OLDEST
    consumption.clock.advance(3 * DAY_MS)
    await consumption.store(served("ann", OLDEST + 3 * DAY_MS - 1))
    await night(retention)
    assert await cutoffs.deleted_before("events") == OLDEST + 3 * DAY_MS


async def test_late_events_are_deleted_by_the_next_run(consumption: ConsumerFixture, retention: Retention) -> None:
    await night(retention)
    await consumption.store(served("ann", OLDEST - 90 * DAY_MS))
    assert await night(retention) == {"events": 1}


async def test_large_first_run_waits_for_confirmation(consumption: ConsumerFixture, retention: Retention) -> None:
    await consumption.store(*(served("ann", NOW_MS - days * DAY_MS) for days in (100, 181, 184)))
    for _ in range(3):
        assert await retention.waiting() == ["events"]
        assert await night(retention) == {}
    assert await ages(consumption) == [100, 181, 184]
    assert await night(retention, confirmed=True) == {"events": 2}
    assert (await ages(consumption), await retention.waiting()) == ([100], [])
    assert await night(retention) == {"events": 0}


async def test_pruning_catches_up_night_by_night(consumption: ConsumerFixture, retention: Retention) -> None:
    await consumption.store(*(served("ann", NOW_MS - days * DAY_MS) for days in range(170, 181)))
    await night(retention)
    consumption.clock.advance(10 * DAY_MS)
    left = []
    for _ in range(4):
        await night(retention)
        left.append(len(await ages(consumption)))
    assert left == [8, 5, 2, 1]


moments = st.integers(min_value=0, max_value=4_000 * DAY_MS)


@given(done_ms=moments, clocks=st.lists(moments, min_size=1, max_size=20), oldest_ms=st.none() | moments)
def test_no_run_moves_further_than_three_days(done_ms: int, clocks: list[int], oldest_ms: int | None) -> None:
    for wanted_ms in clocks:
        moved_ms = next_cutoff(wanted_ms, done_ms, oldest_ms)
        assert moved_ms is not None
        assert abs(moved_ms - done_ms) <= LARGEST_MOVE_MS
        done_ms = moved_ms
    wanted_ms = clocks[-1]
    for _ in range(4_000 // 3 + 1):
        done_ms = next_cutoff(wanted_ms, done_ms, oldest_ms) or 0  # never None after the first run
    assert done_ms == wanted_ms, "it never catches up"
