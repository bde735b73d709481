"""The hand-over: many jobs' events share a consumption, and what is not consumed is left to the sweep."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from app.concurrency.batcher import Bounds, Handover
from app.errors import CacheUnavailable
from app.events.consume import BOUNDS, SWEEP_AGE_MS
from app.features.events import LoggedEvent
from app.stores.sql.registries import announce
from app.stores.sqlite.database import SqliteDatabase
from tests.support.clock import NOW_MS
from tests.support.consumption import ConsumerFixture
from tests.support.events import served
from tests.support.registry import REGISTRY
from tests.support.waiting import PATIENCE_S, eventually, eventually_async

GRACE_S = PATIENCE_S


class Pause:
    """A pause between groups that lasts until a test ends it."""

    def __init__(self) -> None:
        self.begun = 0
        self.over = asyncio.Event()

    async def __call__(self, seconds: float) -> None:
        assert 0 < seconds <= BOUNDS.apart_s
        self.begun += 1
        await self.over.wait()


@pytest.fixture
async def consumption(database: SqliteDatabase) -> ConsumerFixture:
    await announce(database, REGISTRY, NOW_MS)
    return ConsumerFixture(database)


@pytest.fixture
def pause() -> Pause:
    return Pause()


def handing_over(
    consumption: ConsumerFixture, pause: Pause, bounds: Bounds = BOUNDS, limit_s: float = GRACE_S
) -> Handover[int]:
    return Handover(partial(consumption.consumer.consume_within, limit_s), bounds, pause)


@pytest.fixture
async def handover(consumption: ConsumerFixture, pause: Pause) -> Handover[int]:
    return handing_over(consumption, pause)


async def test_events_of_many_jobs_share_a_consumption(
    consumption: ConsumerFixture, handover: Handover[int], pause: Pause
) -> None:
    handover.add(await consumption.store(served(event_id="first")))
    await eventually(lambda: consumption.learner.learned == ["first"])
    for number in range(20):
        handover.add(await consumption.store(served(f"user-{number}", event_id=f"e{number}")))
    await eventually(lambda: pause.begun)
    assert len(await consumption.unconsumed()) == 20
    pause.over.set()
    await eventually(lambda: len(consumption.learner.learned) == 21)
    await handover.close(GRACE_S)
    assert len(consumption.invalidator.older) == 2
    assert consumption.invalidator.all == []
    assert await consumption.unconsumed() == []


async def test_consumption_does_not_wait_when_there_are_enough_events(
    consumption: ConsumerFixture, pause: Pause
) -> None:
    handover = handing_over(consumption, pause, BOUNDS._replace(at_once=2))
    handover.add(await consumption.store(*(served(event_id=name) for name in "abcd")))
    await handover.close(GRACE_S)
    assert (consumption.learner.learned, len(consumption.invalidator.older), pause.begun) == (list("abcd"), 2, 0)


async def test_nothing_starts_when_no_event_is_new(consumption: ConsumerFixture, handover: Handover[int]) -> None:
    handover.add([])
    await handover.close(GRACE_S)
    assert consumption.invalidator.older == []


@pytest.mark.parametrize("error", [CacheUnavailable("away"), RuntimeError("a defect")])
async def test_failed_events_are_left_to_the_sweep(
    consumption: ConsumerFixture, handover: Handover[int], pause: Pause, error: Exception
) -> None:
    pause.over.set()
    consumption.invalidator.failure = error
    handover.add(await consumption.store(served(event_id="a")))
    await handover.close(GRACE_S)
    assert await consumption.unconsumed() == ["a"]
    consumption.invalidator.failure = None
    handover.add(await consumption.store(served(event_id="b")))
    await handover.close(GRACE_S)
    assert await consumption.unconsumed() == ["a"]
    consumption.clock.advance(SWEEP_AGE_MS + 1)
    assert await consumption.consumer.sweep() == 1


async def test_next_events_are_consumed_after_a_timeout(
    consumption: ConsumerFixture, pause: Pause, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause.over.set()
    never = asyncio.Event()

    async def hang(_: LoggedEvent) -> None:
        await never.wait()

    handover = handing_over(consumption, pause, limit_s=0.02)
    with monkeypatch.context() as patch:
        patch.setattr(consumption.consumer, "learners", [hang])
        handover.add(await consumption.store(served(event_id="a")))
        await handover.close(GRACE_S)
    await _consumed(consumption, handing_over(consumption, pause), "b")
    assert await consumption.unconsumed() == ["a"]


async def _consumed(consumption: ConsumerFixture, handover: Handover[int], event_id: str) -> None:
    handover.add(await consumption.store(served(event_id=event_id)))
    await eventually_async(lambda: _is_learned(consumption, event_id))
    await handover.close(GRACE_S)


async def _is_learned(consumption: ConsumerFixture, event_id: str) -> bool:
    return event_id in consumption.learner.learned


async def test_events_beyond_the_cap_are_left_to_the_sweep(consumption: ConsumerFixture, pause: Pause) -> None:
    handover = handing_over(consumption, pause, BOUNDS._replace(most=2))
    for seqs in [await consumption.store(served(event_id=name)) for name in "abc"]:
        handover.add(seqs)
    await handover.close(GRACE_S)
    assert await consumption.unconsumed() == ["c"]


async def test_pending_events_are_left_to_the_sweep_at_shutdown(
    consumption: ConsumerFixture, handover: Handover[int], pause: Pause
) -> None:
    handover.add(await consumption.store(served(event_id="a")))
    await eventually(lambda: consumption.learner.learned == ["a"])
    handover.add(await consumption.store(served(event_id="b")))
    await eventually(lambda: pause.begun)
    await handover.close(0.01)
    assert (consumption.learner.learned, await consumption.unconsumed()) == (["a"], ["b"])
