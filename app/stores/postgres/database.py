"""A process's connections to a PostgreSQL database: a pool for reads, and a few connections for writes. Invariants: a
write is one transaction. Its first statements lock the users that `of` names, in sorted order. For `SERVICE`, they lock
one row that stands for all data of no particular user. The transaction is committed when `write` returns, as durably as
the server's `synchronous_commit` says. It is rolled back when `write` raises, unless the error says that the outcome of
the commit is unknown. After a deadlock or a serialization failure, `work` is called again. If the connection is lost
before the commit, `work` is called once more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from contextlib import ExitStack, closing
from functools import partial
from typing import TypeVar

import psycopg
from psycopg import errors

from app.errors import StoreFull, StoreUnavailable
from app.stores.postgres.connection import Connection, connect, revision_of
from app.stores.postgres.observed_state import PostgresState
from app.stores.postgres.pool import Pool
from app.stores.sql.database import SPARE_READERS, Database, check_revision
from app.telemetry import logger

T = TypeVar("T")
WRITERS = 4
ATTEMPTS = 5
AGAIN = (errors.SerializationFailure, errors.DeadlockDetected)
log = logger("stores.postgres")

INSERT_USERS = "INSERT INTO users (user_id) SELECT unnest(CAST(? AS text[])) ON CONFLICT DO NOTHING"
LOCK_USERS = "SELECT 1 FROM users WHERE user_id = ANY(CAST(? AS text[])) ORDER BY user_id FOR UPDATE"
# Scalar subqueries, each of which searches an index; PostgreSQL would turn NOT EXISTS into joins of the whole tables.
DELETE_UNUSED = """
DELETE FROM users WHERE user_id IN (
    SELECT user_id FROM users
    WHERE (SELECT 1 FROM event_log WHERE event_log.user_id = users.user_id LIMIT 1) IS NULL
        AND (SELECT 1 FROM tip_scores WHERE tip_scores.user_id = users.user_id LIMIT 1) IS NULL
        AND (SELECT 1 FROM bandit_states WHERE bandit_states.user_id = users.user_id) IS NULL
    FOR UPDATE SKIP LOCKED
)
"""


class PostgresDatabase(Database):
    """A process's access to a database. Open it with `PostgresDatabase.open`, and close it with `close`."""

    begin_snapshot = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
    delete_lock = ("DELETE FROM users WHERE user_id = ?",)
    delete_unused_locks = (DELETE_UNUSED,)
    announce_lock = ("LOCK TABLE feature_keys IN EXCLUSIVE MODE",)

    readers: Pool
    state: PostgresState

    def __init__(self, url: str, readers: int) -> None:
        super().__init__()
        self.url = url
        self.state = PostgresState(url)
        self.readers = Pool(url, readers + SPARE_READERS, self.state)
        self._writers = Pool(url, WRITERS, self.state)

    @classmethod
    async def open(cls, url: str, readers: int) -> PostgresDatabase:
        """Open an existing, migrated database. Raises `StoreUnavailable` if no server that accepts writes answers, and
        `SchemaMismatch` if the database is not migrated, or newer than this program."""
        await asyncio.to_thread(_check_schema, url)
        database = cls(url, readers)
        try:
            await database.state.connect()
            await database.state.query()
        except BaseException:
            await database.close()
            raise
        return database

    async def write(
        self,
        work: Callable[[Connection], T],
        *,
        of: Collection[str] | None,
        first: Callable[[Connection], object] = lambda _: None,
        again: bool = False,
    ) -> T:
        """Run `work` in one transaction, after locking `of`: see `Database.write`. The statements that `first` executes
        are sent with the locks, and run after them; `work` can fetch their results. If the connection is lost during
        the commit, the outcome is unknown, and the method raises `StoreUnavailable`. If `again` is True, it repeats the
        transaction instead, and `work` must find out whether its first call was committed."""
        users = None if of is None else sorted(set(of))

        def transaction(connection: Connection) -> T:
            return _transact(connection, partial(_begin, connection, first, users), work, again)

        try:
            async with self._writers.one() as writer:
                result = await writer.run(transaction)
        except StoreFull as error:
            self.wrote(error)
            raise
        self.wrote()
        return result

    async def close(self) -> None:
        await self.readers.close()
        await self._writers.close()
        await self.state.close()


def _check_schema(url: str) -> None:
    with closing(connect(url)) as connection:
        check_revision(revision_of(connection), connection.raw.info.dbname)


def _transact(connection: Connection, begin: Callable[[], None], work: Callable[[Connection], T], again: bool) -> T:
    for attempt in range(1, ATTEMPTS + 1):
        committing = connection.unconfirmed = False
        try:
            begin()
            with ExitStack() as connection.ending:
                result = work(connection)
                committing = True
                connection.raw.execute("COMMIT")
            if connection.unconfirmed:
                raise StoreUnavailable("no standby has confirmed the commit in time; it may have been made")
            return result
        except BaseException as error:
            if committing and not again and connection.raw.closed and isinstance(error, psycopg.OperationalError):
                text = "the connection was lost during the commit, and it may have been made"
                raise StoreUnavailable(text) from error
            connection.rollback()
            if attempt == ATTEMPTS or not isinstance(error, AGAIN):
                raise
            log.debug("transaction_repeated", error=type(error).__name__)
    raise AssertionError("unreachable")


def _begin(connection: Connection, first: Callable[[Connection], object], users: list[str] | None) -> None:
    """Begin a transaction, lock these users and execute `first`, in one round trip. If `users` is None, lock the whole
    service by its row in the table `service`."""
    while True:
        with connection.raw.pipeline():
            locked = connection.raw.execute("BEGIN")
            if users is None:
                connection.execute("SELECT 1 FROM service WHERE name = 'database_id' FOR UPDATE")
            elif users:
                connection.execute(INSERT_USERS, (users,))
                locked = connection.execute(LOCK_USERS, (users,))
            first(connection)
        if not users or locked.rowcount == len(users):
            return
        # 1. Another transaction erases a user; 2. this one waits for the row; 3. the row is gone, and locks nothing.
        connection.raw.execute("ROLLBACK")
