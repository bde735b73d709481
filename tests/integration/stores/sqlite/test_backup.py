"""Backups are consistent while processes write, and restored databases get a new id."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from app.bootstrap.service import open_service
from app.errors import Conflict, InvalidInput, SchemaMismatch, StoreUnavailable
from app.settings import Settings
from app.stores.sql.users import SqlUsers
from app.stores.sqlite.backup import adopt, backup, restore
from app.stores.sqlite.database import SqliteDatabase
from app.stores.sqlite.event_log import SqliteEventLog
from app.stores.sqlite.integrity_check import findings
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.clock import NOW_MS
from tests.support.events import admitted, feedback, served
from tests.support.registry import FEATURES
from tests.support.small_disk import small_file_system
from tests.support.waiting import eventually

VOLUME = 4
SELECT_DATABASE_ID = "SELECT value FROM service WHERE name = 'database_id'"


def damage(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return findings(connection, whole=True)


def query(path: Path, statement: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(statement).fetchall()


async def test_values_cached_before_a_restore_are_not_read(
    database_path: Path, tmp_path: Path, valkey: EmbeddedServer
) -> None:
    settings = Settings(features=FEATURES, database=database_path, cache_url=valkey.url, cache_timeout_ms=5_000)
    copy = tmp_path / "copy.db"
    async with open_service(settings, door="http") as service:
        now_ms = service.clock.now_ms() - 1_000
        await service.ingestor.ingest([served("ada", now_ms)])
        backup(database_path, copy)
        await service.ingestor.ingest([served("ada", now_ms)])
        profile = await service.rebuilder.rebuild(["ada"], 1 << VOLUME)
        assert profile["ada"][VOLUME].json == b"2"
    restore(copy, database_path)
    async with open_service(settings, door="http") as service:
        reading = (await service.reader.read({"ada": 1 << VOLUME}))["ada"][VOLUME]
        assert (reading.json, reading.cached) == (b"1", False)


def test_restored_database_has_a_new_id(database_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    backup(database_path, copy)
    before = query(database_path, SELECT_DATABASE_ID)
    assert query(database_path, SELECT_DATABASE_ID) == before
    restore(copy, database_path)
    ids = [str(query(path, SELECT_DATABASE_ID)[0][0]) for path in (database_path, copy)]
    assert len({str(before[0][0]), *ids}) == 3, "two databases have the same id"


async def opened_id(path: Path) -> str:
    database = await SqliteDatabase.open(path, readers=1)
    await database.close()
    return database.id


async def test_copied_file_has_a_new_id(database_path: Path, tmp_path: Path) -> None:
    own = await opened_id(database_path)
    copy, backup_copy = tmp_path / "cp.db", tmp_path / "backup.db"
    shutil.copy(database_path, copy)
    backup(database_path, backup_copy)
    ids = [await opened_id(path) for path in (copy, backup_copy, copy, backup_copy, database_path)]
    assert ids == [*ids[:2], *ids[:2], own]
    assert len(set(ids)) == 3
    await asyncio.to_thread(database_path.rename, tmp_path / "moved.db")
    assert await opened_id(tmp_path / "moved.db") == own


async def test_adopted_database_has_only_a_new_id(database_path: Path) -> None:
    before = await opened_id(database_path)
    content = query(database_path, "SELECT * FROM sqlite_schema")
    adopt(database_path)
    after = await opened_id(database_path)
    assert after not in {before, ""}
    assert query(database_path, "SELECT * FROM sqlite_schema") == content
    running = await SqliteDatabase.open(database_path, readers=1)
    with pytest.raises(Conflict, match="in use"):
        adopt(database_path)
    await running.close()
    assert await opened_id(database_path) == after


def test_adopt_is_refused_when_the_database_is_damaged_or_missing(database_path: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="there is no database"):
        adopt(tmp_path / "absent.db")
    database_path.write_bytes(b"\xff\xd8" * 4_000)
    with pytest.raises(StoreUnavailable):
        adopt(database_path)


def modes(*paths: Path) -> list[str]:
    return [oct(path.stat().st_mode & 0o777) for path in paths]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o660])
def test_copies_keep_the_mode_of_the_database(database_path: Path, tmp_path: Path, mode: int) -> None:
    copy, elsewhere = tmp_path / "copy.db", tmp_path / "new.db"
    database_path.chmod(mode)
    backup(database_path, copy)
    restore(copy, database_path)
    restore(copy, elsewhere)
    assert modes(copy, database_path, elsewhere) == [oct(mode)] * 3
    copy.chmod(0o644)
    restore(copy, database_path)
    assert modes(database_path) == [oct(mode)]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may change the owner")
def test_copies_keep_the_owner_when_root_makes_them(database_path: Path, tmp_path: Path) -> None:
    os.chown(database_path, 1_234, 1_235)
    backup(database_path, tmp_path / "copy.db")
    os.chown(tmp_path / "copy.db", 0, 0)
    restore(tmp_path / "copy.db", database_path)
    for path in (database_path, tmp_path / "copy.db"):
        found = path.stat()
        assert (found.st_uid, found.st_gid) == ((1_234, 1_235) if path == database_path else (0, 0))


def test_partial_copy_of_a_killed_backup_is_replaced(database_path: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.db.part").write_bytes(b"half a copy")
    backup(database_path, tmp_path / "copy.db")
    assert damage(tmp_path / "copy.db") == []
    assert not (tmp_path / "copy.db.part").exists()


async def test_restore_keeps_the_wal_of_a_new_process(
    database_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy.db"
    backup(database_path, copy)
    writers: list[sqlite3.Connection] = []
    replace = Path.replace

    def replace_and_write(self: Path, target: Path) -> Path:
        replaced = replace(self, target)
        writers.append(sqlite3.connect(target, isolation_level=None))
        writers[0].execute("PRAGMA journal_mode = WAL")
        writers[0].execute("INSERT INTO service (name, value) VALUES ('written', 'at once')")
        return replaced

    monkeypatch.setattr(Path, "replace", replace_and_write)
    restore(copy, database_path)
    assert query(database_path, "SELECT value FROM service WHERE name = 'written'") == [("at once",)]
    writers[0].close()
    assert query(database_path, "SELECT value FROM service WHERE name = 'written'") == [("at once",)]


def test_restore_creates_a_missing_database(database_path: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere" / "profiles.db"
    restore(database_path, target)
    assert query(target, "SELECT COUNT(*) FROM event_log") == [(0,)]


async def test_restore_is_refused_while_the_service_runs(database_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    backup(database_path, copy)
    before = query(database_path, SELECT_DATABASE_ID)
    async with open_service(Settings(features=FEATURES, database=database_path), door="http"):
        with pytest.raises(Conflict, match="in use"):
            restore(copy, database_path)
    assert query(database_path, SELECT_DATABASE_ID) == before


def test_backup_is_refused_when_the_target_exists(database_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    copy.write_text("precious")
    with pytest.raises(Conflict, match="never overwrites"):
        backup(database_path, copy)
    assert copy.read_text() == "precious"


def make_picture(path: Path) -> None:
    path.write_bytes(b"\xff\xd8" * 4_000)


def damage_pages(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096 * 3 : 4096 * 5] = b"\x17" * 8192
    path.write_bytes(content)


def make_newer(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")


@pytest.mark.parametrize(
    ("change", "error"),
    [(make_picture, InvalidInput), (damage_pages, InvalidInput), (make_newer, SchemaMismatch)],
    ids=["no database", "damaged", "newer"],
)
def test_restore_is_refused_when_the_source_is_unusable(
    database_path: Path, tmp_path: Path, change: Callable[[Path], None], error: type[Exception]
) -> None:
    source = tmp_path / "source.db"
    backup(database_path, source)
    change(source)
    with pytest.raises(error, match=str(source)):
        restore(source, database_path)
    assert query(database_path, "SELECT COUNT(*) FROM event_log") == [(0,)]


async def test_backup_contains_whole_commits_and_all_acknowledged_events(
    database: SqliteDatabase, tmp_path: Path
) -> None:
    log, users = SqliteEventLog(database), SqlUsers(database)
    stop = asyncio.Event()
    acknowledged: list[str] = []

    async def produce(user: str) -> None:
        while not stop.is_set():
            events = [(served if len(acknowledged) % 2 else feedback)(user) for _ in range(7)]
            await log.append([[admitted(event) for event in events]])
            acknowledged.extend(event.event_id for event in events)

    async def erase_and_consume() -> None:
        while not stop.is_set():
            await log.append([[admitted(served("erased"))]])
            await users.erase("erased", NOW_MS)
            await log.mark_consumed(list(range(1, len(acknowledged) + 1)))

    writing = [asyncio.create_task(work) for work in (produce("ann"), produce("bob"), erase_and_consume())]
    for number in range(5):
        enough = len(acknowledged) + 100
        await eventually(lambda enough=enough: len(acknowledged) > enough)  # type: ignore[misc]
        before = set(acknowledged)
        copy = tmp_path / f"copy-{number}.db"
        await asyncio.to_thread(backup, database.path, copy)
        stored = {event_id for (event_id,) in query(copy, "SELECT event_id FROM event_log WHERE user_id != 'erased'")}
        assert before <= stored
        assert len(stored) % 7 == 0, "a commit was cut in two"
        assert damage(copy) == []
        restore(copy, tmp_path / "restored.db")
        assert damage(tmp_path / "restored.db") == []
    stop.set()
    await asyncio.gather(*writing)


@pytest.mark.parametrize("damaged", ["header", "schema", "half"])
async def test_restore_replaces_a_damaged_database(database_path: Path, tmp_path: Path, damaged: str) -> None:
    copy = tmp_path / "copy.db"
    backup(database_path, copy)
    content = bytearray(copy.read_bytes())
    if damaged == "header":
        content[:200] = b"x" * 200
    elif damaged == "schema":
        content[4096 : 4 * 4096] = b"x" * 3 * 4096
    else:
        del content[len(content) // 2 :]
    overwrite(database_path, bytes(content))
    restore(copy, database_path)
    await (await SqliteDatabase.open(database_path, readers=1)).close()
    assert damage(database_path) == []


def overwrite(path: Path, content: bytes) -> None:
    """Overwrite the file, and leave a log of the earlier content."""
    path.write_bytes(content)
    path.with_name(path.name + "-wal").write_bytes(b"some frames")


HOLD = """
import sys
from pathlib import Path
from app.stores.sqlite.connection import connect
connection = connect(Path(sys.argv[1]), read_only=True)
connection.execute("SELECT * FROM service").fetchall()
print("open", flush=True)
sys.stdin.read()
"""


def test_restore_is_refused_while_a_damaged_database_is_in_use(database_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    backup(database_path, copy)
    command = [sys.executable, "-c", HOLD, str(database_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with database_path.open("r+b") as file:
            file.write(b"x" * 200)
        with pytest.raises(Conflict, match="in use"):
            restore(copy, database_path)
        holder.stdin.close()
    restore(copy, database_path)
    assert damage(database_path) == []


DIE_AFTER_REPLACING = """
import os, signal, sys
from pathlib import Path
from app.stores.sqlite import backup
from tests.support.registry import FEATURES
replace = Path.replace
def dying(self, target):
    replace(self, target)
    os.kill(os.getpid(), signal.SIGKILL)
Path.replace = dying
backup.restore(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.slow
async def test_old_log_is_not_replayed_when_restore_is_killed(database_path: Path, tmp_path: Path) -> None:
    copy, crashed = tmp_path / "copy.db", tmp_path / "crashed.db"
    backup(database_path, copy)
    async with open_service(Settings(features=FEATURES, database=database_path), door="http") as service:
        await service.ingestor.ingest([served("ada", service.clock.now_ms() - 1_000) for _ in range(50)])
        for suffix in ("", "-wal"):  # as a crash leaves them: the events are only in the log
            shutil.copyfile(f"{database_path}{suffix}", f"{crashed}{suffix}")
    command = [sys.executable, "-c", DIE_AFTER_REPLACING, str(copy), str(crashed)]
    assert subprocess.run(command, check=False, timeout=60).returncode == -signal.SIGKILL  # noqa: ASYNC221
    assert query(crashed, "SELECT COUNT(*) FROM event_log") == [(0,)]
    assert damage(crashed) == []


def test_no_partial_file_is_left_when_the_disk_is_full(database_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    backup(database_path, copy)
    with closing(sqlite3.connect(copy)) as connection, connection:  # more than SQLite keeps in memory
        connection.execute("CREATE TABLE large (content)")
        connection.executemany("INSERT INTO large VALUES (zeroblob(?))", [(1_000_000,)] * 6)
    with small_file_system(tmp_path / "small") as small:
        if small is None:
            pytest.skip("only root may mount a file system")
        restore(copy, small.directory / "profiles.db")
        small.fill()
        with pytest.raises(StoreUnavailable):
            backup(small.directory / "profiles.db", small.directory / "again.db")
        with pytest.raises(StoreUnavailable):
            restore(copy, small.directory / "profiles.db")
        filler = small.directory / "filler"  # room for a beginning and for its journal
        os.truncate(filler, filler.stat().st_size - 1_000_000)
        with pytest.raises(StoreUnavailable):
            backup(small.directory / "profiles.db", small.directory / "again.db")
        with pytest.raises(StoreUnavailable):
            restore(copy, small.directory / "profiles.db")
        assert {path.name for path in small.directory.iterdir()} <= {
            "profiles.db",
            "filler",
            "profiles.db-wal",
            "profiles.db-shm",
        }
        assert damage(small.directory / "profiles.db") == []
