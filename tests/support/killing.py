"""kill -9 of the API at random points of ingest, under concurrent clients, and what must hold of it.

Clients send small and large requests of both subjects to whichever process is alive, each request until it is
acknowledged. `Ingest.faults` then tells of every acknowledged event that is not there once, of every row without its
other half, of reads that were older than an acknowledgement, and of events that were not known when they were sent
again.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

from app.features.events import TipEvent
from tests.support.events import feedback, payload, served
from tests.support.fleet import Fleet, Member
from tests.support.http import Broken, Connection, serving
from tests.support.traffic import now_ms
from tests.support.waiting import eventually

ANSWERS_BETWEEN_KILLS = (2, 40)
POINT_S = 0.02  # a commit with its answer takes a few milliseconds
LARGE_SHARE, LARGE = 0.1, 200
AGAIN = 500
HALF_WRITTEN = """
SELECT seq FROM event_log WHERE subject = 'signals.tip.served' AND seq NOT IN (SELECT seq FROM tip_views)
UNION ALL
SELECT seq FROM event_log WHERE subject = 'signals.tip.feedback' AND seq NOT IN (SELECT seq FROM tip_feedback)
UNION ALL
SELECT seq FROM (SELECT seq FROM tip_views UNION ALL SELECT seq FROM tip_feedback)
WHERE seq NOT IN (SELECT seq FROM event_log)
"""


class Ingest:
    """Clients that send until every kill has happened. The same seed, the same sizes and pauses."""

    def __init__(self, fleet: Fleet, first: Member, *, kills: int, clients: int = 6, seed: int = 20) -> None:
        self.fleet = fleet
        self.alive = first
        self.kills = kills
        self.clients = clients
        self.killed = 0
        self.answers = 0
        self.unanswered = 0
        self.known_before = 0
        self.acknowledged: Counter[str] = Counter()
        self.views: Counter[str] = Counter()
        self.faults: list[str] = []
        self._sent: list[list[dict[str, Any]]] = []
        self._open = asyncio.Event()
        self._random = random.Random(seed)

    async def run(self) -> None:
        """Kill and send, then look at everything."""
        await asyncio.gather(self._kill_again_and_again(), *(self._send(client) for client in range(self.clients)))
        await self._check_the_end()

    async def _kill_again_and_again(self) -> None:
        """The next process is up before its predecessor is killed; so there is always one to turn to."""
        for _ in range(self.kills):
            successor = self.fleet.api()
            await serving(successor.port)  # it starts while the clients pause: quicker on few cores
            self._open.set()
            enough = self.answers + self._random.randint(*ANSWERS_BETWEEN_KILLS)
            await eventually(lambda enough=enough: self.answers >= enough, 30)  # type: ignore[misc]
            await asyncio.sleep(self._random.uniform(0, POINT_S))  # no wait for anything: the point is to be any point
            self.alive.program.kill()
            self._open.clear()
            self.killed += 1
            self.alive = successor
            self._check_halves()
        self._open.set()

    def _check_halves(self) -> None:
        self.faults += [f"half of event {seq} after kill {self.killed}" for (seq,) in self.fleet.rows(HALF_WRITTEN)]

    async def _send(self, client: int) -> None:
        user = f"user-{client}"
        number = 0
        connection = Connection(self.alive.port)
        while self.killed < self.kills:
            await self._open.wait()
            size = LARGE if self._random.random() < LARGE_SHARE else self._random.randint(1, 4)
            events = []
            for _ in range(size):
                number += 1
                made: TipEvent = (feedback if self._random.random() < 0.3 else served)(user, now_ms())
                events.append(payload(made, event_id=f"{client}-{number}"))
            connection = await self._until_acknowledged(connection, events)
            self.views[user] += sum("action" not in event for event in events)
            try:
                shown = (await connection.get(f"/profiles/{user}")).json["features"]["tip_volume_30d"]
            except Broken:
                continue
            if shown != self.views[user]:
                self.faults.append(f"{user}: {shown} shown, {self.views[user]} acknowledged")
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
            if receipt["duplicates"] not in (0, len(events)) or receipt["accepted"] + receipt["duplicates"] != len(
                events
            ):
                self.faults.append(f"a request of {len(events)} events was known in part: {receipt}")
            self.known_before += receipt["duplicates"]
            self.answers += 1
            self.acknowledged.update(event["event_id"] for event in events)
            self._sent.append(events)
            return connection

    async def _to_successor_of(self, port: int) -> Connection:
        await eventually(lambda: self.alive.port != port, 30)
        return Connection(self.alive.port)

    async def _check_the_end(self) -> None:
        self._check_halves()
        stored = self.fleet.stored()
        self.faults += [f"{event_id} is there {stored[event_id]} times" for event_id in self.acknowledged - stored]
        self.faults += [f"{event_id} was never acknowledged" for event_id in stored - self.acknowledged]
        self.faults += [str(row) for row in self.fleet.rows("PRAGMA integrity_check") if row != ("ok",)]
        connection = Connection(self.alive.port)
        for user, count in self.views.items():
            shown = (await connection.get(f"/profiles/{user}")).json["features"]["tip_volume_30d"]
            if shown != count:
                self.faults.append(f"{user}: {shown} shown in the end, {count} acknowledged")
        for events in self._random.sample(self._sent, min(AGAIN, len(self._sent))):
            receipt = (await connection.post("/events", events)).json
            if (receipt["accepted"], receipt["duplicates"]) != (0, len(events)):
                self.faults.append(f"sent again, {len(events)} events were not all known: {receipt}")
        await connection.close()
