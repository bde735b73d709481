"""Backups are consistent while others write, and a restored one cannot be mixed up with what it replaced."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from app.bootstrap.service import open_service
from app.errors import Conflict, InvalidInput, SchemaMismatch, StoreUnavailable
from app.settings import Settings
from app.stores.sqlite import backup as module
from app.stores.sqlite.backup import adopt, backup, restore
from app.stores.sqlite.database import Database
from app.stores.sqlite.integrity_check import full_findings
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.events import feedback, served
from tests.support.registry import FEATURES
from tests.support.small_disk import small_file_system
from tests.support.waiting import eventually

VOLUME = 4
SELECT_DATABASE_ID = "SELECT value FROM service WHERE name = 'database_id'"


def damage(path: Path) -> list[str]:
    """What is unsound in it, or half written."""
    with closing(sqlite3.connect(path)) as connection:
        return full_findings(connection)


def ask(path: Path, statement: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(statement).fetchall()


async def test_backup_is_one_moment_when_events_keep_coming(database_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    async with open_service(Settings(features=FEATURES, database=database_path), door="http") as service:
        now_ms = service.clock.now_ms() - 1_000
        stop = asyncio.Event()
        sent = 0

        async def produce() -> None:
            nonlocal sent
            while not stop.is_set():
                requests = [[served("ada", now_ms) for _ in range(20)] for _ in range(5)]
                admitted = [service.ingestor._admission.admit(events, now_ms + 1_000) for events in requests]
                await service.event_log.append(admitted)
                sent += sum(len(events) for events in admitted)

        producing = asyncio.create_task(produce())
        while sent < 500:
            await service.database.read(lambda connection: connection.execute("SELECT 1"))
        await asyncio.to_thread(backup, database_path, copy)
        stop.set()
        await producing
    (log,), (views,) = ask(copy, "SELECT COUNT(*) FROM event_log"), ask(copy, "SELECT COUNT(*) FROM tip_views")
    assert log == views
    assert 500 <= int(str(log[0])) <= sent + 100
    assert int(str(log[0])) % 100 == 0, "a commit was cut in two"
    assert damage(copy) == []


async def test_nothing_cached_before_is_read_when_a_backup_is_restored(
    database_path: Path, tmp_path: Path, valkey: EmbeddedServer
) -> None:
    settings = Settings(features=FEATURES, database=database_path, cache_url=valkey.url)
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


def test_restored_database_is_another_one(database_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    backup(database_path, copy)
    before = ask(database_path, SELECT_DATABASE_ID)
    assert ask(database_path, SELECT_DATABASE_ID) == before
    restore(copy, database_path)
    ids = [str(ask(path, SELECT_DATABASE_ID)[0][0]) for path in (database_path, copy)]
    assert len({str(before[0][0]), *ids}) == 3, "two databases have one id"


async def opened_id(path: Path) -> str:
    database = await Database.open(path, readers=1)
    await database.close()
    return database.id


async def test_copied_file_is_another_database(database_path: Path, tmp_path: Path) -> None:
    own = await opened_id(database_path)
    copy, backup_copy = tmp_path / "cp.db", tmp_path / "backup.db"
    shutil.copy(database_path, copy)
    backup(database_path, backup_copy)
    ids = [await opened_id(path) for path in (copy, backup_copy, copy, backup_copy, database_path)]
    assert ids == [*ids[:2], *ids[:2], own]
    assert len(set(ids)) == 3
    await asyncio.to_thread(database_path.rename, tmp_path / "moved.db")
    assert await opened_id(tmp_path / "moved.db") == own


async def test_adopted_database_has_a_new_id_and_is_otherwise_as_it_was(database_path: Path) -> None:
    before = await opened_id(database_path)
    content = ask(database_path, "SELECT * FROM sqlite_schema")
    adopt(database_path)
    after = await opened_id(database_path)
    assert after not in {before, ""}
    assert ask(database_path, "SELECT * FROM sqlite_schema") == content
    running = await Database.open(database_path, readers=1)
    with pytest.raises(Conflict, match="in use"):
        adopt(database_path)
    await running.close()
    assert await opened_id(database_path) == after


def test_a_database_that_is_damaged_or_absent_is_not_adopted(database_path: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="there is no database"):
        adopt(tmp_path / "absent.db")
    database_path.write_bytes(b"\xff\xd8" * 4_000)
    with pytest.raises(StoreUnavailable):
        adopt(database_path)


def modes(*paths: Path) -> list[str]:
    return [oct(path.stat().st_mode & 0o777) for path in paths]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o660])
def test_a_copy_is_readable_to_nobody_else(database_path: Path, tmp_path: Path, mode: int) -> None:
    copy, elsewhere = tmp_path / "copy.db", tmp_path / "new.db"
    database_path.chmod(mode)
    backup(database_path, copy)
    restore(copy, database_path)
    restore(copy, elsewhere)
    assert modes(copy, database_path, elsewhere) == [oct(mode)] * 3
    copy.chmod(0o644)
    restore(copy, database_path)
    assert modes(database_path) == [oct(mode)]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_owner_stays_when_root_makes_a_copy(database_path: Path, tmp_path: Path) -> None:
    os.chown(database_path, 1_234, 1_235)
    backup(database_path, tmp_path / "copy.db")
    os.chown(tmp_path / "copy.db", 0, 0)
    restore(tmp_path / "copy.db", database_path)
    for path in (database_path, tmp_path / "copy.db"):
        found = path.stat()
        assert (found.st_uid, found.st_gid) == ((1_234, 1_235) if path == database_path else (0, 0))


def test_a_half_copy_of_a_killed_backup_is_in_nobodys_way(database_path: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.db.part").write_bytes(b"half a copy")
    backup(database_path, tmp_path / "copy.db")
    assert damage(tmp_path / "copy.db") == []
    assert not (tmp_path / "copy.db.part").exists()


async def test_restore_deletes_no_log_of_a_process_that_opened_the_new_file(
    database_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy.db"
    backup(database_path, copy)
    writers: list[sqlite3.Connection] = []
    put = module._put

    def put_and_write(part: Path, target: Path, like: Path) -> None:
        put(part, target, like)
        writer = sqlite3.connect(target, isolation_level=None)
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("INSERT INTO service (name, value) VALUES ('written', 'at once')")
        writers.append(writer)

    monkeypatch.setattr(module, "_put", put_and_write)
    restore(copy, database_path)
    assert ask(database_path, "SELECT value FROM service WHERE name = 'written'") == [("at once",)]
    writers[0].close()
    assert ask(database_path, "SELECT value FROM service WHERE name = 'written'") == [("at once",)]


def test_restore_makes_the_database_when_there_is_none(database_path: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere" / "profiles.db"
    restore(database_path, target)
    assert ask(target, "SELECT COUNT(*) FROM event_log") == [(0,)]


async def test_restore_is_refused_when_the_service_runs(database_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    backup(database_path, copy)
    before = ask(database_path, SELECT_DATABASE_ID)
    async with open_service(Settings(features=FEATURES, database=database_path), door="http"):
        with pytest.raises(Conflict, match="in use"):
            restore(copy, database_path)
    assert ask(database_path, SELECT_DATABASE_ID) == before


def test_backup_is_refused_when_the_target_exists(database_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    copy.write_text("precious")
    with pytest.raises(Conflict, match="never overwrites"):
        backup(database_path, copy)
    assert copy.read_text() == "precious"


def test_restore_is_refused_when_the_source_is_no_database(database_path: Path, tmp_path: Path) -> None:
    source = tmp_path / "photo.jpg"
    source.write_bytes(b"\xff\xd8" * 4_000)
    with pytest.raises(InvalidInput, match="no sound database"):
        restore(source, database_path)
    assert ask(database_path, "SELECT COUNT(*) FROM event_log") == [(0,)]


def test_restore_is_refused_when_the_source_is_damaged(database_path: Path, tmp_path: Path) -> None:
    source = tmp_path / "damaged.db"
    backup(database_path, source)
    content = bytearray(source.read_bytes())
    content[4096 * 3 : 4096 * 5] = b"\x17" * 8192
    source.write_bytes(content)
    with pytest.raises(InvalidInput):
        restore(source, database_path)
    assert ask(database_path, "SELECT COUNT(*) FROM event_log") == [(0,)]


def test_restore_is_refused_when_the_source_is_of_another_revision(database_path: Path, tmp_path: Path) -> None:
    source = tmp_path / "newer.db"
    backup(database_path, source)
    with closing(sqlite3.connect(source)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(SchemaMismatch, match="newer"):
        restore(source, database_path)


async def test_backup_holds_what_was_acknowledged_before_it_when_writers_of_every_kind_go_on(
    database_path: Path, tmp_path: Path
) -> None:
    async with open_service(Settings(features=FEATURES, database=database_path), door="http") as service:
        now_ms = service.clock.now_ms() - 1_000
        stop = asyncio.Event()
        acknowledged: list[str] = []

        async def produce(user: str) -> None:
            while not stop.is_set():
                events = [(served if len(acknowledged) % 2 else feedback)(user, now_ms) for _ in range(7)]
                await service.event_log.append([service.ingestor._admission.admit(events, now_ms + 1_000)])
                acknowledged.extend(event.event_id for event in events)

        async def others() -> None:
            while not stop.is_set():
                await service.event_log.append([service.ingestor._admission.admit([served("gone", now_ms)], now_ms)])
                await service.users.erase("gone", now_ms)
                await service.event_log.mark_consumed(range_of(acknowledged), now_ms)

        writing = [asyncio.create_task(work) for work in (produce("ann"), produce("bob"), others())]
        for number in range(5):
            enough = len(acknowledged) + 100
            await eventually(lambda enough=enough: len(acknowledged) > enough, 20)  # type: ignore[misc]
            before = set(acknowledged)
            copy = tmp_path / f"copy-{number}.db"
            await asyncio.to_thread(backup, database_path, copy)
            held = {event_id for (event_id,) in ask(copy, "SELECT event_id FROM event_log WHERE user_id != 'gone'")}
            assert before <= held
            assert damage(copy) == []
            restore(copy, tmp_path / "restored.db")
            assert damage(tmp_path / "restored.db") == []
        stop.set()
        await asyncio.gather(*writing)


def range_of(events: list[str]) -> list[int]:
    """Their sequence numbers, more or less."""
    return list(range(1, len(events) + 1))


@pytest.mark.parametrize("damaged", ["header", "schema", "half"])
async def test_restore_mends_a_database_that_is_damaged_itself(
    database_path: Path, tmp_path: Path, damaged: str
) -> None:
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
    await (await Database.open(database_path, readers=1)).close()
    assert damage(database_path) == []


def overwrite(path: Path, content: bytes) -> None:
    """The file, and a log that belongs to what it was."""
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


def test_restore_is_refused_when_the_database_is_damaged_but_still_in_use(database_path: Path, tmp_path: Path) -> None:
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


DIE_IN_BETWEEN = """
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


async def test_old_log_is_not_played_back_when_restoring_dies_in_between(database_path: Path, tmp_path: Path) -> None:
    copy, crashed = tmp_path / "copy.db", tmp_path / "crashed.db"
    backup(database_path, copy)
    async with open_service(Settings(features=FEATURES, database=database_path), door="http") as service:
        await service.ingestor.ingest([served("ada", service.clock.now_ms() - 1_000) for _ in range(50)])
        for suffix in ("", "-wal"):  # as a crash leaves it: the events are in the log alone
            shutil.copyfile(f"{database_path}{suffix}", f"{crashed}{suffix}")
    command = [sys.executable, "-c", DIE_IN_BETWEEN, str(copy), str(crashed)]
    assert subprocess.run(command, check=False, timeout=60).returncode == -signal.SIGKILL  # noqa: ASYNC221
    assert ask(crashed, "SELECT COUNT(*) FROM event_log") == [(0,)]
    assert damage(crashed) == []


def test_nothing_is_left_of_a_backup_or_a_restore_when_there_is_no_room(database_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    backup(database_path, copy)
    with small_file_system(tmp_path / "small") as small:
        if small is None:
            pytest.skip("only root may mount a file system")
        restore(copy, small.directory / "profiles.db")
        small.fill()
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
