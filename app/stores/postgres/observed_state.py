"""Queries the `State` that all processes share (registered cache server, owed invalidations), on a connection of its
own. The event loop serves the connection, so a query waits for no thread and no other statement."""

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import psycopg

from app.concurrency.batcher import Batcher, Bounds
from app.concurrency.tasks import end
from app.errors import StoreUnavailable
from app.profiles.ports import State
from app.stores.postgres.connection import DATABASE_ID, SET_SESSION, connection_parameters, unavailable
from app.stores.postgres.pool import disconnect
from app.stores.sql.cache_state import OWED_SLOTS

TIMEOUT_S = 1.0
LATE = "the database does not answer in time"
BOUNDS = Bounds(kind="queries of the state", at_once=sys.maxsize, most=sys.maxsize)
SELECT_STATE = f"""
WITH RECURSIVE {OWED_SLOTS}
SELECT (SELECT CAST(COALESCE(json_agg(slot), '[]') AS text) FROM owed WHERE slot IS NOT NULL), server, generation,
       (SELECT CAST(COALESCE(json_agg(json_build_array(feature, disabled_by, reason, disabled_at_ms) ORDER BY feature),
                             '[]') AS text) FROM disabled_features),
       {DATABASE_ID}
FROM cache_registration
""".encode()


class PostgresState:
    """Implements `app.profiles.ports.ObservedState`. `State.database_id` changes when a standby is promoted or the
    database is restored. Close the object when done."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connecting: asyncio.Task[psycopg.AsyncConnection[Any]] | None = None  # its result is the connection
        self._queries: Batcher[None, State] = Batcher(self._query, time.monotonic, BOUNDS)
        self._closed = False
        self.last = State()

    def look(self) -> None:
        """Always returns None: a query takes a round trip, so callers must await `query`."""
        return

    async def connect(self) -> None:
        """Wait for the connection, without a limit. Each host that does not answer takes `connect_timeout`."""
        await asyncio.wait({self._connect()})

    async def query(self) -> State:
        """The state committed at some moment after the call began. Concurrent callers share a query that has not begun.
        Raises `StoreUnavailable` if no server that accepts writes answers in time."""
        return await self._queries.submit(None)

    async def close(self) -> None:
        self._closed = True
        await self._queries.close()
        await self._disconnect()

    async def _query(self, callers: Sequence[None]) -> list[State]:
        if self._closed:
            raise StoreUnavailable("the database is closed")
        reused = self._connecting is not None and self._connecting.done()
        try:
            try:
                self.last = await self._ask()
            except psycopg.OperationalError:
                if not reused:
                    raise
                self.last = await self._ask()  # it was lost while it was idle: another server may be the primary
        except psycopg.Error as error:
            raise unavailable(error) from error
        return [self.last] * len(callers)

    async def _ask(self) -> State:
        connecting = self._connect()
        if not connecting.done():
            await asyncio.wait({connecting}, timeout=TIMEOUT_S)
            if not connecting.done():
                raise StoreUnavailable(LATE)  # the next query waits for the same connection
        try:
            [row] = await (await _execute(connecting.result(), SELECT_STATE)).fetchall()
        except BaseException:
            await self._disconnect()
            raise
        return State(frozenset(json.loads(row[0])), *row[1:])

    def _connect(self) -> asyncio.Task[psycopg.AsyncConnection[Any]]:
        if self._connecting is None:
            self._connecting = asyncio.get_running_loop().create_task(self._open())
            self._connecting.add_done_callback(lambda done: done.cancelled() or done.exception())  # retrieved
        return self._connecting

    async def _open(self) -> psycopg.AsyncConnection[Any]:
        connection = await psycopg.AsyncConnection.connect(**connection_parameters(self._url))
        try:
            await _execute(connection, SET_SESSION)
        except BaseException:
            await connection.close()
            raise
        return connection

    async def _disconnect(self) -> None:
        connecting, self._connecting = self._connecting, None
        if connecting is not None:
            await end([connecting])
            if not connecting.cancelled() and connecting.exception() is None:
                await connecting.result().close()


async def _execute(connection: psycopg.AsyncConnection[Any], statement: bytes) -> psycopg.AsyncCursor[Any]:
    """Execute a statement. If the server does not answer in time, close the connection and raise `StoreUnavailable`."""
    loop = asyncio.get_running_loop()
    # psycopg needs ten seconds to cancel a statement of a server that is frozen.
    late = loop.call_later(TIMEOUT_S, disconnect, connection)
    try:
        return await connection.execute(statement)
    except psycopg.OperationalError as error:
        if loop.time() >= late.when():
            raise StoreUnavailable(LATE) from error
        raise
    finally:
        late.cancel()
