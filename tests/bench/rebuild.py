"""Rebuilding, against the same SQL in chunks through plain sqlite3 that keeps nothing."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

from app.assembly import open_service
from app.features.definitions import REGISTRY
from app.settings import Settings
from app.stores.sqlite.connection import connect
from app.stores.sqlite.profile_statement import build
from tests.bench.cold import events_of
from tests.bench.timing import Comparison, compare

CHUNK = 100
EVENTS = 300
BATCH = 1_000


async def measure(settings: Settings, now_ms: int, users: int) -> AsyncIterator[Comparison]:
    """Seconds per user, tokens and fills included."""
    connection = connect(settings.database, read_only=True)
    statement = build(REGISTRY)
    names = [f"rebuilt-{number}" for number in range(users)]
    pages = [names[start : start + CHUNK] for start in range(0, users, CHUNK)]
    try:
        async with open_service(settings, door="bench") as service:
            for page in pages:
                events = [event for user in page for event in events_of(user, EVENTS, now_ms)]
                for start in range(0, len(events), BATCH):
                    await service.ingestor.ingest(events[start : start + BATCH])

            async def reference() -> None:
                for page in pages:
                    asked = json.dumps([[user, REGISTRY.full_mask, None, None] for user in page])
                    connection.execute(statement, {"clock_ms": now_ms, "asked": asked}).fetchall()

            async def ours() -> None:
                for page in pages:
                    await service.rebuilder.rebuild(page, REGISTRY.full_mask)

            name = f"rebuild, {users:,} users with {EVENTS} events"
            yield await compare(name, "the same SQL, sqlite3", reference, ours, repeat=1, units=users, at_most=2.5)
    finally:
        connection.close()
