"""PostgreSQL on the same machine: ingest against the floors of its design, and profiles against SQLite.

The server is durable. It starts from Debian's package, as in the tests.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator

import uvloop

from app.bootstrap.engines import open_engine
from app.bootstrap.service import open_service
from app.features.events import TipEvent
from app.profiles.ports import ComputeRow
from tests.bench.comparison import Comparison, compare
from tests.bench.environment import Environment, on_postgres
from tests.support.events import feedback, served
from tests.support.postgres import PostgresServer
from tests.support.registry import REGISTRY

BATCH = 500
ROUNDS = 9
FLOORS_S = {BATCH: 60e-6, 1: 1.5e-3}  # for each event of a request with this number of events
LIMITS = {1: 3.0, 100: 1.5}  # for a read of this number of users
EVENTS = 300


def measure(environment: Environment) -> Iterator[Comparison]:
    """Seconds per event, and seconds per user."""
    with on_postgres(environment) as (there, server):
        yield from uvloop.run(_all(environment, there, server))


async def _all(here: Environment, there: Environment, server: PostgresServer) -> list[Comparison]:
    return [*[found async for found in _ingest(there)], *[found async for found in _profiles(here, there, server)]]


async def _ingest(there: Environment) -> AsyncIterator[Comparison]:
    numbers = itertools.count()
    async with open_service(there.settings, door="bench") as service:
        for size, floor_s in FLOORS_S.items():

            async def ours(size: int = size) -> None:
                events = [
                    served(f"user-{number % 1_000}", there.now_ms - 1_000, event_id=f"bench-{number}")
                    for number in itertools.islice(numbers, size)
                ]
                await service.ingestor.ingest(events)

            async def nothing() -> None:
                return

            name = f"ingest on PostgreSQL, {size} event{'s' if size > 1 else ''} a request, per event"
            found = await compare(name, "", nothing, ours, repeat=20, rounds=ROUNDS, units=size)
            yield Comparison(name, "its floor", floor_s, found.ours, 1.0)


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
