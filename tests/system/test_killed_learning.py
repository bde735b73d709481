"""kill -9 of APIs and workers while users are scored and learned about: no decision is lost, each is learned once
and has its shadow."""

import asyncio
import json
import random
import sqlite3
from contextlib import closing
from typing import Any

import pytest

from tests.support.events import feedback, payload, served
from tests.support.fleet import Fleet, Member
from tests.support.http import Broken, Connection, serving
from tests.support.learning_check import SELECT_LEARNED, SELECT_STATES, learning_faults, shadow_faults
from tests.support.traffic import now_ms
from tests.support.waiting import eventually

CLIENTS, ROUNDS = 5, 16
CANDIDATES = [
    {"id": f"tip-{n}", "features": {"is_overdue": n % 2 == 0, "task_age_days": 2 * n, "priority": n}} for n in range(4)
]


class Classroom:
    """Clients that are scored and send what became of it, to whichever API is alive."""

    def __init__(self, fleet: Fleet, alive: Member) -> None:
        self.fleet = fleet
        self.alive = alive
        self.done = 0
        self.answers: dict[str, bytes] = {}
        self._random = random.Random(6)

    async def ask(self, path: str, body: object) -> bytes:
        while True:
            port = self.alive.port
            connection = Connection(port)
            try:
                answer = await connection.post(path, body)
            except Broken:
                await eventually(lambda port=port: self.alive.port != port)  # type: ignore[misc]
                continue
            finally:
                await connection.close()
            assert answer.status in (200, 202), answer
            return answer.body

    async def attend(self, client: int) -> None:
        """One user's decisions, one after the other; feedback is sent twice."""
        user = f"user-{client}"
        for number in range(ROUNDS):
            request_id = f"{user}-{number}"
            asked = {"user_id": user, "request_id": request_id, "candidates": CANDIDATES}
            self.answers[request_id] = await self.ask("/score", asked)
            found = _decoded(self.answers[request_id])
            about: dict[str, Any] = {"tip_id": found["chosen_id"], "decision_id": found["decision_id"]}
            events = [
                payload(served(user, now_ms(), **about), event_id=f"{request_id}-s"),
                payload(
                    feedback(user, now_ms(), self._random.choice(["completed", "dismissed", "snoozed"]), **about),
                    event_id=f"{request_id}-f",
                ),
            ]
            await self.ask("/events", events)
            await self.ask("/events", [{**events[1], "event_id": f"{request_id}-again"}])
            self.done += 1

    async def kill_api(self) -> None:
        successor = self.fleet.api()
        await serving(successor.port)
        self.alive.program.kill()
        self.alive = successor


def _decoded(body: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(body)
    return found


@pytest.mark.slow
async def test_each_decision_is_kept_and_learned_once_when_processes_are_killed(fleet: Fleet) -> None:
    (first,) = await fleet.apis(1)
    workers = [fleet.worker() for _ in range(2)]
    room = Classroom(fleet, first)
    attending = [asyncio.create_task(room.attend(client)) for client in range(CLIENTS)]
    total = CLIENTS * ROUNDS
    for number, share in enumerate((0.2, 0.4, 0.6, 0.8)):
        await eventually(lambda share=share: room.done >= share * total)  # type: ignore[misc]
        if number % 2:
            await room.kill_api()
        else:
            workers[number // 2].program.kill()
            workers.append(fleet.worker())
    await asyncio.gather(*attending)
    await eventually(lambda: fleet.unconsumed() == 0)

    for request_id, body in room.answers.items():
        user = request_id.rsplit("-", 1)[0]
        again = await room.ask("/score", {"user_id": user, "request_id": request_id, "candidates": CANDIDATES})
        assert again == body, "another answer for the same request"
    assert fleet.rows("SELECT state, COUNT(*) FROM tip_scores GROUP BY state") == [("learned", total)]
    assert dict(fleet.rows("SELECT outcome, COUNT(*) FROM decision_events GROUP BY outcome"))["learned"] == total
    states = fleet.rows(SELECT_STATES)
    assert [decisions for *_, decisions in states] == [ROUNDS] * CLIENTS
    assert learning_faults(fleet.rows(SELECT_LEARNED), states) == []
    with closing(sqlite3.connect(fleet.database)) as connection:
        assert shadow_faults(connection) == []
