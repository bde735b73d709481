"""A PostgreSQL database as a process uses it: connections that read, and a few that write.

Invariants: a write is one transaction, whose first statements lock the users that it names, in sorted order, or the
service. It is committed when `write` returns, as durably as the server's `synchronous_commit` says, and rolled back
when `write` raises, unless the error says that the outcome of the commit is unknown. A deadlock, a serialization
failure and a connection that was lost before the commit do not reach the caller: the work is done again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import psycopg
from psycopg import errors

from app.errors import StoreFull, StoreUnavailable
from app.stores.postgres.connection import Connection, connect, unavailable
from app.stores.sql.database import SELECT_REVISION, Database, Scope, check_revision
from app.telemetry import logger

T = TypeVar("T")
WRITERS = 4
ATTEMPTS = 5
AGAIN = (errors.SerializationFailure, errors.DeadlockDetected)
log = logger("stores.postgres")

# The timeline changes when a standby is promoted, the system identifier when the data come from another cluster.
SELECT_ID = """
SELECT (SELECT value FROM service WHERE name = 'database_id')
    || ':' || (SELECT system_identifier FROM pg_control_system())
    || ':' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)
"""
LOCK_SERVICE = "SELECT 1 FROM service WHERE name = 'database_id' FOR UPDATE"
INSERT_USERS = "INSERT INTO users (user_id) SELECT unnest(CAST(? AS text[])) ON CONFLICT DO NOTHING"
LOCK_USERS = "SELECT 1 FROM users WHERE user_id = ANY(CAST(? AS text[])) ORDER BY user_id FOR UPDATE"


class Pool:
    """A fixed number of connections, opened on first use, and as many threads. All methods raise `StoreUnavailable`."""

    def __init__(self, url: str, size: int) -> None:
        self._url = url
        self._threads = ThreadPoolExecutor(size, "postgres")
        self._all: set[Connection] = set()
        # The connection used last has its plans and the server's caches warm. None stands for one to be opened.
        self._idle: asyncio.LifoQueue[Connection | None] = asyncio.LifoQueue()
        for _ in range(size):
            self._idle.put_nowait(None)
        self._abandoned: set[asyncio.Task[None]] = set()
        self._closed = False

    async def run(self, work: Callable[[Connection], T]) -> T:
        """Call `work` with an idle connection, on a thread. Cancelling the call cancels the running statement.

        If the connection has been idle and turns out to be lost, `work` is called again with a new one.
        """
        connection = await self._idle.get()
        if self._closed:
            self._idle.put_nowait(connection)
            raise StoreUnavailable("the database is closed")
        loop = asyncio.get_running_loop()
        holder = [connection]
        running = loop.run_in_executor(self._threads, self._run, holder, work)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            if not running.done():
                abandoned = asyncio.create_task(self._abandon(holder, running))
                self._abandoned.add(abandoned)
                abandoned.add_done_callback(self._abandoned.discard)
            raise
        finally:
            if running.done():
                self._idle.put_nowait(holder[0])

    async def _abandon(self, holder: list[Connection | None], running: asyncio.Future[Any]) -> None:
        """Cancel the running statement. The connection is idle afterwards, so that no later statement is cancelled."""
        if holder[0] is not None:
            await asyncio.to_thread(_cancel, holder[0])
        await asyncio.wait([running])
        running.cancelled() or running.exception()  # retrieved
        self._idle.put_nowait(holder[0])

    def _run(self, holder: list[Connection | None], work: Callable[[Connection], T]) -> T:
        reused = holder[0] is not None
        while True:
            connection = holder[0] or self._open()
            holder[0] = connection
            try:
                return work(connection)
            except psycopg.Error:
                if not connection.raw.closed:
                    raise
                if not reused:
                    raise
                reused = False  # it was lost while idle, or now: a new connection shows whether the server answers
            finally:
                if connection.raw.closed:
                    self._all.discard(connection)
                    holder[0] = None

    def _open(self) -> Connection:
        connection = connect(self._url)
        self._all.add(connection)
        if self._closed:
            connection.raw.close()
        return connection

    def interrupt(self) -> None:
        """Cancel the running statements: the process is stopping."""
        for connection in list(self._all):
            _cancel(connection)

    async def close(self) -> None:
        self._closed = True
        for connection in list(self._all):
            _cancel(connection)
        await asyncio.to_thread(self._threads.shutdown)
        if self._abandoned:
            await asyncio.wait(self._abandoned)
        for connection in self._all:
            connection.raw.close()
        self._all.clear()


class PostgresDatabase(Database):
    """A process's access to a database. Open it with `PostgresDatabase.open`, and close it with `close`."""

    delete_lock = ("DELETE FROM users WHERE user_id = ?",)

    def __init__(self, url: str, readers: int) -> None:
        self.url = url
        self.id = ""
        self.full = False
        # One more than the features use at a time, so that a health check never waits for a slow feature.
        self.readers = Pool(url, readers + 1)
        self._writers = Pool(url, WRITERS)

    @classmethod
    async def open(cls, url: str, readers: int) -> PostgresDatabase:
        """Open an existing, migrated database.

        Raises:
            StoreUnavailable: no server that accepts writes answers.
            SchemaMismatch: the database is not migrated, or newer than this program.
        """
        database = cls(url, readers)
        try:
            await database.read(check_schema)
            (database.id,) = await database.row(SELECT_ID)
        except BaseException:
            await database.close()
            raise
        return database

    async def read(self, work: Callable[[Connection], T], *, snapshot: bool = False) -> T:
        def run(connection: Connection) -> T:
            if not snapshot:
                return work(connection)
            connection.raw.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            try:
                return work(connection)
            finally:
                _roll_back(connection)

        try:
            return await self.readers.run(run)
        except psycopg.Error as error:
            raise unavailable(error) from error

    async def write(
        self, work: Callable[[Connection], T], *, of: Collection[str] | Scope, durable: bool = True, again: bool = False
    ) -> T:
        """If the connection is lost during the commit, nobody knows whether it was made. With `again`, the work is then
        done once more, so it must notice what it has written before.

        Raises:
            StoreUnavailable: nothing was written; or the outcome of the commit is unknown, as the message says.
        """
        users = sorted(set(of)) if not isinstance(of, Scope) else None
        try:
            result = await self._writers.run(lambda connection: _transact(connection, work, users, durable, again))
        except psycopg.IntegrityError:
            raise
        except psycopg.Error as error:
            refused = unavailable(error)
            if isinstance(refused, StoreFull) and not self.full:
                self.full = True
                log.error("database_full", error=str(error), reads="continue")
            raise refused from error
        if self.full:
            self.full = False
            log.warning("database_has_room_again")
        return result

    async def close(self) -> None:
        await self.readers.close()
        await self._writers.close()


def check_schema(connection: Connection) -> None:
    """Raise `SchemaMismatch` unless the database is at the schema revision of this program."""
    try:
        row = connection.execute(SELECT_REVISION).fetchone()
    except errors.UndefinedTable:
        row = None
    check_revision(str(row[0]) if row is not None else None, connection.raw.info.dbname)


def _transact(
    connection: Connection, work: Callable[[Connection], T], users: list[str] | None, durable: bool, again: bool
) -> T:
    for attempt in range(1, ATTEMPTS + 1):
        committing = False
        try:
            _begin(connection, users, durable)
            result = work(connection)
            committing = True
            connection.raw.execute("COMMIT")
            return result
        except AGAIN as error:
            _roll_back(connection)
            if attempt == ATTEMPTS:
                raise
            log.debug("transaction_repeated", error=type(error).__name__)
        except psycopg.OperationalError as error:
            if connection.raw.closed and committing and not again:
                text = "the connection was lost during a commit, which may have been made"
                raise StoreUnavailable(text) from error
            _roll_back(connection)
            raise
        except BaseException:
            _roll_back(connection)
            raise
    raise AssertionError("unreachable")


def _begin(connection: Connection, users: list[str] | None, durable: bool) -> None:
    """Begin a transaction and take its locks, in one round trip."""
    while True:
        with connection.raw.pipeline():
            connection.raw.execute("BEGIN")
            if not durable:
                connection.raw.execute("SET LOCAL synchronous_commit = off")
            if users is None:
                connection.execute(LOCK_SERVICE)
                locked: Any = None
            elif users:
                connection.execute(INSERT_USERS, (users,))
                locked = connection.execute(LOCK_USERS, (users,))
            else:
                locked = None
        if locked is None or locked.rowcount == len(users or ()):
            return
        # 1. Another transaction erases a user; 2. this one waits for the row; 3. the row is gone, and locks nothing.
        connection.raw.execute("ROLLBACK")


def _roll_back(connection: Connection) -> None:
    if not connection.raw.closed and connection.raw.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
        try:
            connection.raw.execute("ROLLBACK")
        except psycopg.Error:
            connection.raw.close()


def _cancel(connection: Connection) -> None:
    try:
        connection.raw.cancel_safe(timeout=1.0)
    except psycopg.Error as error:
        log.debug("statement_not_cancelled", error=str(error))
