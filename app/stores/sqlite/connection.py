"""Opens SQLite connections: plain ones, and asynchronous ones that run statements on a thread of their own. Every
connection is in autocommit mode, with explicit transactions. None checkpoints automatically: SQLite before 3.51.3 can
corrupt a WAL when two connections checkpoint and write at once. Only `app.stores.sqlite.database` checkpoints, while it
holds the write lock."""

from __future__ import annotations

import asyncio
import math
import os
import pwd
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import TypeVar

import aiosqlite

from app.errors import StoreFull, StoreUnavailable
from app.stores.sql.database import SELECT_REVISION

T = TypeVar("T")
MIN_SQLITE = (3, 40, 0)
BUSY_TIMEOUT_S = 5.0
# Virtual-machine instructions between two checks of a statement's deadline: about ten milliseconds. Each check needs
# the GIL, which a busy event loop holds for up to five milliseconds.
INSTRUCTIONS_PER_CHECK = 500_000
KEPT_WAL_BYTES = 16 * 1024 * 1024
RESERVE_BYTES = 128 * 1024  # the index of the WAL takes 32 KiB of them
# In this order: a full disk, a quota or a limit of file sizes, no room for the index of the WAL.
NO_ROOM = frozenset({"SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE"})


class ThreadConnection(aiosqlite.Connection):
    """An aiosqlite connection that can also run a function, with many statements, in one call on its thread."""

    closing = False
    _overdue: Callable[[], bool] | None = None  # of the running call: whether its statement must stop

    @classmethod
    async def open(cls, path: Path, *, read_only: bool) -> ThreadConnection:
        """Open a connection with its own thread. It must be closed, or the interpreter does not exit."""
        opened = cls(lambda: connect(path, read_only=read_only), iter_chunk_size=64)
        await opened
        if read_only:
            await opened.run(lambda raw: raw.set_progress_handler(opened._must_stop, INSTRUCTIONS_PER_CHECK))
        return opened

    async def run(self, work: Callable[[sqlite3.Connection], T], timeout_s: float = math.inf) -> T:
        """Call `work` with the sqlite3 connection, on the connection's thread. Raises `StoreUnavailable` if it is
        closed. A statement of a read-only connection is interrupted after `timeout_s` seconds, when the caller is
        cancelled, and when the connection is closed. It then raises `sqlite3.OperationalError` (SQLITE_INTERRUPT). The
        connection stays usable: the next call waits some ten milliseconds, until the statement has ended."""
        if self._connection is None:
            raise StoreUnavailable("the database is closed")
        abandoned = False

        def watched(connection: sqlite3.Connection) -> T:
            deadline = monotonic() + timeout_s
            self._overdue = lambda: abandoned or monotonic() > deadline
            try:
                return work(connection)
            finally:
                self._overdue = None

        try:
            return await self._execute(watched, self._conn)  # type: ignore[no-untyped-call,no-any-return]
        except asyncio.CancelledError:
            abandoned = True
            raise

    def _must_stop(self) -> bool:
        return self.closing or (self._overdue is not None and self._overdue())

    async def close(self) -> None:
        """Interrupt the running statement and close the connection."""
        self.closing = True
        await super().close()


def check_rights(path: Path) -> None:
    """Raise `StoreUnavailable` unless this process may write to the database, its directory and its logs. A process
    that only reads needs these rights, too, because opening the database creates missing logs. Logs created by an
    account that may not write to the database would not be writable for the owner of the database."""
    effective = os.access in os.supports_effective_ids
    for file in (path, path.parent, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")):
        if file.exists() and not os.access(file, os.W_OK, effective_ids=effective):
            owner = _account(file.stat().st_uid)
            raise StoreUnavailable(
                f"the database at {path} cannot be used: {_account(os.geteuid())} may not write to {file}, which "
                f"belongs to {owner}; run the command as the owner of the database, or grant the right",
                "the account of this process may not write to its files",
            )


def _account(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def connect(path: Path, *, read_only: bool, busy_timeout_s: float = BUSY_TIMEOUT_S) -> sqlite3.Connection:
    """Open an existing database file. On a full disk, delete the file that `keep_reserve` has made, and try again.
    Raises `StoreUnavailable` if the file is missing or no database, cannot be opened, or may not be written."""
    if sqlite3.sqlite_version_info < MIN_SQLITE:
        raise StoreUnavailable(f"SQLite {sqlite3.sqlite_version} is too old; use SQLite 3.40 or later")
    if not path.is_file():
        raise StoreUnavailable(f"there is no database at {path}; run `profiles migrate` first")
    check_rights(path)
    try:
        return _connect(path, read_only, busy_timeout_s)
    except sqlite3.Error as error:
        if error_name(error) in NO_ROOM and _reserve(path).exists():
            _reserve(path).unlink(missing_ok=True)
            return connect(path, read_only=read_only, busy_timeout_s=busy_timeout_s)
        raise StoreUnavailable(f"cannot open the database at {path}: {error}") from error


def _connect(path: Path, read_only: bool, busy_timeout_s: float) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False, cached_statements=256
    )
    try:
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute("PRAGMA journal_mode = WAL")
        # A restart truncates the WAL to this size. Commits that overwrite the file take half as long as appends.
        connection.execute(f"PRAGMA journal_size_limit = {KEPT_WAL_BYTES}")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA cache_size = -16384")
        if read_only:
            connection.execute("PRAGMA query_only = ON")
    except BaseException:
        connection.close()
        raise
    return connection


def keep_reserve(path: Path) -> None:
    """Create a reserve file beside the database. On a full disk, `connect` deletes it to make room for the logs."""
    if not _reserve(path).exists():
        try:
            _reserve(path).write_bytes(os.urandom(RESERVE_BYTES))  # a sparse file of zeros might take no room
        except OSError:
            _reserve(path).unlink(missing_ok=True)


def _reserve(path: Path) -> Path:
    return path.with_name(path.name + "-reserve")


def revision_of(connection: sqlite3.Connection) -> str | None:
    exists = connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'alembic_version'").fetchone()
    row = connection.execute(SELECT_REVISION).fetchone() if exists else None
    return None if row is None else str(row[0])


def error_name(error: sqlite3.Error) -> str:
    """The name of SQLite's result code, such as `SQLITE_FULL`; empty if the driver raised the error itself."""
    return getattr(error, "sqlite_errorname", "")


def unavailable(error: sqlite3.Error) -> StoreUnavailable:
    """Convert an error (database locked, broken, missing, …) to `StoreUnavailable`; a full disk to `StoreFull`."""
    if error_name(error) in NO_ROOM:
        return StoreFull(f"the database has no room to write: {error}")
    return StoreUnavailable(f"the database does not answer: {error}")


class Readers:
    """A pool of read-only connections, each with its own thread. All methods raise `StoreUnavailable`."""

    def __init__(self) -> None:
        self._all: list[ThreadConnection] = []
        self._idle: asyncio.LifoQueue[ThreadConnection] = asyncio.LifoQueue()  # the last one used has warm pages

    async def open(self, path: Path, count: int) -> None:
        for _ in range(count):
            reader = await ThreadConnection.open(path, read_only=True)
            self._all.append(reader)
            self._idle.put_nowait(reader)

    @asynccontextmanager
    async def one(self) -> AsyncIterator[ThreadConnection]:
        reader = await self._idle.get()
        try:
            yield reader
        except sqlite3.DatabaseError as error:
            raise unavailable(error) from error
        finally:
            self._idle.put_nowait(reader)

    def interrupt(self) -> None:
        """The process is stopping: interrupt running statements, and later ones ten milliseconds after they begin."""
        for reader in self._all:
            reader.closing = True

    async def close(self) -> None:
        for reader in self._all:
            await reader.close()
        self._all.clear()
