"""Rebuilding, against the same SQL in chunks through plain sqlite3 that keeps nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator

import uvloop

from app.bootstrap.service import open_service
from app.profiles.rebuild.runs import CHUNK
from app.stores.sqlite.connection import connect
from app.stores.sqlite.profile_statement import build
from tests.bench.ground import Ground, add_users
from tests.bench.timing import Comparison, Curve, Result, compare
from tests.support.registry import REGISTRY

COUNTS = (1_000, 3_000, 10_000)
EVENTS = 300
ROUNDS = 3


def measure(ground: Ground) -> Iterator[Result]:
    """Seconds per user, tokens and fills included; users per second over the users rebuilt."""
    users = add_users(ground.settings.database, "rebuilt", max(COUNTS), EVENTS, ground.now_ms)
    results = [uvloop.run(_measure(ground, users[:count])) for count in COUNTS]
    yield results[-1]
    series = {
        "the same SQL, sqlite3": [1 / result.reference for result in results],
        "profiles": [1 / result.ours for result in results],
    }
    yield Curve(f"rebuild, {EVENTS} events each", "users", "users per second", COUNTS, series)


async def _measure(ground: Ground, users: list[str]) -> Comparison:
    connection = connect(ground.settings.database, read_only=True)
    statement = build(REGISTRY)
    pages = [users[start : start + CHUNK] for start in range(0, len(users), CHUNK)]
    try:
        async with open_service(ground.settings, door="bench") as service:

            async def reference() -> None:
                for page in pages:
                    asked = json.dumps([[user, REGISTRY.full_mask, None, None] for user in page])
                    connection.execute(statement, {"clock_ms": ground.now_ms, "asked": asked}).fetchall()

            async def ours() -> None:
                for page in pages:
                    await service.rebuilder.rebuild(page, REGISTRY.full_mask)

            name = f"rebuild, {len(users):,} users with {EVENTS} events, per user"
            against = "the same SQL, sqlite3"
            return await compare(name, against, reference, ours, repeat=1, units=len(users), at_most=2.5, rounds=ROUNDS)
    finally:
        connection.close()
