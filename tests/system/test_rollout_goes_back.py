"""A worker makes the look that is due, and rolls back a challenger with slow answers without a request."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from app.bandit.model.inputs import SPEC_V2
from app.bandit.rollout.stages import Target
from app.settings import Settings
from app.stores.sql.access import SqlAuditTrail
from app.stores.sql.rollout import SqlRollout
from app.stores.sqlite.database import SqliteDatabase
from app.stores.valkey.embedded import EmbeddedServer
from app.worker import work
from tests.support.audit import newest_entries
from tests.support.decisions import HOUR_MS, rows_of, some, write
from tests.support.registry import FEATURES
from tests.support.waiting import eventually_async


async def test_worker_rolls_back_by_itself(
    database: SqliteDatabase, database_path: Path, valkey: EmbeddedServer, own_valkey: EmbeddedServer
) -> None:
    now_ms, book = time.time_ns() // 1_000_000, SqlRollout(database, SPEC_V2.hash)
    await write(database, rows_of(some(4_000), made_ms=now_ms - 100 * HOUR_MS))
    slow = [{**row, "elapsed_us": 800_000} for row in rows_of(some(1_000, share=1.0), made_ms=now_ms - 60_000)]
    await write(database, slow)
    await book.move(await book.state(), Target("ramp", 0.05), "it looked good", "ann", now_ms - 120_000)

    async def went_back() -> bool:
        if (await book.state()).stage != "rolled back":
            return False
        (entry,) = await newest_entries(SqlAuditTrail(database), 10)
        return entry.outcome != "begun"  # it is stored after the move

    settings = Settings(
        features=FEATURES, database=database_path, cache_url=valkey.url, queue_url=own_valkey.url, worker_metrics_port=0
    )
    stop = asyncio.Event()
    working = asyncio.create_task(work(settings, stop))
    try:
        await eventually_async(went_back)
    finally:
        stop.set()
        await working
    (look,) = await book.looks()
    assert (look.number, look.estimates.n) == (1, 5_000)
    (entry,) = await newest_entries(SqlAuditTrail(database), 10)
    assert (entry.actor, entry.action) == ("the worker", "roll back roll-out")
    assert "takes over 800 ms" in entry.outcome
