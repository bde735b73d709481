"""The promises, under load: several API processes, one worker, eight clients, thousands of event-then-read pairs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random

import pytest

from tests.support.events import payload, served
from tests.support.fleet import Fleet, counted
from tests.support.http import Connection
from tests.support.traffic import Client, TrafficRecord, now_ms
from tests.support.waiting import eventually

CLIENTS = 8
EVENTS = 500
PAIRS, PAIRS_ON_POSTGRES = 6_000, 2_400
pytestmark = [pytest.mark.both_engines, pytest.mark.slow]
SHARED_USERS = [f"shared-{number}" for number in range(40)]


async def test_no_read_is_stale_when_clients_interleave(fleet: Fleet) -> None:
    worker = fleet.worker()
    apis = await fleet.apis(2)
    books = TrafficRecord()
    pairs = PAIRS if isinstance(fleet.store, Path) else PAIRS_ON_POSTGRES
    clients = [Client(f"client-{number}", [api.port for api in apis], books, SHARED_USERS) for number in range(CLIENTS)]

    async def run(client: Client) -> None:
        for _ in range(pairs // CLIENTS):
            await client.pair()
        for user in SHARED_USERS:
            await client.look_at(user)
        await client.close()

    await asyncio.gather(*(run(client) for client in clients))

    assert books.pairs == pairs
    assert books.stale == []
    assert books.wrong == []
    assert fleet.stored() == dict.fromkeys(books.event_ids, 1)
    assert sum(books.acknowledged.values()) == fleet.rows("SELECT COUNT(*) FROM tip_views")[0][0]
    for api in apis:
        assert await counted(api.port, "cache_hits_total") > pairs / 10, "the cache took no part"
        assert await counted(api.port, "degraded_reads_total") == 0
    await eventually(lambda: fleet.unconsumed() == 0)
    assert await counted(worker.port, "stale_values_dropped_total") == 0, "a worker found what a DEL had missed"


async def test_each_event_is_counted_once_when_eight_clients_send_it(fleet: Fleet) -> None:
    apis = await fleet.apis(3)
    events = [served(f"user-{number % 50}", now_ms() - number) for number in range(EVENTS)]
    receipts: list[dict[str, int]] = []

    async def send(sender: int) -> None:
        random = Random(sender)
        own = random.sample(events, len(events))
        connection = Connection(apis[sender % len(apis)].port)
        while own:
            size = random.randint(1, 40)
            answer = await connection.post("/events", [payload(event) for event in own[:size]])
            assert answer.status == 202, answer
            receipts.append(answer.json)
            del own[:size]
        await connection.close()

    await asyncio.gather(*(send(sender) for sender in range(CLIENTS)))
    assert fleet.stored() == {event.event_id: 1 for event in events}
    assert sum(receipt["accepted"] for receipt in receipts) == EVENTS
    assert sum(receipt["duplicates"] for receipt in receipts) == EVENTS * (CLIENTS - 1)
    connection = Connection(apis[0].port)
    volumes = [
        (await connection.get(f"/profiles/user-{number}")).json["features"]["tip_volume_30d"] for number in range(50)
    ]
    await connection.close()
    assert volumes == [EVENTS // 50] * 50
