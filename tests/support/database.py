"""Databases for tests. One of each engine is migrated per session; each test gets a copy with an id of its own.

A test of a module that is marked `both_engines` runs on SQLite and on PostgreSQL if it uses the fixture `store`, `site`
or `keyed`, itself or by another fixture; and on SQLite alone if it uses `database_path`. PostgreSQL's turn is part of
`make test` only.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import pytest

from app.settings.parsers import PostgresUrl
from app.settings.parsers import postgres_url as parsed
from app.stores.migrate import migrate
from app.stores.postgres.connection import connect
from app.stores.postgres.database import PostgresDatabase
from app.stores.postgres.event_log import PostgresEventLog
from app.stores.sql.database import Connection, Database, Parameters
from app.stores.sql.event_log import SqlEventLog
from app.stores.sqlite.database import SqliteDatabase
from app.stores.sqlite.event_log import SqliteEventLog
from tests.support.postgres import TABLES, ReusedDatabase

T = TypeVar("T")
NOBODY = 65_534
PARAMETRIZED = ("store", "site", "keyed")
WIPED = ("tip_views", "tip_feedback", "outbox", "event_log")


async def nothing() -> None:
    """Do nothing before a transaction."""


class InterruptedDatabase(Database):
    """A database that awaits a function ahead of each transaction."""

    def __init__(
        self,
        database: Database,
        before_read: Callable[[], Awaitable[None]],
        before_write: Callable[[], Awaitable[None]],
    ) -> None:
        self._database = database
        self._before_read = before_read
        self._before_write = before_write

    async def read(self, work: Callable[[Connection], T], *, snapshot: bool = False) -> T:
        await self._before_read()
        return await self._database.read(work, snapshot=snapshot)

    async def write(self, work: Callable[[Connection], T], *, of: Collection[str] | None) -> T:
        await self._before_write()
        return await self._database.write(work, of=of)

    async def close(self) -> None:
        """The test closes the database."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = metafunc.fixturenames
    asked = [name for name in PARAMETRIZED if name in found]
    if metafunc.definition.get_closest_marker("both_engines") and asked and "database_path" not in found:
        engines = ["sqlite", pytest.param("postgres", marks=pytest.mark.slow)]
        (name,) = asked
        metafunc.parametrize(name, engines, indirect=True)


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


async def wipe(database: Database) -> None:
    """Delete every event, between the examples of a property test; sequence numbers continue."""

    def work(connection: Connection) -> None:
        for table in WIPED:
            connection.execute(f"DELETE FROM {table}")

    await database.write(work, of=())


async def column(database: Database, sql: str, *parameters: object) -> list[object]:
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


def contents(store: Path | PostgresUrl) -> str:
    """Every row of a database."""
    if isinstance(store, Path):
        with closing(sqlite3.connect(store)) as file:
            return "\n".join(file.iterdump())
    with closing(connect(store.url).raw) as connection:
        tables = connection.execute(TABLES)
        rows = [
            connection.execute(f'SELECT CAST(found AS text) FROM "{name}" AS found').fetchall() for (name,) in tables
        ]
    return "\n".join(text for found in rows for (text,) in found)


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
def store(request: pytest.FixtureRequest) -> Path | PostgresUrl:
    """A migrated, empty database of one test, as `Settings.database` names it."""
    if getattr(request, "param", "sqlite") == "postgres":
        reused: ReusedDatabase = request.getfixturevalue("reused_database")
        return reused.emptied()
    path: Path = request.getfixturevalue("database_path")
    return path


@pytest.fixture
async def database(store: Path | PostgresUrl) -> AsyncIterator[Database]:
    """A migrated, empty database, opened with two readers."""
    opened = await open_database(store, readers=2)
    yield opened
    await opened.close()


async def open_database(store: Path | PostgresUrl, readers: int) -> SqliteDatabase | PostgresDatabase:
    if isinstance(store, Path):
        return await SqliteDatabase.open(store, readers)
    return await PostgresDatabase.open(store.url, readers)


async def open_again(database: Database) -> SqliteDatabase | PostgresDatabase:
    """The same database, as another process opens it."""
    assert isinstance(database, SqliteDatabase | PostgresDatabase)
    return await open_database(database.path if isinstance(database, SqliteDatabase) else parsed(database.url), 1)


def log_of(database: Database) -> SqlEventLog:
    """The event log of a database."""
    return SqliteEventLog(database) if isinstance(database, SqliteDatabase) else PostgresEventLog(database)


@pytest.fixture
def event_log(database: Database) -> SqlEventLog:
    return log_of(database)
