"""A job of very many events: it ends, whatever the job timeout, in bounded memory, and goes on after a kill -9."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import psutil  # type: ignore[import-untyped]  # publishes no types
import pytest
from arq.connections import ArqRedis

from app.stores.queue.client import QUEUE
from app.stores.queue.jobs import PIECE_EVENTS, TIP_EVENTS
from app.stores.queue.worker import MAX_JOBS
from tests.support.fleet import Fleet
from tests.support.waiting import eventually_async

MIB = 1024 * 1024
# 300,000 events took 290 MiB more than an idle worker before; now some 30.
GROWTH_MIB = 100


def events(count: int) -> Iterator[dict[str, str]]:
    """One in a thousand is none."""
    now = datetime.now(UTC).isoformat()
    for number in range(count):
        event = {"subject": "signals.tip.served", "event_id": f"event-{number}", "user_id": f"user-{number % 5_000}"}
        yield event if number % 1_000 == 999 else {**event, "tip_id": "tip", "occurred_at": now}


@pytest.mark.parametrize("count", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
async def test_large_job_ends_when_a_worker_is_killed(fleet: Fleet, queue: ArqRedis, count: int) -> None:
    job = await queue.enqueue_job(TIP_EVENTS, list(events(count)))
    assert job is not None
    worker = fleet.worker()
    process = psutil.Process(worker.program.pid)
    idle = highest = process.memory_info().rss

    async def stored(least: int) -> bool:
        nonlocal highest
        highest = max(highest, process.memory_info().rss)
        return bool(fleet.rows("SELECT COUNT(*) FROM event_log")[0][0] >= least)

    await eventually_async(lambda: stored(count // 3), 60 + count / 2_000)
    assert await queue.zcard(QUEUE) > 0
    worker.program.kill()
    await queue.delete(*await queue.keys("arq:in-progress:*"))  # else they come back after the job timeout and 10 s
    worker = fleet.worker()
    process = psutil.Process(worker.program.pid)

    async def done() -> bool:
        await stored(0)
        return bool(await queue.zcard(QUEUE) == 0)

    await eventually_async(done, 60 + count / 1_000)
    assert set(fleet.stored().values()) == {1}
    assert len(fleet.stored()) == count - count // 1_000
    letters = fleet.rows("SELECT COUNT(*), MIN(error) FROM dead_letters")
    assert 0 <= letters[0][0] - count // 1_000 <= MAX_JOBS, "a running job may be taken in again after the kill"
    assert "tip_id" in letters[0][1]
    assert highest - idle < GROWTH_MIB * MIB
    assert await queue.keys("arq:job:*") == []
    assert worker.program.stop() == 0
    # As the second worker recorded when it stopped: it took in again only the jobs that were running at the kill.
    known = fleet.rows("SELECT COALESCE(SUM(body ->> '$.counts.events_duplicate'), 0) FROM samples")
    assert known[0][0] <= MAX_JOBS * PIECE_EVENTS
