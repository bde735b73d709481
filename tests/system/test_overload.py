"""Far more than one process can take: it says so to some, answers the others in time, and stays as large as it was."""

from __future__ import annotations

import asyncio
from collections import Counter

import psutil  # type: ignore[import-untyped]  # publishes no types
import pytest

from tests.support.events import payload, served
from tests.support.fleet import Fleet, counted
from tests.support.http import Connection
from tests.support.traffic import now_ms

CLIENTS = 300
USERS = 128
GROWTH = 250 * 1024 * 1024


@pytest.mark.slow
async def test_service_sheds_and_stays_up_under_overload(fleet: Fleet) -> None:
    (api,) = await fleet.apis(1, cache_timeout_ms=20_000)  # the cache must not look away because the machine is busy
    side = Connection(api.port)
    assert (await side.post("/events", payload(served("ann", now_ms())))).status == 202
    for _ in range(4):
        assert (await side.get("/profiles/ann")).status == 200
    process = psutil.Process(api.program.pid)
    before = process.memory_info().rss
    statuses: Counter[int] = Counter()
    over = False

    async def ask(client: int) -> None:
        connection = Connection(api.port)
        for round_number in range(2):
            users = [f"cold-{client}-{round_number}-{number}" for number in range(USERS)]
            answer = await connection.post("/profiles/batch", {"user_ids": users})
            statuses[answer.status] += 1
        await connection.close()

    async def look() -> int:
        looks = 0
        while not over:
            hit, alive = await side.get("/profiles/ann"), await side.get("/healthz")
            assert (hit.status, alive.status) == (200, 200), "hits and probes wait for nothing"
            assert hit.json["features"]["tip_volume_30d"] == 1
            looks += 1
        return looks

    looking = asyncio.create_task(look())
    await asyncio.gather(*(ask(client) for client in range(CLIENTS)))
    over = True
    assert await looking > 2

    assert statuses.keys() == {200, 503}, statuses
    assert await counted(api.port, "requests_shed_total", kind="reads") == statuses[503]
    assert process.memory_info().rss - before < GROWTH
    assert (await side.get("/profiles/cold")).status == 200
    await side.close()
    assert await asyncio.to_thread(api.program.stop) == 0
