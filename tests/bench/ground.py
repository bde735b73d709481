"""Where a measurement stands: a database, a cache and a queue of its own, gone when it is over."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import uvloop

from app.bootstrap.service import open_service
from app.cli.demo_set import generate
from app.settings import Settings
from app.stores.sqlite.migrate import migrate
from app.stores.system_clock import SystemClock
from app.stores.valkey.embedded import EmbeddedServer, cache_options, queue_options
from tests.support.registry import FEATURES

USERS = 1_000
DAYS = 60
CHUNK = 1_000
CACHE_MB = 512
SPAN_DAYS = 29
# Users :prefix-0, :prefix-1 and so on, :events each, evenly over the window: served tips and feedback in turn.
_NUMBERS = """
WITH RECURSIVE numbers (number) AS (SELECT 0 UNION ALL SELECT number + 1 FROM numbers WHERE number + 1 < :total),
made AS (
    SELECT :seq + number AS seq, :prefix || '-' || (number / :events) AS user_id, number % :events AS place,
           :now_ms - 1000 - (number % :events) * (:span_ms / :events) AS occurred_at_ms
    FROM numbers
)
"""
_BULK = (
    """INSERT INTO event_log (seq, event_id, subject, user_id, digest, occurred_at_ms, received_at_ms, consumed_at_ms)
    SELECT seq, user_id || '-' || place,
           CASE place % 2 WHEN 0 THEN 'signals.tip.served' ELSE 'signals.tip.feedback' END,
           user_id, zeroblob(16), occurred_at_ms, occurred_at_ms, occurred_at_ms
    FROM made""",
    """INSERT INTO tip_views (seq, user_id, tip_id, occurred_at_ms, utc_offset_min, received_at_ms)
    SELECT seq, user_id, 'tip-' || place / 2, occurred_at_ms, 0, occurred_at_ms FROM made WHERE place % 2 = 0""",
    """INSERT INTO tip_feedback (seq, user_id, tip_id, occurred_at_ms, utc_offset_min, received_at_ms, action, dwell_ms)
    SELECT seq, user_id, 'tip-' || place / 2, occurred_at_ms, 0, occurred_at_ms,
           CASE place % 4 WHEN 1 THEN 'completed' ELSE 'dismissed' END, place % 1000 * 10
    FROM made WHERE place % 2 = 1""",
)


class Ground(NamedTuple):
    """What a measurement is given. `users` are the demonstration set's; `bare_url` is a server for references."""

    settings: Settings
    bare_url: str
    users: list[str]
    now_ms: int


@contextmanager
def prepared() -> Iterator[Path]:
    """A database with the demonstration set, to be copied for each measurement."""
    with tempfile.TemporaryDirectory(prefix="bench-set-") as name:
        database = Path(name) / "profiles.db"
        migrate(database)
        with _servers(Path(name)) as (cache, queue, _):
            uvloop.run(_load(Settings(features=FEATURES, database=database, cache_url=cache, queue_url=queue)))
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        yield database


@contextmanager
def ground(template: Path) -> Iterator[Ground]:
    """Servers of its own, and a copy of the database."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        database = Path(name) / "profiles.db"
        shutil.copyfile(template, database)
        with _servers(Path(name)) as (cache, queue, bare):
            users = [f"user-{number:04d}" for number in range(1, USERS + 1)]
            settings = Settings(features=FEATURES, database=database, cache_url=cache, queue_url=queue)
            yield Ground(settings, bare, users, SystemClock().now_ms())


def add_users(database: Path, prefix: str, users: int, events: int, now_ms: int) -> list[str]:
    """Store users with so many events each in the window, by one statement a table; their ids."""
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        (seq,) = connection.execute("SELECT COALESCE(MAX(seq), 0) + 1 FROM event_log").fetchone()
        values = {
            "seq": seq,
            "prefix": prefix,
            "events": events,
            "total": users * events,
            "now_ms": now_ms,
            "span_ms": SPAN_DAYS * 86_400_000,
        }
        with connection:
            for statement in _BULK:
                table, _, select = statement.partition("\n")
                connection.execute(f"{_NUMBERS} {table}\n{select}", values)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return [f"{prefix}-{number}" for number in range(users)]


@contextmanager
def _servers(directory: Path) -> Iterator[tuple[str, str, str]]:
    cache = EmbeddedServer(directory / "cache", directory / "c.sock", cache_options(CACHE_MB))
    queue = EmbeddedServer(directory / "queue", directory / "q.sock", queue_options())
    bare = EmbeddedServer(directory / "bare", directory / "b.sock", queue_options())
    try:
        for server in (cache, queue, bare):
            server.start()
        yield cache.url, queue.url, bare.url
    finally:
        for server in (cache, queue, bare):
            server.stop()


async def _load(settings: Settings) -> None:
    async with open_service(settings, door="bench") as service:
        made = [event for _, event in generate(users=USERS, days=DAYS, seed=1, now_ms=SystemClock().now_ms())]
        for start in range(0, len(made), CHUNK):
            await service.ingestor.ingest(made[start : start + CHUNK])
