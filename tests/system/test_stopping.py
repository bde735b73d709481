"""SIGTERM under load: sent requests are answered, later ones are refused, and no job is lost or done twice."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections import Counter
from contextlib import closing
from time import monotonic

import pytest
from arq.connections import ArqRedis

from app.stores.queue.client import QUEUE
from app.stores.queue.jobs import TIP_EVENTS
from tests.support.balancer import balancer
from tests.support.chat_server import chat_server, is_silent
from tests.support.events import payload, served
from tests.support.fleet import Fleet, Member
from tests.support.http import Connection, serving
from tests.support.senders import CLIENTS, Senders
from tests.support.traffic import now_ms
from tests.support.waiting import PATIENCE_S, eventually, eventually_async

STOPS = 2
ROLLS = 1
ANSWERS_BEFORE = 60
BACKLOG = 200
WORKER_STOPS = 3


def ended_well(member: Member) -> bool:
    """Whether it stopped by itself, with nothing cut short."""
    return member.program.wait() == 0 and "requests_cut_short" not in member.program.output


@pytest.mark.slow
async def test_no_request_is_lost_when_the_api_stops(fleet: Fleet) -> None:
    (api,) = await fleet.apis(1)
    senders = Senders(api.port)
    running = [asyncio.create_task(senders.run(number)) for number in range(CLIENTS)]
    for _ in range(STOPS):
        await senders.answered(ANSWERS_BEFORE)
        successor = fleet.api()
        await serving(successor.port)
        api.program.send(signal.SIGTERM)
        refused = senders.refused
        await eventually(lambda before=refused: senders.refused >= before + CLIENTS)  # type: ignore[misc]  # a number
        senders.port = successor.port
        assert ended_well(api), api.program.output
        api = successor
    senders.over = True
    await asyncio.gather(*running)
    assert senders.lost == []
    assert fleet.stored() == senders.acknowledged


@pytest.mark.slow
async def test_nothing_is_dropped_when_processes_are_replaced(fleet: Fleet) -> None:
    members = await fleet.apis(2)
    async with balancer([member.port for member in members]) as front:
        senders = Senders(front.port)
        running = [asyncio.create_task(senders.run(number)) for number in range(CLIENTS)]
        for _ in range(ROLLS):
            for place, old in enumerate(members):
                await senders.answered(ANSWERS_BEFORE)
                members[place] = fleet.api()
                await serving(members[place].port)
                front.ports.append(members[place].port)
                old.program.send(signal.SIGTERM)
                assert await asyncio.to_thread(ended_well, old), old.program.output
                front.ports.remove(old.port)
        await senders.answered(ANSWERS_BEFORE)
        senders.over = True
        await asyncio.gather(*running)
    assert senders.lost == []
    assert senders.refused == 0
    assert fleet.stored() == senders.acknowledged


async def test_draining_process_serves_but_is_not_ready(fleet: Fleet) -> None:
    (api,) = await fleet.apis(1, drain_s=300)
    kept = Connection(api.port)
    assert (await kept.get("/readyz")).status == 200
    api.program.send(signal.SIGTERM)

    async def stopping() -> bool:
        answer = await kept.get("/readyz")
        return answer.status == 503 and answer.json["status"] == "stopping"

    await eventually_async(stopping)
    event = payload(served("ann", now_ms()))
    another = Connection(api.port)  # new connections are still accepted
    assert (await another.post("/events", event)).status == 202
    assert (await kept.get("/profiles/ann")).json["features"]["tip_volume_30d"] == 1
    await asyncio.gather(kept.close(), another.close())


async def test_process_stops_when_it_has_drained(fleet: Fleet) -> None:
    (api,) = await fleet.apis(1, drain_s=1)
    told = monotonic()
    api.program.send(signal.SIGTERM)
    assert ended_well(api), api.program.output
    assert monotonic() - told >= 1


async def test_idle_connections_are_closed(fleet: Fleet) -> None:
    (api,) = await fleet.apis(1, keep_alive_s=1)
    began = monotonic()
    with closing(socket.create_connection(("127.0.0.1", api.port), PATIENCE_S)) as line:
        line.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert line.recv(65_536).startswith(b"HTTP/1.1 200")
        assert line.recv(65_536) == b""
    assert monotonic() - began >= 1


async def test_connections_close_after_their_next_answer(fleet: Fleet) -> None:
    (api,) = await fleet.apis(1)
    request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with closing(socket.create_connection(("127.0.0.1", api.port), PATIENCE_S)) as line:
        line.sendall(request)
        assert b"connection: close" not in line.recv(65_536)
        api.program.send(signal.SIGTERM)
        last = b""
        while b"connection: close" not in last:
            line.sendall(request)
            last = line.recv(65_536)
            assert last.startswith(b"HTTP/1.1 200"), last
        assert line.recv(65_536) == b"", "it is closed, not reset"
    assert ended_well(api), api.program.output


@pytest.mark.slow
async def test_tip_is_worded_when_the_api_stops(fleet: Fleet) -> None:
    async with chat_server() as endpoint:
        endpoint.will(is_silent)
        (api,) = await fleet.apis(1, model_url=endpoint.url, model="m")
        connection = Connection(api.port)
        asking = asyncio.create_task(connection.post("/generate", {"task": {"id": "t", "title": "Call Anna"}}))
        await eventually(lambda: endpoint.asked)
        api.program.send(signal.SIGTERM)
        answer = await asking
        assert (answer.status, answer.json["fallback_reason"]) == (200, "stopping")
        assert await asyncio.to_thread(ended_well, api), api.program.output
        await connection.close()


@pytest.mark.slow
async def test_no_job_is_lost_when_workers_stop(fleet: Fleet, queue: ArqRedis) -> None:
    over = asyncio.Event()
    sent: list[str] = []

    async def publish() -> None:
        while not over.is_set():
            if len(sent) - len(fleet.stored()) < BACKLOG:  # always more than one round of arq takes
                for number in range(len(sent), len(sent) + BACKLOG):
                    event = payload(served(f"user-{number % 50}", now_ms()), event_id=f"job-{number}")
                    assert await queue.enqueue_job(TIP_EVENTS, [event]) is not None
                    sent.append(f"job-{number}")
            await asyncio.sleep(0.01)

    publishing = asyncio.create_task(publish())
    for _ in range(WORKER_STOPS):
        worker = fleet.worker()
        enough = len(fleet.stored()) + BACKLOG
        await eventually(lambda enough=enough: len(fleet.stored()) >= enough)  # type: ignore[misc]  # a number
        assert await asyncio.to_thread(worker.program.stop) == 0
        assert await queue.keys("arq:in-progress:*") == [], "a job was taken and neither done nor put back"
        assert await queue.zcard(QUEUE) > 0, "it was stopped under load"
    over.set()
    await publishing
    worker = fleet.worker()
    await eventually(lambda: len(fleet.stored()) == len(sent) and fleet.unconsumed() == 0)
    assert await asyncio.to_thread(worker.program.stop) == 0

    assert fleet.stored() == Counter(sent)
    assert await queue.zcard(QUEUE) == 0
    # What the processes counted. One that stops gives up its last sample if the database is slow.
    counted = "SELECT COALESCE(SUM(body ->> '$.counts.{}'), 0) FROM samples"
    assert fleet.rows(counted.format("events_accepted"))[0][0] <= len(sent)
    assert fleet.rows(counted.format("events_duplicate")) == [(0,)]
