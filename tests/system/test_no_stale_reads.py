"""The promise, under load: two API processes, one worker, eight clients, ten thousand event-then-read pairs."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.fleet import Fleet, counted
from tests.support.traffic import Client, TrafficRecord
from tests.support.waiting import eventually

CLIENTS = 8
PAIRS = 10_000
SHARED_USERS = [f"shared-{number}" for number in range(40)]


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_no_read_is_stale_when_clients_interleave(fleet: Fleet) -> None:
    worker = fleet.worker()
    apis = await fleet.apis(2, cache_timeout_ms=5_000)  # a busy machine is no outage
    books = TrafficRecord()
    clients = [Client(f"client-{number}", [api.port for api in apis], books, SHARED_USERS) for number in range(CLIENTS)]

    async def run(client: Client) -> None:
        for _ in range(PAIRS // CLIENTS):
            await client.pair()
        for user in SHARED_USERS:
            await client.look_at(user)
        await client.close()

    await asyncio.gather(*(run(client) for client in clients))

    assert books.pairs == PAIRS
    assert books.stale == []
    assert books.wrong == []
    assert fleet.stored() == dict.fromkeys(books.event_ids, 1)
    assert sum(books.acknowledged.values()) == fleet.rows("SELECT COUNT(*) FROM tip_views")[0][0]
    for api in apis:
        assert await counted(api.port, "cache_hits_total") > PAIRS / 10, "the cache took no part"
        assert await counted(api.port, "degraded_reads_total") == 0
    await eventually(lambda: fleet.unconsumed() == 0, 20)
    assert await counted(worker.port, "stale_values_dropped_total") == 0, "a worker found what a DEL had missed"
