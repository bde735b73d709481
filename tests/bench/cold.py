"""A cold read over HTTP, against the same SQL by plain sqlite3 in one thread: what a miss adds to its statement.

The cache is emptied before each round and each user is read once, so every read is a miss. There is one connection.
"""

import json
import socket
from collections.abc import Iterator
from contextlib import closing
from statistics import median
from time import perf_counter

import redis

from app.stores.sql.profile_statement import build
from app.stores.sqlite.connection import connect
from app.stores.sqlite.features import DIALECT
from tests.bench.comparison import Comparison
from tests.bench.environment import Environment
from tests.bench.load import get
from tests.bench.servers import KEY, service
from tests.support.bulk_users import add_users
from tests.support.registry import REGISTRY

ROUNDS = 5
USERS = 50
LIMITS = {100: 8.0, 1_000: 3.0}


def measure(environment: Environment) -> Iterator[Comparison]:
    """p50 of a read, by the events that the user has in the window."""
    database, now_ms = environment.settings.require_file(), environment.now_ms
    users = {events: add_users(database, f"cold-{events}", USERS, events, now_ms) for events in LIMITS}
    with service(environment.settings) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        for events, limit in LIMITS.items():
            reference, ours = [], []
            for number in range(ROUNDS + 1):
                reference.append(median(_by_sqlite(environment, users[events])))
                with redis.Redis.from_url(environment.cache_url) as client:
                    client.flushall()
                ours.append(median(_by_service(connection, users[events])))
                if number == 0:  # the process has just started
                    reference.clear()
                    ours.clear()
            name = f"cold read, {events:,} events in the window, p50"
            yield Comparison(name, "the same SQL, sqlite3", median(reference), median(ours), limit)


def _by_sqlite(environment: Environment, users: list[str]) -> list[float]:
    statement = build(REGISTRY, DIALECT).live
    times: list[float] = []
    with closing(connect(environment.settings.require_file(), read_only=True)) as connection:
        for user in users:
            started = perf_counter()
            asked = json.dumps([[user, REGISTRY.full_mask, None, None]])
            connection.execute(statement, {"clock_ms": environment.now_ms, "asked": asked}).fetchall()
            times.append(perf_counter() - started)
    return times


def _by_service(connection: socket.socket, users: list[str]) -> list[float]:
    times: list[float] = []
    for user in users:
        request = get(f"/profiles/{user}", KEY)
        started = perf_counter()
        connection.sendall(request)
        answer = connection.recv(65_536)
        while not answer.endswith(b"}}"):
            answer += connection.recv(65_536)
        times.append(perf_counter() - started)
        assert answer.startswith(b"HTTP/1.1 200"), answer
    return times
