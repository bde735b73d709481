"""Durable ingest, against plain sqlite3 that inserts the same rows; and a commit, against a page written to a file."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import closing

import uvloop

from app.bootstrap.service import open_service
from app.events.ports import Admitted
from app.events.validation import admit
from app.features.clock import EPOCH, MILLISECOND
from app.features.events import TipEvent, TipServed
from app.stores.sql.database import insert_statement
from app.stores.sql.event_log import COLUMNS
from app.stores.sqlite.connection import connect
from app.stores.sqlite.database import SqliteDatabase
from tests.bench.comparison import Comparison, compare
from tests.bench.environment import Environment

BATCH = 500
PAGE, PAGES = 4_096, 1_000
UPSERT = """
INSERT INTO service (name, value) VALUES ('commits', 0) ON CONFLICT (name) DO UPDATE SET value = value + 1
"""


def measure(environment: Environment) -> Iterator[Comparison]:
    """Seconds per event, with admission, commit and the deletion of keys; and seconds per commit."""
    yield uvloop.run(_ingest(environment))
    yield uvloop.run(_commit(environment))


async def _ingest(environment: Environment) -> Comparison:
    copy = environment.settings.require_file().with_name("reference.db")
    shutil.copyfile(environment.settings.require_file(), copy)
    now_ms = environment.now_ms
    numbers = itertools.count(1)
    seqs = itertools.count(1_000_000)
    with closing(connect(copy, read_only=False)) as plain:
        async with open_service(environment.settings, door="bench") as opened:

            async def reference() -> None:
                rows = [rows_of_event(next(seqs), item) for item in admit(_batch(numbers, now_ms), now_ms, 180)]
                plain.execute("BEGIN IMMEDIATE")
                plain.executemany(insert_statement("event_log", COLUMNS["event_log"], 1), [row[0] for row in rows])
                plain.executemany(insert_statement("tip_views", COLUMNS["tip_views"], 1), [row[1] for row in rows])
                plain.executemany(insert_statement("outbox", COLUMNS["outbox"], 1), [row[2] for row in rows])
                plain.execute("COMMIT")

            async def ours() -> None:
                await opened.ingestor.ingest(_batch(numbers, now_ms))

            name = f"ingest, batches of {BATCH}, durable, per event"
            return await compare(name, "sqlite3 executemany", reference, ours, repeat=10, units=BATCH, at_most=2.5)


async def _commit(environment: Environment) -> Comparison:
    """The least that a durable commit can do is to overwrite a page of a file and to wait for the disk."""
    file = os.open(environment.settings.require_file().with_name("pages"), os.O_WRONLY | os.O_CREAT)
    os.pwrite(file, bytes(PAGE * PAGES), 0)
    numbers = itertools.count(1)
    database = await SqliteDatabase.open(environment.settings.require_file(), readers=1)

    def write_page() -> None:
        os.pwrite(file, os.urandom(PAGE), next(numbers) % PAGES * PAGE)
        os.fdatasync(file)

    async def reference() -> None:
        await asyncio.to_thread(write_page)

    async def ours() -> None:
        await database.execute(UPSERT)

    try:
        for _ in range(2 * PAGES):  # so that the WAL has restarted
            await ours()
        return await compare(
            "a durable commit of one row", "pwrite and fdatasync", reference, ours, repeat=100, rounds=21
        )
    finally:
        await database.close()
        os.close(file)


def _batch(numbers: Iterator[int], now_ms: int) -> list[TipEvent]:
    return [
        TipServed(
            event_id=f"bench-{number}",
            user_id=f"user-{number % 1_000:04d}",
            tip_id="tip",
            occurred_at=EPOCH + (now_ms - 1_000) * MILLISECOND,
        )
        for number in itertools.islice(numbers, BATCH)
    ]


def rows_of_event(seq: int, item: Admitted) -> tuple[tuple[object, ...], ...]:
    event, digest, occurred_at_ms, offset_min, claimed_at_ms, received_at_ms, sent_by, _, traceparent = item
    log = (seq, event.event_id, "signals.tip.served", event.user_id, digest, occurred_at_ms, claimed_at_ms,
           received_at_ms, sent_by)  # fmt: skip
    fact = (seq, event.user_id, event.tip_id, occurred_at_ms, offset_min, received_at_ms, event.decision_id)
    return log, fact, (seq, event.user_id, received_at_ms, traceparent)
