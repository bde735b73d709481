"""The source: rows in the requested order, one snapshot, and faults that affect only their own cells."""

from __future__ import annotations

import asyncio
import sqlite3
from time import monotonic
from typing import Any

import pytest

from app.errors import StoreUnavailable
from app.features.clock import DAY_MS
from app.features.events import TipEvent
from app.features.registry import Registry
from app.profiles.ports import END_OF_TIME_MS, ComputeRow, Snapshot
from app.stores.sql import source as module
from app.stores.sqlite.database import SqliteDatabase
from app.stores.sqlite.event_log import SqliteEventLog
from app.stores.sqlite.features import SqliteSource
from tests.support.clock import NOW_MS
from tests.support.entries import entry
from tests.support.events import admitted, feedback, served
from tests.support.pause_points import turn
from tests.support.registry import REGISTRY
from tests.support.waiting import PATIENCE_S

OVERFLOW = entry(
    name="overflow",
    compute="SELECT user_id, SUM(9223372036854775807) AS value FROM feedback GROUP BY user_id",
)
TWO_ROWS = entry(name="two_rows", compute="SELECT user_id, local_hour AS value FROM feedback")
SOUND = entry(name="sound")
FAULTY = Registry([SOUND, OVERFLOW, TWO_ROWS])


async def test_rows_are_in_the_requested_order(database: SqliteDatabase, event_log: SqliteEventLog) -> None:
    await event_log.append([[admitted(served("ann", NOW_MS - ago)) for ago in (0, 10, 20)]])
    volume = REGISTRY.mask(["tip_volume_30d"])
    moments = [NOW_MS - 10, NOW_MS, NOW_MS - 21, NOW_MS, NOW_MS - 20]
    asked = [ComputeRow("ann", volume, moment) for moment in moments] + [ComputeRow("bob", volume, NOW_MS)]
    snapshot = await SqliteSource(database, REGISTRY).compute(NOW_MS, asked)
    assert [row[4] for row in snapshot.rows] == [2, 3, None, 3, 1, None]
    assert {row[0] for row in snapshot.rows} == {None}  # not requested, so not computed
    assert list(snapshot.versions) == [0] * 6  # no past moment needs it
    assert list(snapshot.leaves_ms) == [()] * 6  # nothing expires in the past


@pytest.mark.parametrize("user_id", ["123", "a'b", 'a"b', "…", "[]", "null", "😀", "a\\u0000b", "ann%"])
async def test_user_id_may_contain_any_character(
    database: SqliteDatabase, event_log: SqliteEventLog, user_id: str
) -> None:
    await event_log.append([[admitted(served(user_id)), admitted(served("other"))]])
    snapshot = await SqliteSource(database, Registry([SOUND])).compute(NOW_MS, [ComputeRow(user_id, 1)])
    assert snapshot.rows == [(1,)]


async def test_version_is_the_newest_event_of_the_user(database: SqliteDatabase, event_log: SqliteEventLog) -> None:
    source, users = SqliteSource(database, REGISTRY), [ComputeRow(user_id, 1) for user_id in ("ann", "bob", "cid")]
    assert list((await source.compute(NOW_MS, users)).versions) == [0, 0, 0]
    await event_log.append([[admitted(event) for event in (feedback("ann"), served("bob"), served("ann"))]])
    assert list((await source.compute(NOW_MS, users)).versions) == [3, 2, 0]
    await event_log.prune(NOW_MS + 1, 10)
    await event_log.append([[admitted(served("cid"))]])
    assert list((await source.compute(NOW_MS, users)).versions) == [0, 0, 4]  # no number is used again


async def test_oldest_event_of_a_window_leaves_it_first(database: SqliteDatabase, event_log: SqliteEventLog) -> None:
    window_ms = 30 * DAY_MS
    views = [NOW_MS, NOW_MS - window_ms + 1, NOW_MS - window_ms, NOW_MS - window_ms - 1]
    stored: list[TipEvent] = [*(served("ann", at_ms) for at_ms in views), feedback("ann", NOW_MS - 7)]
    await event_log.append([[admitted(event) for event in stored]])
    asked = [ComputeRow("ann", REGISTRY.full_mask), ComputeRow("bob", REGISTRY.full_mask)]
    snapshot = await SqliteSource(database, REGISTRY).compute(NOW_MS, asked)
    of_feedback = NOW_MS - 7 + window_ms
    assert list(snapshot.leaves_ms[0]) == [of_feedback] * 4 + [NOW_MS + 1]
    assert list(snapshot.leaves_ms[1]) == [END_OF_TIME_MS] * 5


async def test_version_repeats_a_live_computation(database: SqliteDatabase, event_log: SqliteEventLog) -> None:
    ahead = NOW_MS + 500  # by the clock of another process
    stored: list[TipEvent] = [served("ann"), served("bob"), served("ann", ahead), served("ann")]
    await event_log.append([[admitted(event) for event in stored]])
    volume = REGISTRY.mask(["tip_volume_30d"])
    asked = [ComputeRow("ann", volume, NOW_MS, None, version) for version in (0, 1, 2, 3, 4)]
    snapshot = await SqliteSource(database, REGISTRY).compute(NOW_MS, asked)
    assert [row[4] for row in snapshot.rows] == [None, 1, 1, 2, 3]


async def test_only_one_cell_fails_when_the_sql_fails_for_one_user(
    database: SqliteDatabase, event_log: SqliteEventLog
) -> None:
    events: list[TipEvent] = [feedback("ann"), feedback("bob"), feedback("bob"), served("bob"), served("ann")]
    await event_log.append([[admitted(event) for event in events]])
    asked = [ComputeRow(user_id, FAULTY.full_mask) for user_id in ("ann", "bob", "cid")]
    snapshot = await SqliteSource(database, FAULTY).compute(NOW_MS, asked)
    assert [list(row) for row in snapshot.rows] == [[1, 9223372036854775807, 12], [1, None, b""], [None] * 3]
    assert list(snapshot.errors) == [(1, 1)]
    assert "integer overflow" in snapshot.errors[1, 1]
    assert list(snapshot.versions) == [5, 4, 0]


async def test_sql_reads_only_the_requested_user_when_it_does_not_group(
    database: SqliteDatabase, event_log: SqliteEventLog
) -> None:
    registry = Registry(
        [
            entry(name="all_views", compute="SELECT user_id, COUNT(*) AS value FROM views"),
            entry(
                name="shadowed",
                compute="WITH tip_views AS (SELECT * FROM views) SELECT user_id, COUNT(*) AS value FROM tip_views",
            ),
        ]
    )
    stored: list[TipEvent] = [served("ann"), served("bob"), served("bob"), served("bob", NOW_MS + 1)]
    await event_log.append([[admitted(event) for event in stored]])
    asked = [ComputeRow(user_id, 3, NOW_MS) for user_id in ("ann", "bob", "cid")]
    snapshot = await SqliteSource(database, registry).compute(NOW_MS, asked)
    assert [list(row) for row in snapshot.rows] == [[1, 1], [2, 2], [0, 0]]


ENDLESS = entry(
    name="endless",
    compute="""
        WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)
        SELECT user_id, (SELECT COUNT(*) FROM n) AS value FROM views GROUP BY user_id
    """,
)
SLOW = Registry([SOUND, ENDLESS, entry(name="other", compute="SELECT user_id, COUNT(*) AS value FROM feedback")])
TIMEOUT_S = 0.2


@pytest.fixture
async def slow(database: SqliteDatabase, event_log: SqliteEventLog) -> SqliteSource:
    """A source with a feature that never ends for ann and bob, and is quick for cid without views."""
    events: list[TipEvent] = [served("ann"), served("bob"), feedback("ann"), feedback("cid")]
    await event_log.append([[admitted(event) for event in events]])
    return SqliteSource(database, SLOW, timeout_s=TIMEOUT_S)


@pytest.mark.slow
async def test_slow_feature_leaves_the_others_correct(slow: SqliteSource) -> None:
    asked = [ComputeRow(user_id, SLOW.full_mask) for user_id in ("ann", "bob", "cid")]
    snapshot = await slow.compute(NOW_MS, asked)
    assert [list(row) for row in snapshot.rows] == [[1, None, 1], [1, None, 0], [None, None, 1]]
    assert set(snapshot.errors) == {(0, 1), (1, 1), (2, 1)}  # not tried again after the first user
    assert snapshot.errors[0, 1] == "the SQL took longer than 200 ms for one user"
    assert (snapshot.overdue, list(snapshot.versions)) == (1 << 1, [3, 2, 4])


@pytest.mark.slow
async def test_users_of_a_statement_share_the_deadline_of_a_feature(
    database: SqliteDatabase, event_log: SqliteEventLog
) -> None:
    # Some 30 ms for each user.
    laborious = entry(
        name="laborious",
        compute="""
            SELECT user_id, MAX((
                WITH RECURSIVE n (i) AS (SELECT local_hour UNION ALL SELECT i + 1 FROM n WHERE i < 300000)
                SELECT MAX(i) FROM n
            )) AS value
            FROM views GROUP BY user_id
        """,
    )
    users = [f"user-{number:02}" for number in range(60)]
    await event_log.append([[admitted(served(user_id)) for user_id in users]])
    source = SqliteSource(database, Registry([SOUND, laborious]), timeout_s=TIMEOUT_S)
    snapshot = await source.compute(NOW_MS, [ComputeRow(user_id, 0b11) for user_id in users])
    assert [row[0] for row in snapshot.rows] == [1] * 60
    assert snapshot.rows[59][1] is None
    assert snapshot.errors[59, 1].startswith("the SQL took longer than 200 ms for ")
    assert snapshot.overdue == 0b10


@pytest.mark.slow
async def test_slow_feature_delays_no_statement_without_it(slow: SqliteSource) -> None:
    await slow.compute(NOW_MS, [ComputeRow("ann", SLOW.full_mask)])
    started = monotonic()
    others = SLOW.mask(["sound", "other"])
    for _ in range(20):
        assert list((await slow.compute(NOW_MS, [ComputeRow("ann", others)])).rows[0]) == [1, None, 1]
    assert monotonic() - started < 20 * TIMEOUT_S, "each ran it until its timeout"


async def test_attempt_needs_no_idle_reader_and_ends_separate_computing(
    database: SqliteDatabase, event_log: SqliteEventLog
) -> None:
    await event_log.append([[admitted(feedback("ann")), admitted(feedback("ann"))]])
    source = SqliteSource(database, FAULTY, width=1)
    overflow = FAULTY.mask(["overflow"])
    assert (await source.compute(NOW_MS, [ComputeRow("ann", overflow)])).errors
    async with database.readers.one(), database.readers.one(), database.readers.one():  # no reader is idle
        assert (await source.attempt(NOW_MS, [ComputeRow("ann", overflow)])).errors
        assert not (await source.attempt(NOW_MS, [ComputeRow("bob", overflow)])).errors
    assert (await source.compute(NOW_MS, [ComputeRow("bob", FAULTY.full_mask)])).errors == {}


async def test_snapshot_is_one_when_features_are_computed_separately(
    database: SqliteDatabase, event_log: SqliteEventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    await event_log.append([[admitted(feedback("ann")), admitted(feedback("ann")), admitted(served("ann"))]])
    source, run = SqliteSource(database, FAULTY), SqliteSource._run
    statements = 0

    async def run_and_store(self: SqliteSource, *arguments: Any) -> Snapshot:
        nonlocal statements
        statements += 1
        if statements == 3:  # the first has failed, the second began the snapshot
            await event_log.append([[admitted(served("ann"))]])
        return await run(self, *arguments)

    monkeypatch.setattr(SqliteSource, "_run", run_and_store)
    snapshot = await source.compute(NOW_MS, [ComputeRow("ann", FAULTY.full_mask)])
    assert (snapshot.versions[0], snapshot.rows[0][0]) == (3, 1)


async def test_long_statement_is_interrupted_when_the_process_stops(
    database: SqliteDatabase, event_log: SqliteEventLog
) -> None:
    await event_log.append([[admitted(served("ann"))]])
    source = SqliteSource(database, Registry([ENDLESS]), timeout_s=600)
    computing = asyncio.get_running_loop().create_task(source.compute(NOW_MS, [ComputeRow("ann", 1)]))
    await turn()
    database.readers.interrupt()
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(StoreUnavailable, match="interrupted"):
            await computing


@pytest.mark.parametrize("separate", [False, True])
async def test_statement_is_interrupted_and_its_reader_usable_when_the_caller_is_cancelled(
    database: SqliteDatabase, event_log: SqliteEventLog, *, separate: bool
) -> None:
    await event_log.append([[admitted(event) for event in (served("ann"), feedback("bob"), feedback("bob"))]])
    source = SqliteSource(database, Registry([SOUND, ENDLESS, OVERFLOW]), width=1, timeout_s=600)
    if separate:  # in a transaction, which must end
        assert (await source.compute(NOW_MS, [ComputeRow("bob", 0b100)])).errors
    async with database.readers.one(), database.readers.one():  # the only other readers
        for _ in range(3):
            computing = asyncio.create_task(source.compute(NOW_MS, [ComputeRow("ann", 0b111)]))
            await turn(0.02)
            computing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await computing
        await event_log.append([[admitted(served("cid"))]])
        async with asyncio.timeout(PATIENCE_S):
            snapshot = await source.compute(NOW_MS, [ComputeRow("ann", 0b001)])
        assert (list(snapshot.rows[0]), snapshot.versions[0]) == ([1, None, None], 1)


async def test_transaction_ends_whenever_the_caller_is_cancelled(
    database: SqliteDatabase, event_log: SqliteEventLog
) -> None:
    await event_log.append([[admitted(event) for event in (served("ann"), feedback("bob"), feedback("bob"))]])
    source = SqliteSource(database, FAULTY, width=1)
    everything = [ComputeRow("bob", FAULTY.full_mask)]
    await source.compute(NOW_MS, everything)  # from now on overflow is computed separately, in a transaction
    for steps in range(12):
        computing = asyncio.create_task(source.compute(NOW_MS, everything))
        for _ in range(steps):
            await asyncio.sleep(0)
        computing.cancel()
        await asyncio.gather(computing, return_exceptions=True)
        async with database.readers.one() as one, database.readers.one() as two, database.readers.one() as three:
            for reader in (one, two, three):
                assert not await reader.run(lambda connection: connection.in_transaction)


async def test_slice_contains_as_many_rows_as_their_events_allow(
    database: SqliteDatabase, event_log: SqliteEventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLICE_EVENTS", 1_000)
    monkeypatch.setattr(module, "ROW_EVENTS", 10)
    source = SqliteSource(database, REGISTRY)
    events: list[TipEvent] = [make("heavy", NOW_MS - number) for number in range(100) for make in (served, feedback)]
    await event_log.append([[admitted(event) for event in events]])
    heavy, light = ComputeRow("heavy", 0b11, NOW_MS), ComputeRow("light", 0b11, NOW_MS)
    assert await source.fitting([heavy] * 5) == 2  # 2 features, 200 events each
    assert await source.fitting([heavy._replace(mask=0b1)] * 5) == 4
    assert await source.fitting([heavy._replace(mask=REGISTRY.full_mask)] * 5) == 1, "at least one"
    assert await source.fitting([light] * 100) == 50
    assert await source.fitting([light, heavy, heavy, heavy, light]) == 3
    assert await source.fitting([heavy._replace(now_ms=NOW_MS - 100)] * 20) == 20, "later events do not count"
    assert await source.fitting([heavy._replace(now_ms=NOW_MS + 31 * DAY_MS)] * 20) == 20, "nor older ones"


async def test_source_raises_when_the_database_is_damaged(
    database: SqliteDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SqliteSource(database, REGISTRY)
    calls: list[object] = []

    async def fail(*arguments: object) -> None:
        calls.append(arguments)
        error = sqlite3.OperationalError("database disk image is malformed")
        error.sqlite_errorname = "SQLITE_CORRUPT_INDEX"
        raise error

    monkeypatch.setattr(source, "_run", fail)
    with pytest.raises(StoreUnavailable, match="malformed"):
        await source.compute(NOW_MS, [ComputeRow("ann", REGISTRY.full_mask)])
    assert len(calls) == 1  # not tried feature by feature
