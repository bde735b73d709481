"""A cold profile over HTTP, against the same SQL by plain sqlite3 in one thread: what a miss adds to its statement.

The cache is emptied before each round, so that every read is a miss; one connection, each user once a round.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from statistics import median
from time import perf_counter

import redis

from app.assembly import open_service
from app.features.clock import EPOCH, MILLISECOND
from app.features.definitions import REGISTRY
from app.features.events import TipEvent, TipFeedback, TipServed
from app.settings import Settings
from app.stores.sqlite.connection import connect
from app.stores.sqlite.profile_statement import build
from tests.bench.http import KEY, free_port, service
from tests.bench.load import get
from tests.bench.timing import Comparison

ROUNDS = 5
USERS = 50
CHUNK = 1_000
FLOORS = {100: 8.0, 1_000: 3.0}


def measure(settings: Settings, now_ms: int) -> Iterator[Comparison]:
    """p50 of a read, for users with 100 and with 1,000 events in the window."""
    for events in FLOORS:
        asyncio.run(_load(settings, events, now_ms))
    port = free_port()
    with service(settings, port), socket.create_connection(("127.0.0.1", port)) as line:
        for events, floor in FLOORS.items():
            users = [_user(events, number) for number in range(USERS)]
            reference, ours = [], []
            for _ in range(ROUNDS):
                reference.append(median(_by_sqlite(settings, users, now_ms)))
                _empty(settings)
                ours.append(median(_by_service(line, users)))
            name = f"cold read, {events:,} events in the window, p50"
            yield Comparison(name, "the same SQL, sqlite3", median(reference), median(ours), floor)


def _user(events: int, number: int) -> str:
    return f"cold-{events}-{number}"


async def _load(settings: Settings, events: int, now_ms: int) -> None:
    async with open_service(settings, door="bench") as opened:
        made = [event for number in range(USERS) for event in events_of(_user(events, number), events, now_ms)]
        for start in range(0, len(made), CHUNK):
            await opened.ingestor.ingest(made[start : start + CHUNK])


def events_of(user_id: str, count: int, now_ms: int) -> Iterator[TipEvent]:
    """A user's events, newest first: half of them served tips, half of them feedback, evenly over 29 days."""
    step_ms = 29 * 86_400_000 // count
    for number in range(count):
        occurred_at = EPOCH + (now_ms - 1_000 - number * step_ms) * MILLISECOND
        event_id, tip_id = f"{user_id}-{number}", f"tip-{number // 2}"
        if number % 2:
            yield TipServed(event_id=event_id, user_id=user_id, tip_id=tip_id, occurred_at=occurred_at)
        else:
            yield TipFeedback(
                event_id=event_id,
                user_id=user_id,
                tip_id=tip_id,
                occurred_at=occurred_at,
                action="completed" if number % 4 else "dismissed",
                dwell_ms=number * 10,
            )


def _by_sqlite(settings: Settings, users: list[str], now_ms: int) -> list[float]:
    connection = connect(settings.database, read_only=True)
    statement = build(REGISTRY)
    taken: list[float] = []
    try:
        for user in users:
            started = perf_counter()
            asked = json.dumps([[user, REGISTRY.full_mask, None, None]])
            connection.execute(statement, {"clock_ms": now_ms, "asked": asked}).fetchall()
            taken.append(perf_counter() - started)
    finally:
        connection.close()
    return taken


def _by_service(line: socket.socket, users: list[str]) -> list[float]:
    taken: list[float] = []
    for user in users:
        request = get(f"/profiles/{user}", KEY)
        started = perf_counter()
        line.sendall(request)
        answer = line.recv(65_536)
        while not answer.endswith(b"}}"):
            answer += line.recv(65_536)
        taken.append(perf_counter() - started)
        assert answer.startswith(b"HTTP/1.1 200"), answer
    return taken


def _empty(settings: Settings) -> None:
    with redis.Redis.from_url(settings.cache_url or "") as client:
        client.flushall()
