"""A rebuild, against the same SQL in pages by plain sqlite3 without a cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing

import uvloop

from app.bootstrap.service import open_service
from app.profiles.rebuild import CHUNK
from app.stores.sql.profile_statement import build
from app.stores.sqlite.connection import connect
from app.stores.sqlite.features import DIALECT
from tests.bench.comparison import Comparison, compare
from tests.bench.environment import Environment
from tests.support.bulk_users import add_users
from tests.support.registry import REGISTRY

USERS, EVENTS = 10_000, 300
ROUNDS = 3


def measure(environment: Environment) -> Iterator[Comparison]:
    """Seconds per user, leases and fills included."""
    yield uvloop.run(_measure(environment))


async def _measure(environment: Environment) -> Comparison:
    users = add_users(environment.settings.require_file(), "rebuilt", USERS, EVENTS, environment.now_ms)
    statement = build(REGISTRY, DIALECT).live
    pages = [users[start : start + CHUNK] for start in range(0, USERS, CHUNK)]
    with closing(connect(environment.settings.require_file(), read_only=True)) as connection:
        async with open_service(environment.settings, door="bench") as service:

            async def reference() -> None:
                for page in pages:
                    asked = json.dumps([[user, REGISTRY.full_mask, None, None] for user in page])
                    connection.execute(statement, {"clock_ms": environment.now_ms, "asked": asked}).fetchall()

            async def ours() -> None:
                for page in pages:
                    await service.rebuilder.rebuild(page, REGISTRY.full_mask)

            name = f"rebuild, {USERS:,} users with {EVENTS} events, per user"
            against = "the same SQL, sqlite3"
            return await compare(name, against, reference, ours, repeat=1, units=USERS, at_most=2.5, rounds=ROUNDS)
