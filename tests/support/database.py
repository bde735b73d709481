"""Databases for tests. One is migrated per session; each test gets a copy with an id of its own."""

from __future__ import annotations

import itertools
import os
import shutil
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from app.stores.migrate import migrate
from app.stores.sql.database import Parameters
from app.stores.sqlite.database import SqliteDatabase
from app.stores.sqlite.event_log import SqliteEventLog

NOBODY = 65_534
WIPED = ("tip_views", "tip_feedback", "event_log")


def copy_database(template: Path, path: Path, database_id: str) -> Path:
    """Copy a database to `path` with an id of its own, as if no process had opened it there."""
    shutil.copyfile(template, path)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")  # a copy need not survive a power cut
        connection.execute("UPDATE service SET value = ? WHERE name = 'database_id'", (database_id,))
        connection.execute("DELETE FROM service WHERE name = 'inode'")
    return path


@contextmanager
def as_another_account(path: Path) -> Iterator[None]:
    """In the block, this process can read but not write the database, and can write to its directory."""
    path.chmod(0o644)
    path.parent.chmod(0o777)
    if os.geteuid() == 0:
        os.seteuid(NOBODY)
    else:
        path.chmod(0o444)
    try:
        yield
    finally:
        os.seteuid(os.getuid())
        path.chmod(0o644)


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A directory that every account of this machine can use, unlike `tmp_path`."""
    with TemporaryDirectory(prefix="profiles-test-") as directory:
        Path(directory).chmod(0o777)
        yield Path(directory)


def used_bytes(wal: Path) -> int:
    """The end of the frames in use. The file may be larger: SQLite keeps it, and begins again with the first frame."""
    content = wal.read_bytes()
    salts, frame_bytes = content[16:24], 24 + int.from_bytes(content[8:12], "big")
    end = min(32, len(content))
    while end + frame_bytes <= len(content) and content[end + 8 : end + 16] == salts:
        end += frame_bytes
    return end


async def wipe(database: SqliteDatabase) -> None:
    """Delete every event, between the examples of a property test; sequence numbers continue."""

    def work(connection: sqlite3.Connection) -> None:
        for table in WIPED:
            connection.execute(f"DELETE FROM {table}")

    await database.write(work, of=())


async def column(database: SqliteDatabase, sql: str, *parameters: object) -> list[object]:
    """The first column of a statement's rows."""
    return [row[0] for row in await database.rows(sql, parameters)]


def query_plan(path: Path, sql: str, parameters: Parameters = ()) -> list[str]:
    """The steps of a statement's query plan."""
    with closing(sqlite3.connect(path)) as connection:
        return [str(step) for *_, step in connection.execute("EXPLAIN QUERY PLAN " + sql, parameters)]


def steps(connection: sqlite3.Connection, sql: str, parameters: Parameters) -> int:
    """Tens of virtual-machine instructions that a statement takes."""
    taken = itertools.count()
    connection.set_progress_handler(lambda: next(taken) < 0, 10)
    connection.execute(sql, parameters).fetchall()
    connection.set_progress_handler(None, 0)
    return next(taken)


@pytest.fixture(scope="session")
def migrated_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database that is only copied."""
    path = tmp_path_factory.mktemp("template") / "profiles.db"
    migrate(path)
    return path


@pytest.fixture
def database_path(migrated_template: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A migrated, empty database file of one test."""
    return copy_database(migrated_template, tmp_path / "profiles.db", f"database of {request.node.name}")


@pytest.fixture
async def database(database_path: Path) -> AsyncIterator[SqliteDatabase]:
    """`database_path`, opened with two readers."""
    opened = await SqliteDatabase.open(database_path, readers=2)
    yield opened
    await opened.close()


@pytest.fixture
def event_log(database: SqliteDatabase) -> SqliteEventLog:
    return SqliteEventLog(database)
