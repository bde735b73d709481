"""Durable ingest, against plain sqlite3 that inserts the same rows; and over batches and clients."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from statistics import median

import msgspec
import uvloop

from app.bootstrap.service import open_service
from app.events.admission import Admission
from app.events.ports import Admitted
from app.features.clock import EPOCH, MILLISECOND
from app.features.events import TipEvent, TipServed
from app.stores.sqlite.connection import connect
from app.stores.sqlite.event_log import INSERT_LOG, INSERT_VIEW
from tests.bench.ground import Ground
from tests.bench.load import post, wrk
from tests.bench.serving import KEY, service
from tests.bench.timing import Comparison, Curve, Result, compare

BATCH = 500
SIZES = (1, 10, 100, 500)
CLIENTS = (1, 8, 32)
ROUNDS = 2
SECONDS = 2
# More than are sent in a round: an event sent twice would only be recognised, not stored.
PREPARED = {1: 12_000, 10: 5_000, 100: 1_000, 500: 250}


def measure(ground: Ground) -> Iterator[Result]:
    """Seconds per event in this process, admission, commit and deletion of the keys included; then over HTTP."""
    yield uvloop.run(_beside_sqlite(ground))
    numbers = itertools.count(100_000_000)
    series: dict[str, list[float]] = {}
    with service(ground.settings) as port:
        for size, clients in itertools.product(SIZES, CLIENTS):
            rates = [_over_http(port, size, clients, numbers, ground.now_ms) for _ in range(ROUNDS)]
            series.setdefault(f"{clients} client{'s' if clients > 1 else ''}", []).append(median(rates))
    yield Curve("ingest over batch size, durable, over HTTP", "events in a request", "events per second", SIZES, series)


def _over_http(port: int, size: int, clients: int, numbers: Iterator[int], now_ms: int) -> float:
    requests = [
        post("/events", msgspec.json.encode(list(_batch(numbers, now_ms, size))), KEY) for _ in range(PREPARED[size])
    ]
    load = wrk(port, requests, clients, SECONDS)
    if load.rate * SECONDS > len(requests):
        raise AssertionError(f"{len(requests)} requests of {size} were not enough: {load.rate:.0f} a second")
    return load.rate * size


async def _beside_sqlite(ground: Ground) -> Comparison:
    spare = ground.settings.database.with_name("reference.db")
    shutil.copyfile(ground.settings.database, spare)
    now_ms = ground.now_ms
    plain = connect(spare, read_only=False)
    numbers = itertools.count(1)
    seqs = itertools.count(1_000_000)
    try:
        async with open_service(ground.settings, door="bench") as opened:

            async def reference() -> None:
                rows = [_row(next(seqs), item) for item in Admission(180).admit(list(_batch(numbers, now_ms)), now_ms)]
                plain.execute("BEGIN IMMEDIATE")
                plain.executemany(INSERT_LOG, [row[0] for row in rows])
                plain.executemany(INSERT_VIEW, [row[1] for row in rows])
                plain.execute("COMMIT")

            async def ours() -> None:
                await opened.ingestor.ingest(list(_batch(numbers, now_ms)))

            name = f"ingest, batches of {BATCH}, durable, per event"
            return await compare(name, "sqlite3 executemany", reference, ours, repeat=10, units=BATCH, at_most=2.5)
    finally:
        plain.close()


def _batch(numbers: Iterator[int], now_ms: int, size: int = BATCH) -> Iterator[TipEvent]:
    for number in itertools.islice(numbers, size):
        yield TipServed(
            event_id=f"bench-{number}",
            user_id=f"user-{number % 1_000:04d}",
            tip_id="tip",
            occurred_at=EPOCH + (now_ms - 1_000) * MILLISECOND,
        )


def _row(seq: int, item: Admitted) -> tuple[tuple[object, ...], tuple[object, ...]]:
    event, digest, occurred_at_ms, offset_min, claimed_at_ms, received_at_ms, sent_by, _ = item
    log = (seq, event.event_id, "signals.tip.served", event.user_id, digest, occurred_at_ms, claimed_at_ms,
           received_at_ms, None, sent_by)  # fmt: skip
    fact = (seq, event.user_id, event.tip_id, occurred_at_ms, offset_min, received_at_ms, event.decision_id)
    return log, fact
