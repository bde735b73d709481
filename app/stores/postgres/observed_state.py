"""Queries the `State` that all processes share (registered cache server, owed invalidations), on a connection of its
own. The event loop serves the connection, so a query waits for no thread and no other statement."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import psycopg

from app.concurrency.batcher import Batcher, Bounds
from app.errors import StoreUnavailable
from app.profiles.ports import State
from app.stores.postgres.connection import (
    CONNECT_TIMEOUT_S,
    DATABASE_ID,
    SET_SESSION,
    connection_parameters,
    unavailable,
)
from app.stores.sql.cache_state import OWED_SLOTS

TIMEOUT_S = 1.0
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
    """Queries the `State` that all processes share. Implements `app.profiles.ports.ObservedState`.

    `State.database_id` changes when a standby is promoted or the database is restored. Close the object when done.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: psycopg.AsyncConnection[Any] | None = None
        self._queries: Batcher[None, State] = Batcher(self._query, time.monotonic, BOUNDS)
        self._closed = False
        self.last = State()

    def look(self) -> None:
        """Always returns None: a query takes a round trip, so callers must await `query`."""
        return

    async def query(self) -> State:
        """The state committed at some moment after the call began. Concurrent callers share a query that has not begun.

        Raises:
            StoreUnavailable: no server that accepts writes answers in time.
        """
        return await self._queries.submit(None)

    async def close(self) -> None:
        self._closed = True
        await self._queries.close()
        await self._disconnect()

    async def _query(self, callers: Sequence[None]) -> list[State]:
        if self._closed:
            raise StoreUnavailable("the database is closed")
        reused = self._connection is not None
        try:
            try:
                self.last = await self._ask()
            except (psycopg.OperationalError, StoreUnavailable):
                if not reused:
                    raise
                self.last = await self._ask()  # it was lost while it was idle: another server may be the primary
        except psycopg.Error as error:
            raise unavailable(error) from error
        return [self.last] * len(callers)

    async def _ask(self) -> State:
        try:
            if self._connection is None:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    self._connection = await psycopg.AsyncConnection.connect(**connection_parameters(self._url))
                    await self._connection.execute(SET_SESSION)
            async with asyncio.timeout(TIMEOUT_S):
                row = await (await self._connection.execute(SELECT_STATE)).fetchone()
        except TimeoutError:
            await self._disconnect()
            raise StoreUnavailable("the database does not answer in time") from None
        except BaseException:
            await self._disconnect()
            raise
        assert row is not None
        return State(frozenset(json.loads(row[0])), *row[1:])

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()
