"""One process's database: whole writes, errors that callers can tell apart, a WAL that stays small."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

import app.stores.sqlite.database as module
from app.errors import StoreFull, StoreUnavailable
from app.stores.sqlite.database import Database
from app.stores.sqlite.event_log import SqliteEventLog
from tests.support.clock import NOW_MS
from tests.support.database import column
from tests.support.events import admitted, served
from tests.support.logs import Recorder

HOLD_THE_WRITE_LOCK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
"""


def audit(connection: sqlite3.Connection, text: str) -> None:
    """Write any row at all."""
    connection.execute(
        "INSERT INTO audit_trail (at_ms, actor, action, subject, outcome) VALUES (0, 'test', 'write', ?, 'ok')", (text,)
    )


async def audited(database: Database) -> list[object]:
    """What `audit` wrote."""
    return await column(database, "SELECT subject FROM audit_trail ORDER BY id")


@contextmanager
def write_lock_held_elsewhere(path: Path) -> Iterator[None]:
    """Another process holds the write lock meanwhile."""
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


def take_away(path: Path) -> None:
    path.rename(path.with_name("away"))


def replace(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    copy.replace(path)


@pytest.mark.parametrize(
    ("change", "said"), [(take_away, "been removed"), (replace, "another file in its place")], ids=["away", "replaced"]
)
async def test_nothing_is_acknowledged_when_the_file_is_not_the_open_one_any_more(
    database: Database, change: Callable[[Path], None], said: str
) -> None:
    await database.write(lambda connection: audit(connection, "first"))
    change(database.path)
    message = f"has {said} since this process opened it; restart the process"
    with pytest.raises(StoreUnavailable, match=message):
        await database.write(lambda connection: audit(connection, "second"))
    with pytest.raises(StoreUnavailable, match=message) as raised:
        await audited(database)
    assert str(database.path) not in f"{raised.value}{raised.value.told}", "callers are told a path"


async def test_a_file_that_comes_back_is_used_again(database: Database) -> None:
    take_away(database.path)
    with pytest.raises(StoreUnavailable):
        await audited(database)
    database.path.with_name("away").rename(database.path)
    await database.write(lambda connection: audit(connection, "first"))
    assert await audited(database) == ["first"]


async def test_a_file_with_two_names_is_not_opened_and_is_noticed_later(database: Database) -> None:
    second = database.path.with_name("second")
    second.hardlink_to(database.path)
    with pytest.raises(StoreUnavailable, match=r"has 2 names \(hard links\); remove all but one"):
        await Database.open(second, readers=1)
    await database.write(lambda connection: audit(connection, "first"))
    assert database.links == 2
    second.unlink()
    assert (await audited(database), database.links) == (["first"], 1)


async def test_write_is_undone_whole_when_it_raises(database: Database) -> None:
    def work(connection: sqlite3.Connection) -> None:
        audit(connection, "first")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await database.write(work)
    assert await audited(database) == []
    await database.write(lambda connection: audit(connection, "second"))
    assert await audited(database) == ["second"]


async def test_write_is_undone_whole_when_sqlite_refuses_a_statement(database: Database) -> None:
    def work(connection: sqlite3.Connection) -> None:
        audit(connection, "first")
        connection.execute("INSERT INTO nowhere VALUES (1)")

    with pytest.raises(StoreUnavailable, match="no such table"):
        await database.write(work)
    assert await audited(database) == []


async def test_constraint_is_told_apart_when_a_write_breaks_it(database: Database) -> None:
    def work(connection: sqlite3.Connection) -> None:
        audit(connection, "first")
        connection.execute("INSERT INTO service (name, value) VALUES ('database_id', 'twice')")

    with pytest.raises(sqlite3.IntegrityError):
        await database.write(work)
    assert await audited(database) == []


async def test_only_a_write_that_may_be_lost_does_not_wait_for_the_disk(database: Database) -> None:
    full, normal = 2, 1

    def level(connection: sqlite3.Connection) -> int:
        audit(connection, "written")
        (found,) = connection.execute("PRAGMA synchronous").fetchone()
        return int(found)

    def fails(connection: sqlite3.Connection) -> int:
        level(connection)
        raise ValueError("undone")

    assert await database.write(level) == full
    assert await database.write(level, durable=False) == normal
    assert await database.write(level, durable=False) == normal
    assert await database.write(level) == full
    with pytest.raises(ValueError, match="undone"):
        await database.write(fails, durable=False)
    assert await database.write(level) == full
    assert await audited(database) == ["written"] * 5


async def test_read_cannot_write(database: Database) -> None:
    with pytest.raises(StoreUnavailable, match="readonly"):
        await database.read(lambda connection: audit(connection, "by a reader"))


async def test_id_is_that_of_the_file(database: Database) -> None:
    assert [database.id] == await column(database, "SELECT value FROM service WHERE name = 'database_id'")


async def test_reads_go_on_when_more_ask_than_there_are_readers(database: Database) -> None:
    answers = await asyncio.gather(*(column(database, "SELECT ?", number) for number in range(50)))
    assert answers == [[number] for number in range(50)]


async def test_write_raises_and_reads_go_on_when_another_process_holds_the_write_lock(database: Database) -> None:
    await database.write(lambda connection: connection.execute("PRAGMA busy_timeout = 50").fetchall())
    with write_lock_held_elsewhere(database.path):
        with pytest.raises(StoreUnavailable, match="locked"):
            await database.write(lambda connection: audit(connection, "refused"))
        assert await audited(database) == []
    await database.write(lambda connection: audit(connection, "accepted"))
    assert await audited(database) == ["accepted"]


async def test_write_waits_when_another_process_holds_the_write_lock_for_a_moment(database: Database) -> None:
    with write_lock_held_elsewhere(database.path):
        writing = asyncio.create_task(database.write(lambda connection: audit(connection, "later")))
        assert await audited(database) == []
    await writing
    assert await audited(database) == ["later"]


async def test_write_stands_when_its_caller_went_away(database: Database) -> None:
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    def work(connection: sqlite3.Connection) -> None:
        audit(connection, "orphan")
        loop.call_soon_threadsafe(begun.set)

    writing = asyncio.create_task(database.write(work))
    await begun.wait()
    writing.cancel()
    await database.write(lambda connection: audit(connection, "next"))
    assert await audited(database) == ["orphan", "next"]


async def test_database_refuses_when_it_is_closed(database: Database) -> None:
    await database.close()
    await database.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await database.write(lambda connection: audit(connection, "too late"))


class Checkpoints:
    """Counts checkpoints, and how large the WAL was at any commit."""

    def __init__(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.largest = 0
        self._database = database
        self._wal = database.path.with_name(database.path.name + "-wal")
        checkpoint = database._checkpoint

        def counted(writer: sqlite3.Connection) -> None:
            self.count += 1
            checkpoint(writer)

        monkeypatch.setattr(database, "_checkpoint", counted)

    async def write(self, commits: int) -> None:
        """Commit so many times some 20 kB."""
        for _ in range(commits):
            await self._database.write(lambda connection: audit(connection, "x" * 20_000))
            self.largest = max(self.largest, self._wal.stat().st_size)


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> int:
    limit = 256 * 1024
    monkeypatch.setattr(module, "CHECKPOINT_AT_BYTES", limit)
    return limit


@pytest.fixture
async def checkpoints(small_limit: int, database: Database, monkeypatch: pytest.MonkeyPatch) -> Checkpoints:
    return Checkpoints(database, monkeypatch)


async def test_wal_stays_small_and_checkpoints_stay_rare_when_there_are_many_writes(
    checkpoints: Checkpoints, small_limit: int
) -> None:
    database = await Database.open(checkpoints._database.path, readers=1)  # an idle process beside it
    try:
        await checkpoints.write(commits=120)  # some 3 MB
    finally:
        await database.close()
    assert checkpoints.largest < 1.5 * small_limit
    assert 5 <= checkpoints.count <= 15


async def test_checkpoints_stay_rare_when_a_reader_keeps_the_wal_from_beginning_anew(
    checkpoints: Checkpoints, database: Database, small_limit: int
) -> None:
    with closing(sqlite3.connect(database.path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM service").fetchall()
        await checkpoints.write(commits=60)
        assert checkpoints.largest > 4 * small_limit
        assert 1 <= checkpoints.count <= 10
        reader.execute("COMMIT")
    await checkpoints.write(commits=60)
    wal_bytes = database.path.with_name(database.path.name + "-wal").stat().st_size
    assert wal_bytes < 1.5 * small_limit


async def test_committed_write_stands_when_the_checkpoint_after_it_fails(
    checkpoints: Checkpoints, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert database._checkpointer is not None
    database._checkpointer.close()  # whatever it is asked, it raises
    await checkpoints.write(commits=20)
    assert checkpoints.count >= 1
    assert len(await audited(database)) == 20


def copy_as_left_by_a_crash(source: Path, target: Path) -> None:
    """The file and its WAL, never checkpointed."""
    for suffix in ("", "-wal"):
        target.with_name(target.name + suffix).write_bytes(source.with_name(source.name + suffix).read_bytes())


async def test_events_survive_when_the_database_is_opened_after_a_crash(
    database: Database, event_log: SqliteEventLog, tmp_path: Path
) -> None:
    await event_log.append([[admitted(served(event_id="a"))]])
    copy_as_left_by_a_crash(database.path, tmp_path / "crashed.db")
    reopened = await Database.open(tmp_path / "crashed.db", readers=1)
    try:
        assert [item.event.event_id for item in await SqliteEventLog(reopened).unconsumed(NOW_MS + 1, 9)] == ["a"]
    finally:
        await reopened.close()


async def test_a_read_and_a_write_say_that_nothing_can_be_had_when_the_database_was_closed(database_path: Path) -> None:
    database = await Database.open(database_path, 1)
    await database.close()
    for work in (database.read, database.write):
        with pytest.raises(StoreUnavailable, match="closed"):
            await work(lambda connection: connection.execute("SELECT 1"))


async def _no_more_room(database: Database, room: bool) -> None:
    """The file may not grow any more, or may."""
    pages = 2**30 if room else 1  # fewer than there are: no more than there are
    assert database._writer is not None
    await database._writer.run(lambda connection: connection.execute(f"PRAGMA max_page_count = {pages}").fetchall())


async def _write_until_full(database: Database) -> int:
    """How many writes of some pages each found room."""
    for number in range(1_000):
        try:
            await database.write(lambda connection: audit(connection, "x" * 20_000))
        except StoreFull:
            return number
    raise AssertionError("it is never full")


async def test_reads_go_on_and_writes_are_undone_whole_when_there_is_no_room(database: Database) -> None:
    now = [1_000.0]
    database._monotonic = lambda: now[0]
    await _no_more_room(database, False)
    stored = await _write_until_full(database)
    assert [database.full] == [True]
    assert len(await audited(database)) == stored

    def two(connection: sqlite3.Connection) -> None:
        audit(connection, "small")
        audit(connection, "x" * 200_000)

    with pytest.raises(StoreFull, match="no room to write"):
        await database.write(two)
    assert len(await audited(database)) == stored
    await _no_more_room(database, True)
    await database.write(two)
    assert [database.full] == [True]  # for a moment that may be chance
    now[0] += module.STILL_FULL_S
    await database.write(two)
    assert [database.full] == [False]
    assert len(await audited(database)) == stored + 4


async def test_log_tells_once_when_there_is_no_room_for_long(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, now = Recorder(), [1_000.0]
    monkeypatch.setattr(module, "log", recorder)
    database._monotonic = lambda: now[0]
    await _no_more_room(database, False)
    for _ in range(5):
        await _write_until_full(database)  # and a small write may find room in between
        now[0] += module.STILL_FULL_S
        await database.write(lambda _: None)
    assert [line["event"] for line in recorder.lines] == ["database_full", "database_has_room_again"]
    now[0] += module.LOG_FULL_EVERY_S
    await _write_until_full(database)
    assert len(recorder.of("database_full")) == 2


ENDLESS = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n"


async def test_a_statement_without_end_is_interrupted_when_the_database_closes(database_path: Path) -> None:
    database = await Database.open(database_path, 1)
    endless = asyncio.create_task(database.read(lambda connection: connection.execute(ENDLESS).fetchall()))
    await database.read(lambda connection: connection.execute("SELECT 1").fetchall())  # by the other reader
    async with asyncio.timeout(10):
        await database.close()
    with pytest.raises(StoreUnavailable, match="interrupted"):
        await endless


async def test_a_statement_is_interrupted_when_its_time_is_over_and_the_next_one_is_not(database: Database) -> None:
    async with database.reader() as reader:
        with pytest.raises(sqlite3.OperationalError, match="interrupted"):
            await reader.run(lambda connection: connection.execute(ENDLESS).fetchall(), 0.05)
        assert await reader.run(lambda connection: connection.execute("SELECT 1").fetchall(), 30) == [(1,)]
        assert await reader.run(lambda connection: connection.execute("SELECT 2").fetchall()) == [(2,)]
