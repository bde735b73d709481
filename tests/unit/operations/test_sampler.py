"""The sampler continues after every error, counts nothing twice and loses nothing that it can store."""

import asyncio

import pytest

from app.concurrency.tasks import repeat
from app.errors import StoreUnavailable
from app.operations.component_states import ReadinessCheck
from app.operations.samples import ASK_AGAIN_S, EVERY_S, Gauges, Record, Sample, Sampler
from app.telemetry import Metrics
from tests.support.clock import NOW_MS, FakeClock
from tests.support.waiting import PATIENCE_S, eventually


class Store:
    """Keeps samples in memory. It raises `fault`, and waits for `gate` after keeping. `cancelled` counts the calls that
    were cancelled while they waited."""

    def __init__(self) -> None:
        self.kept: list[Sample] = []
        self.cancelled = 0
        self.fault: Exception | None = None
        self.gate: asyncio.Event | None = None

    async def keep(self, sample: Sample) -> None:
        if self.fault is not None:
            raise self.fault
        self.kept.append(sample)
        if self.gate is not None:
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise

    async def since(self, at_ms: int) -> Record:
        raise AssertionError("the sampler reads no samples")

    async def summaries(self, since_ms: int) -> list[Sample]:
        raise AssertionError("the sampler reads no summaries")


class Watched:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.metrics = Metrics()
        self.store = Store()
        self.readiness: Exception | None = None
        self.cache: list[bool] = []
        self.asked = 0
        self.pauses: list[float] = []
        self.rounds = 0
        self.done = asyncio.Event()
        self.sampler = Sampler(
            role="api",
            process="one",
            registry="abc",
            metrics=self.metrics,
            store=self.store,
            ask_gauges=self._gauges,
            ask_readiness=self._readiness,
            clock=self.clock,
            pause=self._pause,
        )

    async def _gauges(self) -> Gauges:
        return Gauges(queue_depth=3)

    async def _readiness(self) -> dict[str, ReadinessCheck]:
        if self.readiness is not None:
            raise self.readiness
        self.asked += 1
        ok = self.cache.pop(0) if self.cache else True
        return {"database": ReadinessCheck(True, "", vital=True), "cache": ReadinessCheck(ok, "away")}

    async def _pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.clock.advance(round(seconds * 1000))
        if len(self.pauses) > self.rounds:
            self.done.set()
            await asyncio.Event().wait()

    async def run(self, rounds: int) -> None:
        """Let the loop take some samples, then cancel it."""
        self.rounds = rounds
        task = asyncio.create_task(repeat("sample", self.sampler.sample, EVERY_S, self._pause))
        await self.done.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_sample_has_the_counts_since_the_last_one() -> None:
    watched = Watched()
    watched.metrics.cache_hits.inc(2)
    watched.clock.advance(4_000)
    await watched.sampler.sample()
    watched.metrics.cache_hits.inc(5)
    watched.clock.advance(10_000)
    await watched.sampler.sample()
    first, second = watched.store.kept
    assert (first.counts, first.seconds, first.at_ms) == ({"hits": 2}, 4.0, NOW_MS + 4_000)
    assert (second.counts, second.seconds, second.at_ms) == ({"hits": 5}, 10.0, NOW_MS + 14_000)
    assert (second.role, second.process, second.gauges.queue_depth) == ("api", "one", 3)
    assert second.components["database"].state == "ok"


async def test_samples_are_ten_seconds_apart() -> None:
    watched = Watched()
    await watched.run(3)
    assert set(watched.pauses) == {EVERY_S}
    assert [sample.seconds for sample in watched.store.kept] == [0.0, 10.0, 10.0, 10.0]


@pytest.mark.parametrize("fault", [StoreUnavailable("locked"), ValueError("a defect")])
async def test_counts_are_kept_when_a_sample_is_not_stored(fault: Exception) -> None:
    watched = Watched()
    watched.metrics.cache_hits.inc(2)
    watched.store.fault = fault
    await watched.run(2)
    assert watched.store.kept == []
    watched.store.fault = None
    watched.metrics.cache_hits.inc()
    await watched.sampler.sample()
    (kept,) = watched.store.kept
    assert kept.counts == {"hits": 3}
    assert kept.seconds == 30.0


async def test_state_is_down_after_two_failures_in_a_row() -> None:
    watched = Watched()
    watched.rounds = 9
    watched.cache = [True, False, True, False, False, False, True]
    states = []
    for _ in range(5):
        await watched.sampler.sample()
        states.append(watched.store.kept[-1].components["cache"].state)
    # Asked again before it was down, and not again while it stayed so.
    assert states == ["ok", "ok", "down", "down", "ok"]
    assert watched.asked == 7
    assert watched.pauses == [ASK_AGAIN_S, ASK_AGAIN_S]


async def test_sampling_continues_when_readiness_fails() -> None:
    watched = Watched()
    watched.readiness = RuntimeError("a defect")
    await watched.run(2)
    assert len(watched.pauses) == 3


async def test_counts_are_stored_once_when_a_sample_is_cancelled() -> None:
    watched = Watched()
    watched.store.gate = asyncio.Event()
    watched.metrics.cache_hits.inc(2)
    task = asyncio.create_task(watched.sampler.sample())
    await eventually(lambda: watched.store.kept)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    watched.store.gate = None
    watched.metrics.cache_hits.inc(4)
    await watched.sampler.close()
    assert [sample.counts for sample in watched.store.kept] == [{"hits": 2}, {"hits": 4}]


async def test_last_sample_is_stored_without_asking_readiness() -> None:
    watched = Watched()
    watched.readiness = RuntimeError("must not be asked")
    watched.metrics.cache_hits.inc()
    await watched.sampler.close()
    (kept,) = watched.store.kept
    assert kept.stopped
    assert kept.components == {}
    assert kept.counts == {"hits": 1}


@pytest.mark.slow
async def test_close_abandons_the_last_sample_when_the_database_is_locked() -> None:
    watched = Watched()
    watched.store.gate = asyncio.Event()
    async with asyncio.timeout(PATIENCE_S):
        await watched.sampler.close()
    assert watched.store.cancelled == 1
    watched.store.fault = StoreUnavailable("gone")
    await watched.sampler.close()
