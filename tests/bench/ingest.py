"""Durable ingest in batches of 500, against plain sqlite3 that inserts the same rows with the same indexes."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from app.assembly import open_service
from app.events.admission import Admission
from app.events.ports import Admitted
from app.features.clock import EPOCH, MILLISECOND
from app.features.events import TipEvent, TipServed
from app.settings import Settings
from app.stores.sqlite.connection import connect
from app.stores.sqlite.event_log import INSERT_LOG, INSERT_VIEW
from tests.bench.timing import Comparison, compare

BATCH = 500


async def measure(reference_database: Path, settings: Settings, now_ms: int) -> AsyncIterator[Comparison]:
    """Seconds per event, admission, commit and deletion of the keys included."""
    plain = connect(reference_database, read_only=False)
    numbers = itertools.count(1)
    seqs = itertools.count(1_000_000)
    try:
        async with open_service(settings, door="bench") as service:

            async def reference() -> None:
                rows = [_row(next(seqs), item) for item in Admission(180).admit(list(_batch(numbers, now_ms)), now_ms)]
                plain.execute("BEGIN IMMEDIATE")
                plain.executemany(INSERT_LOG, [row[0] for row in rows])
                plain.executemany(INSERT_VIEW, [row[1] for row in rows])
                plain.execute("COMMIT")

            async def ours() -> None:
                await service.ingestor.ingest(list(_batch(numbers, now_ms)))

            name = f"ingest, batches of {BATCH}, durable"
            yield await compare(name, "sqlite3 executemany", reference, ours, repeat=10, units=BATCH, at_most=2.5)
    finally:
        plain.close()


def _batch(numbers: Iterator[int], now_ms: int) -> Iterator[TipEvent]:
    for number in itertools.islice(numbers, BATCH):
        yield TipServed(
            event_id=f"bench-{number}",
            user_id=f"user-{number % 1_000:04d}",
            tip_id="tip",
            occurred_at=EPOCH + (now_ms - 1_000) * MILLISECOND,
        )


def _row(seq: int, item: Admitted) -> tuple[tuple[object, ...], tuple[object, ...]]:
    event, digest, occurred_at_ms, offset_min, claimed_at_ms, received_at_ms = item
    log = (seq, event.event_id, "signals.tip.served", event.user_id, digest, occurred_at_ms, claimed_at_ms,
           received_at_ms, None)  # fmt: skip
    fact = (seq, event.user_id, event.tip_id, occurred_at_ms, offset_min, received_at_ms, event.decision_id)
    return log, fact
