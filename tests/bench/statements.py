"""The profile statement, against set-based SQL for the same features, by plain sqlite3 in one thread."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import uvloop

from app.stores.sql.profile_statement import build
from app.stores.sqlite.connection import connect
from app.stores.sqlite.features import DIALECT
from tests.bench.comparison import Comparison, compare
from tests.bench.environment import Environment
from tests.support.registry import REGISTRY

_SET_BASED = """
WITH views AS NOT MATERIALIZED (
    SELECT user_id, occurred_at_ms FROM tip_views
    WHERE user_id IN (SELECT value FROM json_each(:users))
      AND occurred_at_ms > :now - 2592000000 AND occurred_at_ms <= :now),
feedback AS NOT MATERIALIZED (
    SELECT user_id, occurred_at_ms, ((occurred_at_ms + utc_offset_min * 60000) / 3600000) % 24 AS local_hour,
           action, dwell_ms
    FROM tip_feedback WHERE user_id IN (SELECT value FROM json_each(:users))
      AND occurred_at_ms > :now - 2592000000 AND occurred_at_ms <= :now)
"""


def measure(environment: Environment) -> Iterator[Comparison]:
    """Seconds per user, for 1, 10, 100 and 256 users."""
    yield from uvloop.run(_all(environment))


async def _all(environment: Environment) -> list[Comparison]:
    return [result async for result in _measure(environment.settings.require_file(), environment.now_ms)]


async def _measure(database: Path, now_ms: int) -> AsyncIterator[Comparison]:
    connection = connect(database, read_only=True)
    try:
        users = [user for (user,) in connection.execute("SELECT DISTINCT user_id FROM tip_views LIMIT 256")]
        arms = [f"SELECT '{entry.name}', user_id, value FROM ({entry.compute})" for entry in REGISTRY]
        set_based = _SET_BASED + " UNION ALL ".join(arms)
        correlated = build(REGISTRY, DIALECT).past
        for count in (1, 10, 100, 256):
            chosen = users[:count]
            _same(connection, set_based, correlated, chosen, now_ms)

            async def reference(chosen: list[str] = chosen) -> None:
                connection.execute(set_based, {"users": json.dumps(chosen), "now": now_ms}).fetchall()

            async def ours(chosen: list[str] = chosen) -> None:
                connection.execute(correlated, _asked(chosen, now_ms)).fetchall()

            name = f"statement, {count} user{'s' if count > 1 else ''}"
            yield await compare(name, "set-based UNION ALL", reference, ours, repeat=max(2, 200 // count), units=count)
    finally:
        connection.close()


def _asked(users: list[str], now_ms: int) -> dict[str, object]:
    return {"clock_ms": now_ms, "asked": json.dumps([[user, REGISTRY.full_mask, now_ms, None] for user in users])}


def _same(connection: sqlite3.Connection, set_based: str, correlated: str, users: list[str], now_ms: int) -> None:
    """Raise if the values differ, since the comparison would mean nothing."""
    expected: dict[tuple[str, str], object] = {}
    for name, user, value in connection.execute(set_based, {"users": json.dumps(users), "now": now_ms}):
        expected[user, name] = value
    for user, row in zip(users, connection.execute(correlated, _asked(users, now_ms)), strict=True):
        for name, value in zip(REGISTRY.names, row[1:], strict=True):
            if expected.get((user, name)) != value:
                raise AssertionError(f"{name} of {user}: {value} here, {expected.get((user, name))} set-based")
