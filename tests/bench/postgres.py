"""PostgreSQL on the same machine: ingest against a bare transaction, and profiles against SQLite.

The server is durable. It starts from Debian's package, as in the tests.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator

import uvloop
from psycopg import AsyncConnection

from app.bootstrap.engines import open_engine
from app.bootstrap.service import open_service
from app.events.validation import admit
from app.features.events import TipEvent
from app.profiles.ports import ComputeRow
from app.stores.sql.event_log import COLUMNS
from tests.bench.comparison import Comparison, compare
from tests.bench.environment import Environment, on_postgres
from tests.bench.ingest import rows_of_event
from tests.support.events import feedback, served
from tests.support.postgres import PostgresServer
from tests.support.registry import REGISTRY

BATCH = 500
ROUNDS = 9
INGEST_LIMITS = {BATCH: 1.4, 1: 3.4}  # for a request with this number of events; `tests/README.md` derives them
TABLES = ("event_log", "tip_views", "outbox")
LIMITS = {1: 3.0, 100: 1.5}  # for a read of this number of users
EVENTS = 300


def measure(environment: Environment) -> Iterator[Comparison]:
    """Seconds per event, and seconds per user."""
    with on_postgres(environment) as (there, server):
        yield from uvloop.run(_all(environment, there, server))


async def _all(here: Environment, there: Environment, server: PostgresServer) -> list[Comparison]:
    return [
        *[found async for found in _ingest(there, server)],
        *[found async for found in _profiles(here, there, server)],
    ]


async def _ingest(there: Environment, server: PostgresServer) -> AsyncIterator[Comparison]:
    numbers = itertools.count()

    def new(size: int) -> list[TipEvent]:
        return [
            served(f"user-{number % 1_000}", there.now_ms - 1_000, event_id=f"bench-{number}")
            for number in itertools.islice(numbers, size)
        ]

    async with (
        open_service(there.settings, door="bench") as service,
        await AsyncConnection.connect(server.url("bench"), autocommit=True) as plain,
    ):
        for table in TABLES:
            await plain.execute(f"CREATE TABLE bare_{table} (LIKE {table} INCLUDING ALL)".encode())
        for size, limit in INGEST_LIMITS.items():

            async def reference(size: int = size) -> None:
                rows = [rows_of_event(next(numbers), item) for item in admit(new(size), there.now_ms, 180)]
                async with plain.transaction(), plain.cursor() as cursor:
                    for table, inserted in zip(TABLES, zip(*rows, strict=True), strict=True):
                        places = ", ".join("%s" for _ in inserted[0])
                        statement = f"INSERT INTO bare_{table} ({COLUMNS[table]}) VALUES ({places})"
                        await cursor.executemany(statement.encode(), inserted)

            async def ours(size: int = size) -> None:
                await service.ingestor.ingest(new(size))

            name = f"ingest on PostgreSQL, {size} event{'s' if size > 1 else ''} a request, per event"
            yield await compare(
                name, "psycopg executemany", reference, ours, repeat=20, rounds=ROUNDS, units=size, at_most=limit
            )


async def _profiles(here: Environment, there: Environment, server: PostgresServer) -> AsyncIterator[Comparison]:
    """The rows of a computation for users with `EVENTS` events each, in the window."""
    users = [f"reader-{number}" for number in range(max(LIMITS))]
    sent: list[TipEvent] = []
    for user, number in itertools.product(users, range(EVENTS // 2)):
        at_ms = here.now_ms - 1_000 - number * 3_600_000
        sent.append(served(user, at_ms))
        sent.append(feedback(user, at_ms, "completed" if number % 3 else "dismissed", dwell_ms=number))
    async with open_service(here.settings, door="bench") as one, open_service(there.settings, door="bench") as other:
        for service in (one, other):
            for start in range(0, len(sent), 1_000):
                await service.ingestor.ingest(sent[start : start + 1_000])
    server.execute("VACUUM (ANALYZE)", "bench")  # as autovacuum will
    async with open_engine(here.settings) as sqlite, open_engine(there.settings) as postgres:
        sources = sqlite.source(REGISTRY), postgres.source(REGISTRY)
        for count, limit in LIMITS.items():
            asked = [ComputeRow(user, REGISTRY.full_mask) for user in users[:count]]

            async def reference(asked: list[ComputeRow] = asked) -> None:
                await sources[0].compute(here.now_ms, asked)

            async def ours(asked: list[ComputeRow] = asked) -> None:
                await sources[1].compute(here.now_ms, asked)

            name = f"profile on PostgreSQL, {count} user{'s' if count > 1 else ''} with {EVENTS} events, per user"
            yield await compare(
                name, "SQLite", reference, ours, repeat=max(2, 100 // count), rounds=ROUNDS, units=count, at_most=limit
            )
