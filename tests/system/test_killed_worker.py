"""kill -9 of the worker with jobs in flight: nothing is lost, and the next worker does them."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest
from arq.connections import ArqRedis

from app.stores.queue.jobs import TIP_EVENTS
from tests.support.events import payload, served
from tests.support.fleet import Fleet
from tests.support.http import Connection
from tests.support.traffic import now_ms
from tests.support.waiting import eventually, eventually_async


@pytest.mark.slow
async def test_http_events_are_consumed_when_a_killed_worker_returns(fleet: Fleet, queue: ArqRedis) -> None:
    worker = fleet.faulty_worker("stuck")
    (api,) = await fleet.apis(1)
    connection = Connection(api.port)
    events = [payload(served(f"user-{n}", now_ms(), tip_id="stuck"), event_id=f"stuck-{n}") for n in range(200)]
    assert (await connection.post("/events", events)).status == 202

    async def in_flight() -> bool:
        return bool(await queue.keys("arq:in-progress:*"))

    await eventually_async(in_flight)
    worker.program.kill()
    assert fleet.unconsumed() == 200

    fleet.faulty_worker()
    await eventually(lambda: fleet.unconsumed() == 0)
    assert (await connection.get("/profiles/user-7")).json["features"]["tip_volume_30d"] == 1
    await connection.close()


@pytest.mark.slow
async def test_queue_events_are_stored_when_a_killed_worker_returns(fleet: Fleet, queue: ArqRedis) -> None:
    worker = fleet.faulty_worker()
    (api,) = await fleet.apis(1)
    events = [payload(served("ann", now_ms()), event_id=f"queued-{n}") for n in range(50)]

    with closing(sqlite3.connect(fleet.database, isolation_level=None, timeout=10)) as other_writer:
        other_writer.execute("BEGIN IMMEDIATE")  # holds the job in flight
        job = await queue.enqueue_job(TIP_EVENTS, events)
        assert job is not None

        async def in_flight() -> bool:
            return bool(await queue.exists(f"arq:in-progress:{job.job_id}"))

        await eventually_async(in_flight)
        worker.program.kill()
        other_writer.execute("ROLLBACK")
    assert fleet.stored() == {}

    fleet.faulty_worker()
    await eventually(lambda: len(fleet.stored()) == len(events))
    assert set(fleet.stored().values()) == {1}
    connection = Connection(api.port)
    assert (await connection.get("/profiles/ann")).json["features"]["tip_volume_30d"] == len(events)
    await connection.close()
    await eventually(lambda: fleet.unconsumed() == 0)
