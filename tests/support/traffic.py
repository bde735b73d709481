"""Clients that send events and read profiles, and check what the reads show.

A *shared* user is written by many clients at once. A read must show at least the events that were acknowledged when it
began, and at most those sent when it ended. An *own* user is written by one client, so its profile is known exactly.
"""

import random
from collections import Counter
from dataclasses import dataclass, field
from time import time
from typing import Any

from app.features.events import Action, TipEvent
from tests.support.events import feedback, payload, served
from tests.support.http import Answer, Connection

ACTIONS = tuple(Action)


def now_ms() -> int:
    """The wall clock, in milliseconds."""
    return int(time() * 1000)


@dataclass(slots=True)
class TrafficRecord:
    """The record of all clients. `stale` and `wrong` have a line for each read that broke the promise."""

    sent: Counter[str] = field(default_factory=Counter)
    acknowledged: Counter[str] = field(default_factory=Counter)
    event_ids: list[str] = field(default_factory=list)
    pairs: int = 0
    stale: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)

    def saw(self, answer: Answer) -> Any:
        """Record an answer; its JSON."""
        self.statuses[answer.status] += 1
        self.seconds.append(answer.seconds)
        assert answer.status in (200, 202), answer
        return answer.json


class Client:
    """A client with a connection to each API process."""

    def __init__(self, name: str, ports: list[int], record: TrafficRecord, shared: list[str], seed: int = 0) -> None:
        self.name = name
        self.connections = [Connection(port) for port in ports]
        self.own = f"{name}-own"
        self._record = record
        self._shared = shared
        self._random = random.Random(f"{name}/{seed}")
        self._actions: Counter[str] = Counter()
        self._dwells: list[int] = []

    async def pair(self) -> None:
        """Send one event to one process, then read the profile from any process."""
        if self._random.random() < 0.5:
            await self._shared_pair(self._random.choice(self._shared))
        else:
            await self._own_pair()
        self._record.pairs += 1

    async def close(self) -> None:
        for connection in self.connections:
            await connection.close()

    async def _shared_pair(self, user: str) -> None:
        record = self._record
        record.sent[user] += 1
        await self._send(served(user, now_ms()))
        record.acknowledged[user] += 1
        await self.look_at(user)

    async def look_at(self, user: str) -> None:
        """Read a shared user from any process, and check the answer."""
        record = self._record
        least = record.acknowledged[user]
        shown = (await self._read(user))["tip_volume_30d"]
        if shown < least:
            record.stale.append(f"{user}: {shown} tips shown, {least} acknowledged")
        if shown > record.sent[user]:
            record.wrong.append(f"{user}: {shown} tips shown, {record.sent[user]} sent")

    async def _own_pair(self) -> None:
        action = self._random.choice(ACTIONS)
        dwell_ms = self._random.randrange(100_000)
        await self._send(feedback(self.own, now_ms(), action, dwell_ms=dwell_ms))
        self._actions[action] += 1
        self._dwells.append(dwell_ms)
        shown = await self._read(self.own)
        count = len(self._dwells)
        expected = {
            "completion_rate_30d": self._actions["completed"] / count,
            "dismiss_rate_30d": self._actions["dismissed"] / count,
            "mean_dwell_ms_30d": sum(self._dwells) / count,
            "tip_volume_30d": 0,
        }
        if {name: shown[name] for name in expected} != expected:
            self._record.stale.append(f"{self.own}: {shown} shown, {expected} expected")

    async def _send(self, event: TipEvent) -> None:
        # The builders' ids start at 1 in every process, so the id is drawn at random.
        event_id = f"{self.name}-{len(self._record.event_ids)}-{self._random.getrandbits(48)}"
        self._record.event_ids.append(event_id)
        answer = await self._random.choice(self.connections).post("/events", payload(event, event_id=event_id))
        receipt = self._record.saw(answer)
        assert receipt["accepted"] == 1, receipt

    async def _read(self, user: str) -> dict[str, Any]:
        answer = await self._random.choice(self.connections).get(f"/profiles/{user}")
        features: dict[str, Any] = self._record.saw(answer)["features"]
        return features
