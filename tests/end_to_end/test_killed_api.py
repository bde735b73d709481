"""kill -9 of the API in the middle of ingest: what was acknowledged is there once, what was not can be sent again."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest

from tests.support.events import payload, served
from tests.support.fleet import Fleet, Member
from tests.support.http import Broken, Connection, serving
from tests.support.traffic import now_ms
from tests.support.waiting import eventually

KILLS = 20
CLIENTS = 6
ANSWERS_BETWEEN_KILLS = (8, 40)


class Ingest:
    """Clients that send until every kill has happened, to whichever process is alive; each event until a 202."""

    def __init__(self, fleet: Fleet, first: Member) -> None:
        self.fleet = fleet
        self.alive = first
        self.killed = 0
        self.answers = 0
        self.unanswered = 0
        self.known_before = 0
        self.acknowledged: Counter[str] = Counter()
        self.per_user: Counter[str] = Counter()
        self.stale: list[str] = []
        self._open = asyncio.Event()
        self._random = random.Random(20)

    async def kill_again_and_again(self) -> None:
        """The next process is up before its predecessor is killed; so there is always one to turn to."""
        for _ in range(KILLS):
            successor = self.fleet.api()
            await serving(successor.port)  # it starts while the clients pause: quicker on few cores
            self._open.set()
            await self._answered(self._random.randint(*ANSWERS_BETWEEN_KILLS))
            self.alive.program.kill()
            self._open.clear()
            self.killed += 1
            self.alive = successor
        self._open.set()

    async def _answered(self, count: int) -> None:
        enough = self.answers + count
        await eventually(lambda: self.answers >= enough, 30)

    async def send(self, client: int) -> None:
        """One client."""
        user = f"user-{client}"
        number = 0
        connection = Connection(self.alive.port)
        while self.killed < KILLS:
            await self._open.wait()
            events = []
            for _ in range(self._random.randint(1, 4)):
                number += 1
                events.append(payload(served(user, now_ms()), event_id=f"{client}-{number}"))
            connection = await self._until_acknowledged(connection, events)
            self.per_user[user] += len(events)
            try:
                shown = (await connection.get(f"/profiles/{user}")).json["features"]["tip_volume_30d"]
            except Broken:
                continue
            if shown != self.per_user[user]:
                self.stale.append(f"{user}: {shown} shown, {self.per_user[user]} acknowledged")
        await connection.close()

    async def _until_acknowledged(self, connection: Connection, events: list[dict[str, Any]]) -> Connection:
        while True:
            try:
                answer = await connection.post("/events", events)
            except Broken:
                self.unanswered += 1
                connection = await self._to_successor_of(connection.port)
                continue
            assert answer.status == 202, answer
            receipt = answer.json
            assert receipt["accepted"] + receipt["duplicates"] == len(events)
            self.known_before += receipt["duplicates"]
            self.answers += 1
            self.acknowledged.update(event["event_id"] for event in events)
            return connection

    async def _to_successor_of(self, port: int) -> Connection:
        await eventually(lambda: self.alive.port != port, 30)
        return Connection(self.alive.port)


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_every_acknowledged_event_is_there_once_when_the_api_is_killed_in_the_middle_of_ingest(
    fleet: Fleet,
) -> None:
    (first,) = await fleet.apis(1)
    ingest = Ingest(fleet, first)

    await asyncio.gather(ingest.kill_again_and_again(), *(ingest.send(client) for client in range(CLIENTS)))

    assert ingest.killed == KILLS
    assert ingest.unanswered >= KILLS, "the kills came between requests"
    assert ingest.stale == []
    assert set(ingest.acknowledged.values()) == {1}
    assert fleet.stored() == ingest.acknowledged
    assert fleet.rows("SELECT COUNT(*), COUNT(DISTINCT seq) FROM tip_views") == [(len(ingest.acknowledged),) * 2]
    connection = Connection(ingest.alive.port)
    for user, count in ingest.per_user.items():
        assert (await connection.get(f"/profiles/{user}")).json["features"]["tip_volume_30d"] == count
    await connection.close()
