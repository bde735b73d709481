"""The SQLite database of one process: a few read-only connections, one for writes, and one for checkpoints. Invariants:
a write is one transaction on the writer's thread. It is committed when `write` returns, durably (`synchronous=FULL`) by
default, and rolled back when `write` raises. A checkpoint runs only on the writer's thread, on a second connection,
while the writer holds the write lock of the file, so that no process writes meanwhile."""

from __future__ import annotations

import asyncio
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Collection
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

from app.errors import StoreFull, StoreUnavailable
from app.profiles.ports import State
from app.stores.sql.database import SPARE_READERS, UPSERT_SERVICE, Database, check_revision
from app.stores.sqlite.connection import (
    BUSY_TIMEOUT_S,
    Readers,
    ThreadConnection,
    check_rights,
    connect,
    keep_reserve,
    revision_of,
    unavailable,
)
from app.stores.sqlite.data_version import DataVersion
from app.stores.sqlite.integrity_check import findings
from app.telemetry import logger

T = TypeVar("T")
CHECKPOINT_FRAMES = 1_000  # a frame is a page: 4 MB
WAL_HEADER_BYTES, FRAME_HEADER_BYTES = 32, 24  # https://sqlite.org/fileformat2.html#walformat
log = logger("stores.sqlite")

SELECT_SERVICE = "SELECT name, value FROM service WHERE name IN ('database_id', 'inode')"


def draw_id(connection: sqlite3.Connection) -> str:
    """Give the database a new id, in the current transaction. Values cached under the old one are not read again."""
    database_id = secrets.token_hex(16)
    connection.execute("UPDATE service SET value = ? WHERE name = 'database_id'", (database_id,))
    return database_id


def check_schema(connection: sqlite3.Connection, path: Path) -> None:
    """Raise `SchemaMismatch` unless the database is at the schema revision of this program."""
    try:
        check_revision(revision_of(connection), path)
    except sqlite3.DatabaseError as error:
        raise unavailable(error) from error


class SqliteDatabase(Database):
    """A process's access to the database file. Open it with `SqliteDatabase.open`, and close it with `close`. A copy of
    the file gets a new `id` when it is first opened. `links`: the number of hard links at the last check.
    `checkpoints`: the number of checkpoints tried."""

    readers: Readers
    state: DataVersion

    def __init__(self, path: Path, monotonic: Callable[[], float], checkpoint_frames: int) -> None:
        super().__init__(monotonic)
        self.path = path
        self.links = 1
        self.checkpoints = 0
        self._file = path.stat()
        self.readers = Readers()
        self.state = DataVersion(path)
        self._writer: ThreadConnection | None = None
        self._write_lock = asyncio.Lock()
        self._checkpointer = connect(path, read_only=False)
        self._checkpoint_frames = self._checkpoint_at = checkpoint_frames
        self._wal: int | None = None  # a file descriptor
        self._wal_salts = b""

    @classmethod
    async def open(
        cls,
        path: Path,
        readers: int,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        checkpoint_frames: int = CHECKPOINT_FRAMES,
    ) -> SqliteDatabase:
        """Open an existing, migrated database. A write checkpoints whenever the WAL has grown by `checkpoint_frames`.
        Raises `StoreUnavailable` if the file cannot be opened, has several hard links, or is damaged, and
        `SchemaMismatch` if the database is not migrated, or newer than this program."""
        _check(path)
        database = cls(path, monotonic, checkpoint_frames)
        try:
            await database.readers.open(path, readers + SPARE_READERS)
            database._writer = await ThreadConnection.open(path, read_only=False)
            database.state.last = State(database_id=await database._own_id())
            await asyncio.to_thread(keep_reserve, path)
        except BaseException:
            await database.close()
            raise
        return database

    async def read(self, work: Callable[[Any], T], *, snapshot: bool = False) -> T:
        return await super().read(lambda connection: self._from_open_file(work(connection)), snapshot=snapshot)

    async def look(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            return self._from_open_file(self.state.run(work))
        except StoreUnavailable:  # a thread can wait for a lock, as the event loop must not
            return await self.read(work)

    async def write(self, work: Callable[[sqlite3.Connection], T], *, of: Collection[str] | None) -> T:
        """Run `work` in one transaction: see `Database.write`. `of` is unused: SQLite has one writer at a time.
        `StoreUnavailable` can also mean that another file has taken the place of the database: the commit then went to
        the old file, which no process will open again."""
        async with self._write_lock:
            if self._writer is None:
                raise StoreUnavailable("the database is closed")
            try:
                result = await self._writer.run(
                    lambda connection: self._from_open_file(self._transact(connection, work))
                )
            except sqlite3.IntegrityError:
                raise
            except sqlite3.DatabaseError as error:
                refused = unavailable(error)
                if isinstance(refused, StoreFull):
                    self.wrote(refused)
                raise refused from error
            self.wrote()
            return result

    async def _own_id(self) -> str:
        """The id of this database. If the id was stored with another inode, this file is a copy and gets a new id."""
        inode = str(self._file.st_ino)

        def claim(connection: sqlite3.Connection) -> str:
            stored = dict(connection.execute(SELECT_SERVICE).fetchall())
            if stored.get("inode", inode) != inode:
                stored["database_id"] = draw_id(connection)
                log.warning("database_is_a_copy", database=str(self.path), effect="values cached before are not read")
            connection.execute(UPSERT_SERVICE, ("inode", inode))
            return str(stored["database_id"])

        stored = dict(await self.rows(SELECT_SERVICE))
        if stored.get("inode") == inode:
            return str(stored["database_id"])
        try:
            return await self.write(claim, of=())
        except StoreFull:
            if "inode" in stored:
                raise
            return str(stored["database_id"])

    def _from_open_file(self, result: T) -> T:
        """Return `result`, or raise `StoreUnavailable` if the path no longer leads to the open file. Only `stat` is
        called: opening and closing the file would drop the locks of every connection of this process."""
        try:
            found = self.path.stat()
        except OSError:
            how = "removed"
        else:
            if os.path.samestat(found, self._file):
                self.links = found.st_nlink
                return result
            how = "replaced by another file"
        text = f"its file was {how} after this process opened it; restart the process"
        raise StoreUnavailable(f"the database does not answer: {text}", text)

    async def problem(self) -> str | None:
        if self.links > 1:
            return f"its file has {self.links} names (hard links); remove all but one: each has its own write-ahead log"
        await asyncio.to_thread(check_rights, self.path)
        return await super().problem()

    async def close(self) -> None:
        await self.readers.close()
        self.state.close()
        if self._writer is not None:
            writer, self._writer = self._writer, None
            await writer.close()
        self._checkpointer.close()
        if self._wal is not None:
            os.close(self._wal)
            self._wal = None

    def _transact(self, connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], T]) -> T:
        with connection:  # commits, or rolls back
            connection.execute("BEGIN IMMEDIATE")
            result = work(connection)
        self._checkpoint_if_large(connection)
        return result

    def _checkpoint_if_large(self, writer: sqlite3.Connection) -> None:
        # A restart of the WAL keeps its file, so the size of the file does not tell how many frames are in use. A frame
        # is in use if it has the salts of the header: a restart changes them and overwrites the first frames.
        try:
            if self._wal is None:
                # Closing it drops no lock: SQLite locks only the database file and its `-shm` file.
                self._wal = os.open(self.path.with_name(self.path.name + "-wal"), os.O_RDONLY)
            header = os.pread(self._wal, WAL_HEADER_BYTES, 0)
            frame_bytes, salts = FRAME_HEADER_BYTES + int.from_bytes(header[8:12], "big"), header[16:24]
            if salts != self._wal_salts:
                self._wal_salts, self._checkpoint_at = salts, self._checkpoint_frames
            start = WAL_HEADER_BYTES + (self._checkpoint_at - 1) * frame_bytes
            frame = os.pread(self._wal, FRAME_HEADER_BYTES, start)
        except OSError as error:
            log.debug("checkpoint_put_off", error=str(error))
            return
        if salts and frame[8:16] == salts:
            # While a reader keeps the WAL from restarting, only some commits pay for a checkpoint.
            self._checkpoint_at = max(self._checkpoint_at, self._checkpoint(writer)) + self._checkpoint_frames

    def _checkpoint(self, writer: sqlite3.Connection) -> int:
        """Checkpoint, and return the number of frames in the WAL; 0 if the checkpoint fails."""
        # 1. BEGIN IMMEDIATE takes the write lock; 2. a PASSIVE checkpoint copies frames; 3. ROLLBACK releases the lock.
        # Without 1, a writer in another process could reset the WAL during 2.
        self.checkpoints += 1
        try:
            # The caller of `write` waits meanwhile: skip the checkpoint if another process writes.
            writer.execute("PRAGMA busy_timeout = 0")
            writer.execute("BEGIN IMMEDIATE")
            try:
                [(_, frames, _)] = self._checkpointer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
                return int(frames)
            finally:
                writer.execute("ROLLBACK")
        except sqlite3.DatabaseError as error:
            log.debug("checkpoint_put_off", error=str(error))
            return 0
        finally:
            writer.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}")


def _check(path: Path) -> None:
    if path.is_file() and (links := path.stat().st_nlink) > 1:  # each has a log of its own
        raise StoreUnavailable(f"the database at {path} has {links} names (hard links); remove all but one")
    with closing(connect(path, read_only=True)) as connection:
        check_schema(connection, path)
        if found := findings(connection, whole=False):
            raise StoreUnavailable(
                f"the database at {path} is damaged: {found[0]}; run `profiles doctor --full` for the details "
                "and `profiles restore` to replace it by a backup"
            )
