"""The database of one process: atomic writes, its errors, and a WAL that stays small."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import pytest

import app.stores.sql.database as module
from app.errors import StoreFull, StoreUnavailable
from app.stores.sql.database import LOG_FULL_EVERY_S, SPARE_READERS, STILL_FULL_S
from app.stores.sqlite.connection import KEPT_WAL_BYTES
from app.stores.sqlite.database import SqliteDatabase
from app.stores.sqlite.event_log import SqliteEventLog
from tests.support.clock import NOW_MS, FakeClock
from tests.support.database import column, used_bytes
from tests.support.events import admitted, served
from tests.support.logs import Recorder
from tests.support.waiting import PATIENCE_S, eventually

READERS = 2
CHECKPOINT_FRAMES = 64
CHECKPOINT_BYTES = CHECKPOINT_FRAMES * 4_096
STILL_FULL_MS = round(STILL_FULL_S * 1000)
HOLD_THE_WRITE_LOCK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
"""
WRITE_MUCH = f"""
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA wal_autocheckpoint = 0")
connection.execute("INSERT INTO audit_trail (at_ms, actor, action, subject, outcome) "
                   "VALUES (0, 'test', 'write', ?, 'ok')", ("x" * {4 * CHECKPOINT_BYTES},))
"""
LEAVE_WAL_MODE = """
import sqlite3, sys
sqlite3.connect(sys.argv[1], timeout=0).execute("PRAGMA journal_mode = DELETE")
"""


def audit(connection: sqlite3.Connection, text: str) -> None:
    """Write any row."""
    connection.execute(
        "INSERT INTO audit_trail (at_ms, actor, action, subject, outcome) VALUES (0, 'test', 'write', ?, 'ok')", (text,)
    )


async def audited(database: SqliteDatabase) -> list[object]:
    return await column(database, "SELECT subject FROM audit_trail ORDER BY id")


@contextmanager
def write_locked(path: Path) -> Iterator[None]:
    """Another process holds the write lock during the block."""
    holder = subprocess.Popen(
        [sys.executable, "-S", "-c", HOLD_THE_WRITE_LOCK, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        yield
        assert holder.stdin is not None
        holder.stdin.close()


def remove(path: Path) -> None:
    path.rename(path.with_name("away"))


def replace(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    copy.replace(path)


@pytest.mark.parametrize(
    ("change", "what"), [(remove, "removed"), (replace, "replaced by another file")], ids=["removed", "replaced"]
)
async def test_reads_and_writes_fail_when_the_file_changed(
    database: SqliteDatabase, change: Callable[[Path], None], what: str
) -> None:
    await database.write(lambda connection: audit(connection, "first"), of=())
    change(database.path)
    message = f"was {what} after this process opened it; restart"
    with pytest.raises(StoreUnavailable, match=message):
        await database.write(lambda connection: audit(connection, "second"), of=())
    with pytest.raises(StoreUnavailable, match=message) as raised:
        await audited(database)
    assert str(database.path) not in f"{raised.value}{raised.value.public_reason}"


async def test_file_is_used_again_when_it_returns(database: SqliteDatabase) -> None:
    remove(database.path)
    with pytest.raises(StoreUnavailable):
        await audited(database)
    database.path.with_name("away").rename(database.path)
    await database.write(lambda connection: audit(connection, "first"), of=())
    assert await audited(database) == ["first"]


async def test_hard_links_are_refused_at_open_and_counted_later(database: SqliteDatabase) -> None:
    second = database.path.with_name("second")
    second.hardlink_to(database.path)
    with pytest.raises(StoreUnavailable, match=r"has 2 names \(hard links\); remove all but one"):
        await SqliteDatabase.open(second, readers=1)
    await database.write(lambda connection: audit(connection, "first"), of=())
    assert database.links == 2
    second.unlink()
    assert (await audited(database), database.links) == (["first"], 1)


def fail_in_python(_: sqlite3.Connection) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (fail_in_python, ZeroDivisionError),
        (lambda connection: connection.execute("INSERT INTO nowhere VALUES (1)"), StoreUnavailable),
        (
            lambda connection: connection.execute("INSERT INTO service (name, value) VALUES ('database_id', '2')"),
            sqlite3.IntegrityError,
        ),
    ],
    ids=["Python", "SQL", "constraint"],
)
async def test_write_is_rolled_back_when_it_fails(
    database: SqliteDatabase, fault: Callable[[sqlite3.Connection], object], error: type[Exception]
) -> None:
    def work(connection: sqlite3.Connection) -> None:
        audit(connection, "first")
        fault(connection)

    with pytest.raises(error):
        await database.write(work, of=())
    await database.write(lambda connection: audit(connection, "second"), of=())
    assert await audited(database) == ["second"]


async def test_write_waits_for_the_disk(database: SqliteDatabase) -> None:
    full = 2
    found = await database.write(lambda connection: connection.execute("PRAGMA synchronous").fetchone(), of=())
    assert found == (full,)


async def test_read_cannot_write(database: SqliteDatabase) -> None:
    with pytest.raises(StoreUnavailable, match="readonly"):
        await database.read(lambda connection: audit(connection, "by a reader"))


async def test_id_is_the_stored_id(database: SqliteDatabase) -> None:
    assert [database.id] == await column(database, "SELECT value FROM service WHERE name = 'database_id'")


async def test_reads_wait_when_all_readers_are_busy(small: SqliteDatabase) -> None:
    count = READERS + SPARE_READERS
    busy, go = threading.Barrier(count + 1), threading.Event()

    def occupy(_: sqlite3.Connection) -> None:
        busy.wait(PATIENCE_S)
        go.wait(PATIENCE_S)

    occupied = [asyncio.create_task(small.read(occupy)) for _ in range(count)]
    await asyncio.to_thread(busy.wait, PATIENCE_S)
    reading = [asyncio.create_task(column(small, "SELECT ?", number)) for number in range(50)]
    await small.write(lambda connection: audit(connection, "meanwhile"), of=())
    waiting = [not task.done() for task in reading]
    go.set()
    assert all(waiting)
    assert await asyncio.gather(*reading) == [[number] for number in range(50)]
    await asyncio.gather(*occupied)


async def test_write_fails_and_reads_continue_when_another_process_holds_the_lock(database: SqliteDatabase) -> None:
    await database.write(lambda connection: connection.execute("PRAGMA busy_timeout = 50").fetchall(), of=())
    with write_locked(database.path):
        with pytest.raises(StoreUnavailable, match="locked"):
            await database.write(lambda connection: audit(connection, "refused"), of=())
        assert await audited(database) == []
    await database.write(lambda connection: audit(connection, "accepted"), of=())
    assert await audited(database) == ["accepted"]


async def test_look_needs_no_thread_unless_a_lock_is_in_the_way(database: SqliteDatabase) -> None:
    def work(connection: sqlite3.Connection, locked: bool) -> tuple[int, list[str]]:
        if locked and threading.get_ident() == own:
            raise sqlite3.OperationalError("database is locked")
        return threading.get_ident(), [row[0] for row in connection.execute("SELECT subject FROM audit_trail")]

    own = threading.get_ident()
    await database.write(lambda connection: audit(connection, "seen"), of=())
    with write_locked(database.path):
        assert await database.look(partial(work, locked=False)) == (own, ["seen"])
        thread, seen = await database.look(partial(work, locked=True))
    assert (thread == own, seen) == (False, ["seen"])


async def test_write_waits_when_another_process_holds_the_lock_briefly(database: SqliteDatabase) -> None:
    tried: list[str] = []
    await database.write(lambda connection: connection.set_trace_callback(tried.append), of=())
    tried.clear()
    with write_locked(database.path):
        writing = asyncio.create_task(database.write(lambda connection: audit(connection, "later"), of=()))
        await eventually(lambda: "BEGIN IMMEDIATE" in tried)
        assert await audited(database) == []
    await writing
    assert await audited(database) == ["later"]


async def test_write_is_committed_when_its_caller_is_cancelled(database: SqliteDatabase) -> None:
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    def work(connection: sqlite3.Connection) -> None:
        audit(connection, "orphan")
        loop.call_soon_threadsafe(begun.set)

    writing = asyncio.create_task(database.write(work, of=()))
    await begun.wait()
    writing.cancel()
    await database.write(lambda connection: audit(connection, "next"), of=())
    assert await audited(database) == ["orphan", "next"]


async def test_reads_and_writes_fail_when_the_database_is_closed(database: SqliteDatabase) -> None:
    await database.close()
    await database.close()
    for work in (database.read, partial(database.write, of=())):
        with pytest.raises(StoreUnavailable, match="closed"):
            await work(lambda connection: connection.execute("SELECT 1"))


async def test_waiting_write_fails_when_the_database_closes(database: SqliteDatabase) -> None:
    begun, leave = threading.Event(), threading.Event()

    def hold(_: sqlite3.Connection) -> None:
        begun.set()
        leave.wait(10)

    def is_closing() -> bool:
        try:
            database.state.run(lambda connection: connection.execute("SELECT 1"))
        except StoreUnavailable:
            return True
        return False

    holding = asyncio.create_task(database.write(hold, of=()))
    await eventually(begun.is_set)
    waiting = asyncio.create_task(database.write(lambda connection: audit(connection, "late"), of=()))
    closed = asyncio.create_task(database.close())
    await eventually(is_closing)
    leave.set()
    await asyncio.gather(holding, closed)
    with pytest.raises(StoreUnavailable, match="closed"):
        await waiting


@pytest.fixture
async def small(database_path: Path) -> AsyncIterator[SqliteDatabase]:
    """A database that checkpoints after a few writes of `write_much`."""
    opened = await SqliteDatabase.open(database_path, readers=READERS, checkpoint_frames=CHECKPOINT_FRAMES)
    yield opened
    await opened.close()


def wal(database: SqliteDatabase) -> Path:
    return database.path.with_name(database.path.name + "-wal")


async def write_much(*databases: SqliteDatabase, commits: int) -> int:
    """Commit some 20 kB each time, to one database after the other. Return the most bytes of the WAL in use."""
    largest = 0
    for database, _ in zip(itertools.cycle(databases), range(commits), strict=False):
        await database.write(lambda connection: audit(connection, "x" * 20_000), of=())
        largest = max(largest, used_bytes(wal(database)))
    return largest


async def test_wal_stays_small_and_checkpoints_rare_when_there_are_many_writes(small: SqliteDatabase) -> None:
    idle = await SqliteDatabase.open(small.path, readers=1)
    try:
        largest = await write_much(small, commits=120)  # some 3 MB
    finally:
        await idle.close()
    assert largest < 1.5 * CHECKPOINT_BYTES
    assert wal(small).stat().st_size == largest  # kept, and overwritten since
    assert 5 <= small.checkpoints <= 15


async def test_no_checkpoint_when_the_wal_is_large_but_hardly_used(small: SqliteDatabase) -> None:
    await small.write(lambda connection: audit(connection, "x" * 4 * CHECKPOINT_BYTES), of=())
    assert small.checkpoints == 1
    for _ in range(10):
        await small.write(lambda connection: audit(connection, "small"), of=())
    assert small.checkpoints == 1
    assert wal(small).stat().st_size > 4 * CHECKPOINT_BYTES


async def test_wal_stays_small_when_several_databases_write_to_it(small: SqliteDatabase) -> None:
    second = await SqliteDatabase.open(small.path, readers=1, checkpoint_frames=CHECKPOINT_FRAMES)
    try:
        assert await write_much(small, second, second, commits=120) < 1.5 * CHECKPOINT_BYTES
        assert 5 <= small.checkpoints + second.checkpoints <= 15
    finally:
        await second.close()


async def test_frames_of_another_process_are_checkpointed(small: SqliteDatabase) -> None:
    subprocess.run([sys.executable, "-S", "-c", WRITE_MUCH, str(small.path)], check=True)  # noqa: ASYNC221
    assert used_bytes(wal(small)) > 4 * CHECKPOINT_BYTES
    await small.write(lambda connection: audit(connection, "small"), of=())
    assert small.checkpoints == 1
    await small.write(lambda connection: audit(connection, "small"), of=())
    assert used_bytes(wal(small)) < CHECKPOINT_BYTES


async def test_wal_is_truncated_when_it_restarts_after_a_large_write(small: SqliteDatabase) -> None:
    await small.write(lambda connection: audit(connection, "x" * 2 * KEPT_WAL_BYTES), of=())
    assert wal(small).stat().st_size > 2 * KEPT_WAL_BYTES
    await small.write(lambda connection: audit(connection, "small"), of=())
    assert wal(small).stat().st_size == KEPT_WAL_BYTES


async def test_locks_stay_when_another_database_of_the_process_closes(small: SqliteDatabase) -> None:
    second = await SqliteDatabase.open(small.path, readers=1)
    await write_much(small, second, commits=2)
    await second.close()
    # To leave WAL mode takes a lock that excludes every other connection.
    leave = [sys.executable, "-S", "-c", LEAVE_WAL_MODE, str(small.path)]
    left = subprocess.run(leave, check=False, capture_output=True, text=True)  # noqa: ASYNC221
    assert "database is locked" in left.stderr


async def test_checkpoints_stay_rare_when_a_reader_keeps_the_wal_from_restarting(small: SqliteDatabase) -> None:
    with closing(sqlite3.connect(small.path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM service").fetchall()
        assert await write_much(small, commits=60) > 4 * CHECKPOINT_BYTES
        assert 1 <= small.checkpoints <= 10
        reader.execute("COMMIT")
    await write_much(small, commits=60)
    assert used_bytes(wal(small)) < 1.5 * CHECKPOINT_BYTES


async def test_checkpoints_stay_rare_when_a_reader_holds_a_large_write(small: SqliteDatabase) -> None:
    with closing(sqlite3.connect(small.path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM service").fetchall()
        await small.write(lambda connection: audit(connection, "x" * 20 * CHECKPOINT_BYTES), of=())
        assert small.checkpoints == 1
        for _ in range(10):
            await small.write(lambda connection: audit(connection, "small"), of=())
        assert small.checkpoints == 1


async def test_write_is_committed_when_the_checkpoint_after_it_fails(small: SqliteDatabase) -> None:
    assert small._checkpointer is not None
    small._checkpointer.close()  # no fault of the file makes a passive checkpoint raise
    await write_much(small, commits=20)
    assert small.checkpoints >= 1
    assert len(await audited(small)) == 20


def copy_without_checkpoint(source: Path, target: Path) -> None:
    """Copy the file and its WAL, as a crash leaves them."""
    for suffix in ("", "-wal"):
        target.with_name(target.name + suffix).write_bytes(source.with_name(source.name + suffix).read_bytes())


async def test_events_survive_when_the_database_is_opened_after_a_crash(
    database: SqliteDatabase, event_log: SqliteEventLog, tmp_path: Path
) -> None:
    await event_log.append([[admitted(served(event_id="a"))]])
    copy_without_checkpoint(database.path, tmp_path / "crashed.db")
    reopened = await SqliteDatabase.open(tmp_path / "crashed.db", readers=1)
    try:
        assert [item.event.event_id for item in await SqliteEventLog(reopened).unconsumed(NOW_MS + 1, 9)] == ["a"]
    finally:
        await reopened.close()


async def test_every_commit_survives_a_crash_when_older_frames_follow_in_the_wal(
    small: SqliteDatabase, tmp_path: Path
) -> None:
    commits = 0
    while commits < 40 or used_bytes(wal(small)) > CHECKPOINT_BYTES / 2:
        await write_much(small, commits=1)
        commits += 1
    assert wal(small).stat().st_size > CHECKPOINT_BYTES
    copy_without_checkpoint(small.path, tmp_path / "crashed.db")
    with closing(sqlite3.connect(tmp_path / "crashed.db")) as crashed:
        assert crashed.execute("SELECT COUNT(*) FROM audit_trail").fetchone() == (commits,)
        assert crashed.execute("PRAGMA integrity_check").fetchone() == ("ok",)


async def limit_size(database: SqliteDatabase, limited: bool) -> None:
    """Let the file grow no more, or let it grow again."""
    pages = 1 if limited else 2**30  # SQLite raises a limit below the number of pages to that number
    await database.write(lambda connection: connection.execute(f"PRAGMA max_page_count = {pages}").fetchall(), of=())


async def write_until_full(database: SqliteDatabase) -> int:
    """The number of writes of some pages that found room."""
    for number in range(1_000):
        try:
            await database.write(lambda connection: audit(connection, "x" * 20_000), of=())
        except StoreFull:
            return number
    raise AssertionError("it is never full")


@pytest.fixture
async def clocked(database_path: Path, clock: FakeClock) -> AsyncIterator[SqliteDatabase]:
    """A database whose monotonic clock is the fixture `clock`."""
    opened = await SqliteDatabase.open(database_path, readers=2, monotonic=clock.monotonic)
    yield opened
    await opened.close()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


async def test_reads_continue_and_writes_are_rolled_back_when_the_disk_is_full(
    clocked: SqliteDatabase, clock: FakeClock
) -> None:
    await limit_size(clocked, True)
    stored = await write_until_full(clocked)
    assert [clocked.full] == [True]
    assert len(await audited(clocked)) == stored

    def two(connection: sqlite3.Connection) -> None:
        audit(connection, "small")
        audit(connection, "x" * 200_000)

    with pytest.raises(StoreFull, match="no room to write"):
        await clocked.write(two, of=())
    assert len(await audited(clocked)) == stored
    await limit_size(clocked, False)
    await clocked.write(two, of=())
    assert [clocked.full] == [True], "a write that succeeds at once may have been small"
    clock.advance(STILL_FULL_MS)
    await clocked.write(two, of=())
    assert [clocked.full] == [False]
    assert len(await audited(clocked)) == stored + 4


async def test_full_disk_is_logged_once_when_it_lasts(
    clocked: SqliteDatabase, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(module, "log", recorder)
    await limit_size(clocked, True)
    for _ in range(5):
        await write_until_full(clocked)  # small writes may find room in between
        clock.advance(STILL_FULL_MS)
        await clocked.write(lambda _: None, of=())
    assert [line["event"] for line in recorder.lines] == ["database_full", "database_has_room_again"]
    clock.advance(round(LOG_FULL_EVERY_S * 1000))
    await write_until_full(clocked)
    assert len(recorder.of("database_full")) == 2


async def test_disk_stays_full_when_a_write_fails_for_another_reason(clocked: SqliteDatabase, clock: FakeClock) -> None:
    await limit_size(clocked, True)
    await write_until_full(clocked)
    await clocked.write(lambda connection: connection.execute("PRAGMA busy_timeout = 50").fetchall(), of=())
    clock.advance(STILL_FULL_MS)
    with write_locked(clocked.path), pytest.raises(StoreUnavailable, match="locked"):
        await clocked.write(lambda connection: audit(connection, "refused"), of=())
    assert clocked.full


ENDLESS = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n"


async def test_endless_statement_is_interrupted_when_the_database_closes(database_path: Path) -> None:
    database = await SqliteDatabase.open(database_path, 1)
    endless = asyncio.create_task(database.read(lambda connection: connection.execute(ENDLESS).fetchall()))
    await database.read(lambda connection: connection.execute("SELECT 1").fetchall())  # by the other reader
    async with asyncio.timeout(10):
        await database.close()
    with pytest.raises(StoreUnavailable, match="interrupted"):
        await endless


async def test_statement_is_interrupted_after_its_deadline_and_the_next_is_not(database: SqliteDatabase) -> None:
    async with database.readers.one() as reader:
        with pytest.raises(sqlite3.OperationalError, match="interrupted"):
            await reader.run(lambda connection: connection.execute(ENDLESS).fetchall(), 0.05)
        assert await reader.run(lambda connection: connection.execute("SELECT 1").fetchall(), 30) == [(1,)]
        assert await reader.run(lambda connection: connection.execute("SELECT 2").fetchall()) == [(2,)]
