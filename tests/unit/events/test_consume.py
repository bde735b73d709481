"""Consumption and retention on a real log: once each, in order, and a poison event does not block others."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from app.errors import CacheUnavailable, StoreUnavailable
from app.events.consume import ATTEMPTS, SWEEP_AGE_MS
from app.features.clock import DAY_MS
from app.features.events import FEEDBACK, SERVED, LoggedEvent
from app.stores.sql.database import Database
from app.stores.sql.registries import announce
from tests.support.clock import NOW_MS
from tests.support.consumption import ConsumerFixture, RecordingInvalidator, RecordingLearner
from tests.support.database import column
from tests.support.events import feedback, served
from tests.support.registry import REGISTRY
from tests.support.waiting import eventually

pytestmark = pytest.mark.both_engines


@pytest.fixture
async def consumption(database: Database) -> ConsumerFixture:
    await announce(database, REGISTRY, NOW_MS)
    return ConsumerFixture(database)


async def test_consumed_events_are_learned_and_marked(consumption: ConsumerFixture) -> None:
    seqs = await consumption.store(
        served("ann", event_id="a"), feedback("ann", event_id="b"), served("bob", event_id="c")
    )
    assert await consumption.consumer.consume(seqs) == 3
    assert consumption.learner.learned == ["a", "b", "c"]
    assert consumption.learner.lessons == [3], "they were not learned from together"
    assert await consumption.unconsumed() == []
    served_cells, feedback_cells = REGISTRY.invalidated_by(SERVED), REGISTRY.invalidated_by(FEEDBACK)
    assert consumption.invalidator.older == [
        {
            "ann": {**dict.fromkeys(served_cells, 1), **dict.fromkeys(feedback_cells, 2)},
            "bob": dict.fromkeys(served_cells, 3),
        }
    ]
    assert consumption.invalidator.all == []
    assert consumption.metrics.collectors.get_sample_value("profiles_consumption_lag_seconds_count") == 3


async def test_nothing_happens_twice_when_events_are_consumed_again(consumption: ConsumerFixture) -> None:
    seqs = await consumption.store(served(event_id="a"))
    assert await consumption.consumer.consume(seqs) == 1
    assert await consumption.consumer.consume([*seqs, 999]) == 0
    assert consumption.learner.learned == ["a"]
    assert len(consumption.invalidator.older) == 1


async def test_poison_event_is_buried_after_its_attempts(consumption: ConsumerFixture) -> None:
    seqs = await consumption.store(
        served(event_id="a"), served(event_id="bad", tip_id="poison"), served(event_id="c"), served(event_id="d")
    )
    assert await consumption.consumer.consume(seqs) == 3
    assert consumption.learner.lessons == [4, 1, 1, 1, 1], "the one that fails is not found one by one"
    assert await consumption.unconsumed() == ["bad"]
    for attempt in range(2, ATTEMPTS + 1):
        assert await consumption.letters.list(0, 10) == []
        consumption.clock.advance(SWEEP_AGE_MS + 1)
        assert await consumption.consumer.sweep() == 0, attempt
    assert await consumption.unconsumed() == []
    (letter,) = await consumption.letters.list(0, 10)
    assert (letter.seq, letter.attempts, letter.source) == (seqs[1], ATTEMPTS, "consumption")
    assert letter.error == "ValueError: cannot learn from this"
    assert 'raise ValueError("cannot learn from this")' in letter.traceback
    assert '"event_id":"bad"' in letter.payload
    assert consumption.learner.learned == ["a", "c", "d"]


async def test_event_is_consumed_when_it_is_replayed_after_its_cure(consumption: ConsumerFixture) -> None:
    seqs = await consumption.store(served(event_id="bad", tip_id="poison"))
    for _ in range(ATTEMPTS):
        await consumption.consumer.consume(seqs)
    (letter,) = await consumption.letters.list(0, 10)
    consumption.learner.cured = True
    await consumption.letters.revive(letter.id)
    consumption.clock.advance(SWEEP_AGE_MS + 1)
    assert await consumption.consumer.sweep() == 1
    assert consumption.learner.learned == ["bad"]
    assert await consumption.letters.list(0, 10) == []


@pytest.mark.parametrize("error", [CacheUnavailable("away"), StoreUnavailable("locked")])
@pytest.mark.parametrize("part", ["drops", "learner"])
async def test_no_attempt_is_counted_when_a_dependency_fails(
    consumption: ConsumerFixture, part: str, error: Exception
) -> None:
    seqs = await consumption.store(served(event_id="a"))
    troubled: RecordingInvalidator | RecordingLearner = (
        consumption.invalidator if part == "drops" else consumption.learner
    )
    troubled.failure = error
    consumption.clock.advance(SWEEP_AGE_MS + 1)
    for _ in range(2 * ATTEMPTS):
        with pytest.raises(type(error)):
            await consumption.consumer.consume(seqs)
        with pytest.raises(type(error)):
            await consumption.consumer.sweep()
    assert await column(consumption.database, "SELECT attempts FROM outbox") == [0]
    assert await consumption.letters.list(0, 10) == []
    troubled.failure = None
    assert await consumption.consumer.consume(seqs) == 1


async def test_sweep_drops_every_key_of_left_events(consumption: ConsumerFixture) -> None:
    """The process may have died before its DEL."""
    await consumption.store(served("ann", event_id="a"), feedback("bob", event_id="b"))
    assert await consumption.consumer.sweep() == 0, "they may be in good hands"
    consumption.clock.advance(SWEEP_AGE_MS + 1)
    await consumption.store(served("cyd", event_id="c"))
    assert await consumption.consumer.sweep() == 2
    assert consumption.invalidator.all == [
        {"ann": set(REGISTRY.invalidated_by(SERVED)), "bob": set(REGISTRY.invalidated_by(FEEDBACK))}
    ]
    assert await consumption.unconsumed() == ["c"]


class Gated:
    """A learner that waits until it may go on."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.open = asyncio.Event()

    async def learn(self, events: Sequence[LoggedEvent]) -> None:
        self.begun += [item.event.event_id for item in events]
        await self.open.wait()


@pytest.mark.parametrize("sweep_first", [True, False])
async def test_event_is_learned_once_when_sweep_and_job_race(
    consumption: ConsumerFixture, monkeypatch: pytest.MonkeyPatch, sweep_first: bool
) -> None:
    gated = Gated()
    monkeypatch.setattr(consumption.consumer, "learners", [gated.learn])
    seqs = await consumption.store(served(event_id="a"))
    consumption.clock.advance(SWEEP_AGE_MS + 1)
    works = [consumption.consumer.sweep(), consumption.consumer.consume(seqs)]
    first, second = works if sweep_first else reversed(works)
    taking = asyncio.create_task(first)
    await eventually(lambda: gated.begun)
    assert await second == 0
    gated.open.set()
    assert (await taking, gated.begun) == (1, ["a"])
    assert await consumption.unconsumed() == []
    assert (len(consumption.invalidator.all), len(consumption.invalidator.older)) == ((1, 0) if sweep_first else (0, 1))


async def test_event_is_learned_once_when_marked_during_a_sweep(
    consumption: ConsumerFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seqs = await consumption.store(served(event_id="a"))
    consumption.clock.advance(SWEEP_AGE_MS + 1)
    look = consumption.log.unconsumed

    async def overtaken(before_ms: int, limit: int, *, or_after_ms: int | None = None) -> list[LoggedEvent]:
        seen = await look(before_ms, limit, or_after_ms=or_after_ms)
        await consumption.consumer.consume(seqs)
        return seen

    monkeypatch.setattr(consumption.log, "unconsumed", overtaken)
    assert await consumption.consumer.sweep() == 0
    assert (consumption.learner.learned, consumption.invalidator.all) == (["a"], [])


async def test_event_is_consumed_again_after_a_failure(consumption: ConsumerFixture) -> None:
    seqs = await consumption.store(served(event_id="a"))
    consumption.invalidator.failure = CacheUnavailable("away")
    with pytest.raises(CacheUnavailable):
        await consumption.consumer.consume(seqs)
    consumption.invalidator.failure = None
    consumption.clock.advance(SWEEP_AGE_MS + 1)
    assert await consumption.consumer.sweep() == 1


async def test_sweep_works_when_the_clock_was_set_back(consumption: ConsumerFixture) -> None:
    await consumption.store(served("ann", event_id="a"))
    consumption.clock.step_to(consumption.clock.now_ms() - DAY_MS)
    assert await consumption.consumer.sweep() == 1
    assert await consumption.unconsumed() == []


async def test_sweep_consumes_all_of_very_many_events(
    consumption: ConsumerFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.events.consume.SWEEP_CHUNK", 10)
    await consumption.store(*(served(event_id=f"e{number}") for number in range(35)))
    consumption.clock.advance(SWEEP_AGE_MS + 1)
    assert await consumption.consumer.sweep() == 35
    assert await consumption.unconsumed() == []
