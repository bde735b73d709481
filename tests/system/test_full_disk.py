"""A full disk: reads go on, events are refused whole and with a reason, and all is well again once there is room."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from app.stores.queue.jobs import TIP_EVENTS
from tests.support.events import payload, served
from tests.support.fleet import Fleet, Member
from tests.support.http import Connection
from tests.support.live import fresh_database
from tests.support.processes import Programs
from tests.support.queue import connect
from tests.support.servers import VALKEY, StartServer
from tests.support.small_disk import Disk, LimitedFiles, small_file_system
from tests.support.traffic import now_ms
from tests.support.waiting import eventually_async

pytestmark = pytest.mark.slow
PIECE = 50
WORDS = {"database_full": 1, "database_has_room_again": 1}


@pytest.fixture(params=["file system", "limit"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    if request.param == "limit":
        directory = tmp_path / "limited"
        directory.mkdir()
        yield LimitedFiles(directory)
        return
    with small_file_system(tmp_path / "small") as found:
        if found is None:
            pytest.skip("only root may mount a file system; the limit of file sizes is tried all the same")
        yield found


@pytest.fixture
def small_fleet(disk: Disk, programs: Programs, migrated_template: Path, start_server: StartServer) -> Iterator[Fleet]:
    cache, queue = start_server(VALKEY), start_server(VALKEY)
    yield Fleet(programs, fresh_database(migrated_template, disk.directory), cache, queue)
    programs.close()
    cache.kill()
    queue.kill()


class Producer:
    """Sends pieces of events, and remembers what was acknowledged and what refused."""

    def __init__(self, port: int, first: int) -> None:
        self.connection = Connection(port)
        self.acknowledged: set[str] = set()
        self.refused: list[list[dict[str, Any]]] = []
        self._number = first

    async def send(self) -> int:
        self._number += 1
        user = f"user-{self._number % 7}"
        events = [payload(served(user, now_ms()), event_id=f"{self._number}-{place}") for place in range(PIECE)]
        return await self.send_again(events)

    async def send_again(self, events: list[dict[str, Any]]) -> int:
        answer = await self.connection.post("/events", events)
        if answer.status == 202:
            self.acknowledged |= {event["event_id"] for event in events}
        else:
            assert answer.status == 507, answer
            assert answer.json["type"] == "urn:profiles:problem:insufficient-storage"
            assert "no room to write" in answer.json["detail"]
            self.refused.append(events)
        return answer.status


MakeProducer = Callable[[int], Producer]


@pytest.fixture
async def producer_of() -> AsyncIterator[MakeProducer]:
    """Makes producers to a port; all are closed at the end."""
    made: list[Producer] = []

    def make(port: int) -> Producer:
        made.append(Producer(port, 10_000 * len(made)))
        return made[-1]

    yield make
    for producer in made:
        await producer.connection.close()


async def ready(connection: Connection) -> tuple[int, str]:
    answer = await connection.get("/readyz")
    return answer.status, answer.json["checks"]["database"]


def said(member: Member) -> dict[str, int]:
    """How often the log has each of the words."""
    return {word: member.program.output.count(word) for word in WORDS}


def half_written(database: Path) -> list[tuple[Any, ...]]:
    """Log rows without their fact, and facts without their log row; and what SQLite finds wrong."""
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute(
            """SELECT seq FROM event_log WHERE seq NOT IN (SELECT seq FROM tip_views UNION SELECT seq FROM tip_feedback)
               UNION SELECT seq FROM tip_views WHERE seq NOT IN (SELECT seq FROM event_log)"""
        ).fetchall()
        return rows + [row for row in connection.execute("PRAGMA integrity_check") if row != ("ok",)]


async def test_events_are_refused_when_the_disk_is_full(
    small_fleet: Fleet, disk: Disk, producer_of: MakeProducer
) -> None:
    (api,) = await small_fleet.apis(1)
    worker = small_fleet.worker()
    pids = [api.program.pid, worker.program.pid]
    producer = producer_of(api.port)
    for _ in range(20):
        assert await producer.send() == 202
    # No commit is under way, and none is waited for: both processes are to find the disk full.
    disk.fill(*pids)
    statuses = [await producer.send() for _ in range(60)]
    assert statuses[-20:] == [507] * 20  # what room was left in the log's file is used up first
    shown = [await producer.connection.get(f"/profiles/user-{number}") for number in range(7)]
    assert {answer.status for answer in shown} == {200}
    volumes = [answer.json["features"]["tip_volume_30d"] for answer in shown]
    assert sum(volumes) == len(producer.acknowledged)
    cold = await producer.connection.get("/profiles/nobody-knows-me?detail=true")
    assert (cold.status, cold.json["features"]["tip_volume_30d"]["value"]) == (200, 0)
    assert await producer.send() == 507
    full = "the disk is full: events and decisions are rejected, reads continue"
    assert await ready(producer.connection) == (200, full)
    refused_rebuild = await producer.connection.post("/admin/users/user-1/rebuild", {})
    assert refused_rebuild.status == 507  # an action whose entry in the trail cannot be written is not done
    await publish(small_fleet, "by-the-queue")

    disk.make_room(*pids)

    async def taken() -> bool:
        return await producer.send() == 202

    await eventually_async(taken)
    for events in [*producer.refused]:
        assert await producer.send_again(events) == 202
    await eventually_async(lambda: _is_stored(small_fleet, "by-the-queue"), step_s=0.1)
    assert small_fleet.stored().keys() == {*producer.acknowledged, "by-the-queue"}
    assert set(small_fleet.stored().values()) == {1}
    await eventually_async(lambda: _well(producer.connection), step_s=0.1)
    await eventually_async(lambda: _all_consumed(small_fleet), step_s=0.2)
    assert said(api) == WORDS, api.program.output
    for member in (api, worker):
        assert member.program.stop() == 0
        assert "Traceback" not in member.program.output
        assert len(member.program.output.splitlines()) < 60, member.program.output
    assert half_written(small_fleet.database) == []


async def _well(connection: Connection) -> bool:
    return await ready(connection) == (200, "ok")


async def publish(fleet: Fleet, event_id: str) -> None:
    """As a program that publishes on the queue itself."""
    queue = connect(fleet.queue.url)
    try:
        await queue.enqueue_job(TIP_EVENTS, [payload(served("user-q", now_ms()), event_id=event_id)])
    finally:
        await queue.aclose(close_connection_pool=True)


async def _is_stored(fleet: Fleet, event_id: str) -> bool:
    return event_id in fleet.stored()


async def _so_many(fleet: Fleet, events: int) -> bool:
    return len(fleet.stored()) >= events


async def _all_consumed(fleet: Fleet) -> bool:
    return fleet.unconsumed() == 0


async def test_nothing_is_half_written_when_the_disk_fills(
    small_fleet: Fleet, disk: Disk, producer_of: MakeProducer
) -> None:
    (api,) = await small_fleet.apis(1)
    producers = [producer_of(api.port) for _ in range(4)]

    async def keep_sending(producer: Producer) -> None:
        while len(producer.refused) < 30:
            await producer.send()

    assert await producers[0].send() == 202
    sending = [asyncio.create_task(keep_sending(producer)) for producer in producers[1:]]
    await eventually_async(lambda: _so_many(small_fleet, 20 * PIECE))
    disk.fill(api.program.pid)
    await asyncio.gather(*sending)
    stored = small_fleet.stored()
    acknowledged = set().union(*(producer.acknowledged for producer in producers))
    assert stored.keys() == acknowledged
    assert set(stored.values()) == {1}
    api.program.kill()
    disk.make_room()
    assert half_written(small_fleet.database) == []
    assert small_fleet.stored().keys() == acknowledged  # after recovery of the log, too


@pytest.mark.parametrize("disk", ["file system"], indirect=True)  # a limit is of a process that runs already
async def test_process_starts_when_the_disk_is_full(small_fleet: Fleet, disk: Disk, producer_of: MakeProducer) -> None:
    (first,) = await small_fleet.apis(1)
    assert await producer_of(first.port).send() == 202
    disk.fill()
    (second,) = await small_fleet.apis(1)
    shown = await producer_of(second.port).connection.get("/profiles/user-1")
    assert (shown.status, shown.json["features"]["tip_volume_30d"]) == (200, PIECE)


@pytest.mark.parametrize("disk", ["file system"], indirect=True)
async def test_first_process_starts_when_the_disk_is_full(
    small_fleet: Fleet, disk: Disk, producer_of: MakeProducer
) -> None:
    (first,) = await small_fleet.apis(1)
    assert await producer_of(first.port).send() == 202
    assert first.program.stop() == 0
    assert not list(disk.directory.glob("*-shm")), "which a process that starts has to make"
    disk.fill()
    (second,) = await small_fleet.apis(1)
    worker = small_fleet.worker()
    producer = producer_of(second.port)
    shown = await producer.connection.get("/profiles/user-1")
    assert (shown.status, shown.json["features"]["tip_volume_30d"]) == (200, PIECE)
    while await producer.send() != 507:  # what is left of the reserve is used up first
        pass
    disk.make_room()
    await eventually_async(lambda: _well(producer.connection), step_s=0.1)
    assert await producer.send() == 202
    for member in (second, worker):
        assert member.program.stop() == 0
    (third,) = await small_fleet.apis(1)
    assert third.program.stop() == 0
    assert list(disk.directory.glob("*-reserve")), "kept for the next time"


def scored(database: Path) -> dict[str, str]:
    """Decisions by their requests; each of them whole, as SQLite and what is decided by see it."""
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        rows = connection.execute("SELECT request_id, decision_id, length(phi), request FROM tip_scores").fetchall()
    assert all(length and json.loads(request)["candidates"] for _, _, length, request in rows)
    assert len({decision_id for _, decision_id, _, _ in rows}) == len(rows)
    return {request_id: decision_id for request_id, decision_id, _, _ in rows}


async def test_decisions_are_refused_when_the_disk_is_full(small_fleet: Fleet, disk: Disk) -> None:
    (api,) = await small_fleet.apis(1)
    connection = Connection(api.port)
    candidates = [
        {"id": f"t-{number}", "features": {"is_overdue": False, "task_age_days": number, "priority": 1}}
        for number in range(20)
    ]
    answered: dict[str, str] = {}

    async def score(number: int) -> int:
        asked = {"request_id": f"r-{number}", "user_id": f"user-{number % 7}", "candidates": candidates}
        answer = await connection.post("/score", asked)
        if answer.status == 200:
            answered[f"r-{number}"] = answer.json["decision_id"]
        else:
            assert answer.status == 507, answer
            assert answer.json["type"] == "urn:profiles:problem:insufficient-storage"
            assert "no room to write" in answer.json["detail"]
        return answer.status

    for number in range(20):
        assert await score(number) == 200
    disk.fill(api.program.pid)
    statuses = [await score(number) for number in range(20, 120)]
    assert statuses[-20:] == [507] * 20  # what room was left in the log's file is used up first
    assert scored(small_fleet.database) == answered
    assert await score(0) == 200, "it is stored already, and reads go on"
    explained = await connection.get(f"/decisions/{answered['r-0']}")
    assert (explained.status, explained.json["decision_id"]) == (200, answered["r-0"])

    disk.make_room(api.program.pid)

    async def decided() -> bool:
        return await score(119) == 200

    await eventually_async(decided)
    before = dict(answered)
    assert [await score(number) for number in range(120)] == [200] * 120
    assert before.items() <= answered.items(), "who asks again gets the same"
    assert api.program.stop() == 0
    assert scored(small_fleet.database) == answered
    await connection.close()
