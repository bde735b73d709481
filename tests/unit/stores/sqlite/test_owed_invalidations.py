"""Owed invalidations are seen at once by every connection, and settled by id."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from app.errors import StoreFull, StoreUnavailable
from app.stores.sql.cache_state import SqlOwedInvalidations
from app.stores.sql.registries import announce
from app.stores.sqlite.database import SqliteDatabase
from app.stores.sqlite.event_log import SqliteEventLog
from tests.support.clock import NOW_MS
from tests.support.events import admitted, served
from tests.support.registry import REGISTRY


@pytest.fixture
def owed(database: SqliteDatabase) -> SqlOwedInvalidations:
    return SqlOwedInvalidations(database)


async def test_owed_is_seen_at_once_when_this_process_owes(owed: SqlOwedInvalidations) -> None:
    assert not await owed.any_owed()
    await owed.owe(["ann"], NOW_MS)
    assert await owed.any_owed()
    (row,), _ = await owed.pending(10)
    await owed.settled([row.id])
    assert not await owed.any_owed()


async def test_owed_is_seen_at_once_when_another_connection_commits(
    database: SqliteDatabase, owed: SqlOwedInvalidations
) -> None:
    assert not await owed.any_owed()
    with closing(sqlite3.connect(database.path, isolation_level=None)) as other:
        for number in range(3):
            other.execute("BEGIN IMMEDIATE")
            other.execute("INSERT INTO owed_invalidations (user_id, owed_at_ms) VALUES ('ann', 0)")
            assert not await owed.any_owed(), number  # not committed yet
            other.execute("COMMIT")
            assert await owed.any_owed()
            other.execute("DELETE FROM owed_invalidations")
            assert not await owed.any_owed()


async def test_owed_is_seen_when_it_is_older_than_the_process(database: SqliteDatabase) -> None:
    await SqlOwedInvalidations(database).owe(["ann"], NOW_MS)
    second = await SqliteDatabase.open(database.path, readers=1)
    try:
        assert await SqlOwedInvalidations(second).any_owed()
        assert await SqlOwedInvalidations(second).any_owed()
    finally:
        await second.close()


async def test_nothing_is_owed_when_only_events_are_committed(
    event_log: SqliteEventLog, owed: SqlOwedInvalidations
) -> None:
    for _ in range(3):
        await event_log.append([[admitted(served())]])
        assert not await owed.any_owed()


async def test_newer_rows_stay_when_older_ones_are_settled(owed: SqlOwedInvalidations) -> None:
    await owed.owe({"bob", "ann"}, NOW_MS)
    rows, _ = await owed.pending(10)
    await owed.owe(["ann"], NOW_MS + 1)  # while the DELs of the first are under way
    await owed.settled([row.id for row in rows])
    assert await owed.any_owed()
    (left,), _ = await owed.pending(10)
    assert left.user_id == "ann"
    assert left.id > max(row.id for row in rows)


async def test_settled_ids_are_not_reused(owed: SqlOwedInvalidations) -> None:
    await owed.owe(["ann"], NOW_MS)
    (first,), _ = await owed.pending(10)
    await owed.settled([first.id])
    await owed.owe(["ann"], NOW_MS)
    await owed.settled([first.id])  # a second process settles the same row late
    assert await owed.any_owed()


async def test_pending_returns_the_oldest_rows_first(database: SqliteDatabase, owed: SqlOwedInvalidations) -> None:
    await announce(database, REGISTRY, NOW_MS)
    for number in range(5):
        await owed.owe([f"user-{number}"], NOW_MS)
    rows, features = await owed.pending(2)
    assert [row.user_id for row in rows] == ["user-0", "user-1"]
    assert features == set(REGISTRY.names)


async def test_query_raises_when_the_connection_is_closed(database: SqliteDatabase, owed: SqlOwedInvalidations) -> None:
    await owed.owe(["ann"], NOW_MS)
    assert await owed.any_owed()
    database.state.close()
    with pytest.raises(StoreUnavailable):
        await owed.any_owed()


async def test_announcing_needs_no_lock_when_nothing_is_new(database: SqliteDatabase) -> None:
    await announce(database, REGISTRY, NOW_MS)
    with closing(sqlite3.connect(database.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        await announce(database, REGISTRY, NOW_MS)  # otherwise it fails after `BUSY_TIMEOUT_S`


async def test_announcing_is_idempotent(database: SqliteDatabase, owed: SqlOwedInvalidations) -> None:
    for moment_ms in (NOW_MS, NOW_MS + 1):
        await announce(database, REGISTRY, moment_ms)
    _, features = await owed.pending(1)
    assert features == set(REGISTRY.names)


async def test_announcing_needs_no_room_when_nothing_is_new(
    database: SqliteDatabase, owed: SqlOwedInvalidations, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(_: object, *, of: object) -> None:
        raise StoreFull("no room")

    with monkeypatch.context() as patch:
        patch.setattr(database, "write", full)
        with pytest.raises(StoreFull):  # no process would delete its keys
            await announce(database, REGISTRY, NOW_MS)
    await announce(database, REGISTRY, NOW_MS)
    monkeypatch.setattr(database, "write", full)
    await announce(database, REGISTRY, NOW_MS + 1)
