"""Backups are consistent while others write, and a restored one cannot be mixed up with what it replaced."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from app.assembly import open_service
from app.errors import Conflict, InvalidInput, SchemaMismatch
from app.settings import Settings
from app.stores.sqlite.backup import backup, restore
from app.stores.sqlite.database import SELECT_DATABASE_ID
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.events import served

VOLUME = 4


def ask(path: Path, statement: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(statement).fetchall()


async def test_backup_is_one_moment_when_events_keep_coming(database_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    async with open_service(Settings(database=database_path), door="http") as service:
        now_ms = service.clock.now_ms() - 1_000
        stop = asyncio.Event()
        sent = 0

        async def produce() -> None:
            nonlocal sent
            while not stop.is_set():
                requests = [[served("ada", now_ms) for _ in range(20)] for _ in range(5)]
                admitted = [service.ingestor._admission.admit(events, now_ms + 1_000) for events in requests]
                await service.log.append(admitted)
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
    assert ask(copy, "PRAGMA integrity_check") == [("ok",)]


async def test_nothing_cached_before_is_read_when_a_backup_is_restored(
    database_path: Path, tmp_path: Path, valkey: EmbeddedServer
) -> None:
    settings = Settings(database=database_path, cache_url=valkey.url)
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
    restore(copy, database_path)
    assert ask(database_path, SELECT_DATABASE_ID) != before
    assert ask(copy, SELECT_DATABASE_ID) == before


def test_restore_makes_the_database_when_there_is_none(database_path: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere" / "profiles.db"
    restore(database_path, target)
    assert ask(target, "SELECT COUNT(*) FROM event_log") == [(0,)]


async def test_restore_is_refused_when_the_service_runs(database_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    backup(database_path, copy)
    before = ask(database_path, SELECT_DATABASE_ID)
    async with open_service(Settings(database=database_path), door="http"):
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
