"""A cold profile over HTTP, against the same SQL by plain sqlite3 in one thread: what a miss adds to its statement.

The cache is emptied before each round, so that every read is a miss; one connection, each user once a round.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from statistics import median
from time import perf_counter

import redis

from app.settings import Settings
from app.stores.sqlite.connection import connect
from app.stores.sqlite.profile_statement import build
from tests.bench.ground import Ground, add_users
from tests.bench.load import get
from tests.bench.serving import KEY, service
from tests.bench.timing import Comparison, Curve, Result
from tests.support.registry import REGISTRY

ROUNDS = 5
USERS = {10: 50, 100: 50, 1_000: 50, 10_000: 10, 100_000: 3}
FLOORS = {100: 8.0, 1_000: 3.0}


def measure(ground: Ground) -> Iterator[Result]:
    """p50 of a read over the events that the user has in the window."""
    users = {
        events: add_users(ground.settings.database, f"cold-{events}", count, events, ground.now_ms)
        for events, count in USERS.items()
    }
    costs: dict[str, list[float]] = {"the same SQL, sqlite3": [], "profiles": []}
    with service(ground.settings) as port, socket.create_connection(("127.0.0.1", port)) as line:
        for events in USERS:
            reference, ours = [], []
            for _ in range(ROUNDS):
                reference.append(median(_by_sqlite(ground.settings, users[events], ground.now_ms)))
                _empty(ground.settings)
                ours.append(median(_by_service(line, users[events])))
            for name, taken in zip(costs, (reference, ours), strict=True):
                costs[name].append(median(taken))
            if events in FLOORS:
                name = f"cold read, {events:,} events in the window, p50"
                against = "the same SQL, sqlite3"
                yield Comparison(name, against, median(reference), median(ours), FLOORS[events])
    yield Curve("cold read over events of the user", "events in the window", "seconds", tuple(USERS), costs)


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
