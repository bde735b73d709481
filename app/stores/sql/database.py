"""The interface through which repositories use the database, whichever engine it is. Repositories run one statement
with `rows`, `row` or `execute`, and several with `read` or `write`, or in a method that is decorated with `reads` or
`writes`. Their SQL runs on every engine: parameters are written `?` or `:name`, and lists are passed as JSON."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import cache, wraps
from typing import Any, ClassVar, Concatenate, Final, ParamSpec, Protocol, TypeAlias, TypeVar

from app.errors import SchemaMismatch, StoreFull
from app.profiles.ports import ObservedState
from app.telemetry import logger

P = ParamSpec("P")
R = TypeVar("R", bound="SqlRepository")
T = TypeVar("T")
SCHEMA_REVISION, OLDEST_REVISION = "0017", "0006"
# Read connections beyond those that compute features: for attempts to compute a failed feature, and health checks.
SPARE_READERS = 2
SELECT_REVISION = "SELECT version_num FROM alembic_version"
LOG_FULL_EVERY_S = 60.0
STILL_FULL_S = 5.0
# Each size makes one statement, which stays in the connection's cache. SQLite allows 32,766 values in one statement.
_ROWS_AT_ONCE = (256, 64, 16, 4, 1)
SERVICE: Final = None  # what a write can lock instead of users: all data of no particular user, such as rebuild runs
Parameters = Sequence[object] | Mapping[str, object]
UPSERT_SERVICE = """
INSERT INTO service (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value
WHERE service.value <> excluded.value
"""
log = logger("stores")


class Cursor(Protocol):
    @property
    def rowcount(self) -> int: ...
    @property
    def description(self) -> Any: ...
    def fetchone(self) -> Any: ...
    def fetchmany(self, size: int) -> list[Any]: ...
    def fetchall(self) -> list[Any]: ...
    def __iter__(self) -> Iterator[Any]: ...


class Connection(Protocol):
    """A connection of the driver, such as a `sqlite3.Connection`. `Database.read` and `write` pass it to `work`."""

    def execute(self, statement: str, parameters: Any = ..., /) -> Cursor: ...
    def executemany(self, statement: str, rows: Iterable[Any], /) -> Cursor: ...
    def rollback(self) -> None:
        """Roll back the transaction, if there is one."""


class Reader(Protocol):
    """A read-only connection, lent by `Readers.one`, with a thread of its own until it is given back. `closing`:
    whether the process is stopping, so that statements of the connection are interrupted."""

    @property
    def closing(self) -> bool: ...
    async def run(self, work: Callable[[Any], T], timeout_s: float = ..., /) -> T:
        """Call `work` with the connection, on the connection's thread. Interrupt the running statement after
        `timeout_s` seconds, or when the caller is cancelled."""


class Readers(Protocol):
    def one(self) -> AbstractAsyncContextManager[Reader]:
        """Lend an idle connection for the block. An engine error that leaves the block becomes `StoreUnavailable`."""

    def interrupt(self) -> None:
        """The process is stopping: interrupt running statements, and later statements soon after they begin."""


def check_revision(revision: str | None, database: object) -> None:
    """Raise `SchemaMismatch` unless `revision` is that of this program. It is None if the database is not migrated.
    `database` names the database in the error."""
    check_migratable(revision, database)
    if revision is None:
        raise SchemaMismatch(f"the database at {database} is not migrated; run `profiles migrate`")
    if revision < SCHEMA_REVISION:
        problem = f"is at revision {revision}, this program needs {SCHEMA_REVISION}; run `profiles migrate`"
        raise SchemaMismatch(f"the database at {database} {problem}")


def check_migratable(revision: str | None, database: object) -> None:
    """Raise `SchemaMismatch` if this program can neither use nor migrate a database at this revision."""
    if revision is not None and revision > SCHEMA_REVISION:
        problem = f"is newer ({revision}) than this program ({SCHEMA_REVISION}); upgrade the program"
        raise SchemaMismatch(f"the database at {database} {problem}")
    if revision is not None and revision < OLDEST_REVISION:
        raise SchemaMismatch(
            f"the database at {database} is at revision {revision}, which this program cannot migrate; "
            "first migrate it with a release of this project from before 2026-11-30"
        )


class Database(ABC):
    """A SQLite or PostgreSQL database. Every method raises `StoreUnavailable` if the database fails.

    `id` is part of every cache key, so values cached from another database are never read. `full`: whether the last
    write failed for lack of room; reads continue. `delete_lock`: statements that delete the row that `write` may have
    stored to lock a user; their parameter is the user's id. An erasure runs them last. `delete_unused_locks`:
    statements that delete such rows of all users without data; a write that began before an erasure can leave one.
    `announce_lock`: statements to execute before new names of features are stored. Until the commit, they block the
    transactions that store events. So every event stored afterwards invalidates these features, too.
    """

    begin_snapshot: ClassVar[str] = "BEGIN"  # a transaction in which all statements read one committed state
    delete_lock: ClassVar[tuple[str, ...]] = ()
    delete_unused_locks: ClassVar[tuple[str, ...]] = ()
    announce_lock: ClassVar[tuple[str, ...]] = ()
    full: bool = False
    readers: Readers
    state: ObservedState
    _full_at = _logged_full_at = float("-inf")
    _logged_full = False

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic

    @property
    def id(self) -> str:
        return self.state.last.database_id

    async def problem(self) -> str | None:
        """Why the database should not be used as it is, although it answers; None if all is well."""
        return "the disk is full: events and decisions are rejected, reads continue" if self.full else None

    def wrote(self, refused: StoreFull | None = None) -> None:
        """Note that a write succeeded, or was `refused` for lack of room. Log when refusals begin, at most once a
        minute, and when writes succeed again."""
        if refused is None and not self.full:
            return
        now = self._monotonic()
        if refused is not None:
            self._full_at = now
            if not self.full and now - self._logged_full_at >= LOG_FULL_EVERY_S:
                self._logged_full, self._logged_full_at = True, now
                log.error("database_full", error=str(refused), reads="continue")
        elif now - self._full_at < STILL_FULL_S:
            return  # a small write may fit although larger ones still do not
        elif self._logged_full:
            self._logged_full = False
            log.warning("database_has_room_again")
        self.full = refused is not None

    @abstractmethod
    async def close(self) -> None: ...

    async def read(self, work: Callable[[Connection], T], *, snapshot: bool = False) -> T:
        """Run `work` on the thread of a read-only connection. Its statements see the same committed state if `snapshot`
        is True; otherwise each may see a newer one."""

        def run(connection: Connection) -> T:
            if not snapshot:
                return work(connection)
            connection.execute(self.begin_snapshot)
            try:
                return work(connection)
            finally:
                connection.rollback()

        async with self.readers.one() as reader:
            return await reader.run(run)

    async def look(self, work: Callable[[Connection], T]) -> T:
        """Like `read`, for a `work` that reads only a few rows by key. With SQLite, `work` runs on the event loop's
        thread, which is faster. If that fails, because of a lock for example, `read` runs `work` again."""
        return await self.read(work)

    @abstractmethod
    async def write(self, work: Callable[[Connection], T], *, of: Collection[str] | None) -> T:
        """Run `work` in one durable transaction, on the thread of a writing connection. Raises `StoreFull` if the disk
        is full, and `StoreUnavailable`. After an error nothing was written, except in the cases that the engine's
        `write` describes. `of` names what the transaction locks first: the users with these ids, in sorted order, or
        `SERVICE`, for all data of no particular user. `of` must cover every row that `work` reads and then writes. It
        may be empty if each statement is atomic by itself. `work` must have no effects outside of the transaction,
        because it is called again after a deadlock."""

    async def rows(self, statement: str, parameters: Parameters = ()) -> list[Any]:
        return await self.read(lambda connection: connection.execute(statement, parameters).fetchall())

    async def row(self, statement: str, parameters: Parameters = ()) -> Any:
        """Read the first row of one statement; None if the result is empty."""
        return await self.read(lambda connection: connection.execute(statement, parameters).fetchone())

    async def value(self, statement: str, parameters: Parameters = ()) -> Any:
        """Read the first column of the first row of one statement; None if the result is empty."""
        row = await self.row(statement, parameters)
        return None if row is None else row[0]

    async def execute(self, statement: str, parameters: Parameters = ()) -> int:
        """Run one statement in a transaction. Return the number of rows that it changed."""
        return await self.write(lambda connection: connection.execute(statement, parameters).rowcount, of=())


def named_rows(connection: Connection, statement: str, parameters: Parameters) -> list[dict[str, Any]]:
    """The rows of a statement, each as a mapping by column."""
    cursor = connection.execute(statement, parameters)
    columns = [column[0] for column in cursor.description]
    return [dict(zip(columns, row, strict=True)) for row in cursor.fetchall()]


def insert_rows(connection: Connection, table: str, columns: str, rows: Sequence[Sequence[object]]) -> None:
    """Insert rows, with values in the order of `columns`, by few statements. On SQLite, each takes the GIL twice, which
    costs a fraction of a millisecond while the event loop is busy; `executemany` takes it twice per row."""
    start = 0
    for size in _ROWS_AT_ONCE:
        while len(rows) - start >= size:
            values = [value for row in rows[start : start + size] for value in row]
            connection.execute(insert_statement(table, columns, size), values)
            start += size


@cache
def insert_statement(table: str, columns: str, rows: int) -> str:
    row = f"({', '.join('?' for _ in columns.split(','))})"
    return f"INSERT INTO {table} ({columns}) VALUES {', '.join([row] * rows)}"


class SqlRepository:
    def __init__(self, database: Database) -> None:
        self._database = database


_Method: TypeAlias = Callable[Concatenate[R, Connection, P], T]
_Asynchronous: TypeAlias = Callable[Concatenate[R, P], Coroutine[Any, Any, T]]


def reads(method: _Method[R, P, T]) -> _Asynchronous[R, P, T]:
    """Make a method of a repository asynchronous. The method gets a connection: see `Database.read`."""

    @wraps(method)
    async def call(self: R, /, *arguments: P.args, **named: P.kwargs) -> T:
        return await self._database.read(lambda connection: method(self, connection, *arguments, **named))

    return call


def writes(*, of: Collection[str] | None) -> Callable[[_Method[R, P, T]], _Asynchronous[R, P, T]]:
    """As `reads`, but in a write transaction: see `Database.write`."""

    def decorated(method: _Method[R, P, T]) -> _Asynchronous[R, P, T]:
        @wraps(method)
        async def call(self: R, /, *arguments: P.args, **named: P.kwargs) -> T:
            return await self._database.write(lambda connection: method(self, connection, *arguments, **named), of=of)

        return call

    return decorated
