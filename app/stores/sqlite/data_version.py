"""Finds out whether other connections have committed, and reads the state that every process observes.

Queries run on the event loop's thread: switching threads would cost more. While no other connection commits, `state`
runs only `PRAGMA data_version`. Invariant: a result was the committed state at some moment after the call began.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any, NamedTuple

from app.stores.sql.database import Parameters
from app.stores.sqlite.connection import connect, unavailable
from app.stores.sqlite.database import SqliteDatabase

BUSY_TIMEOUT_S = 0.02
UPDATE_REGISTRATION = """
UPDATE cache_registration SET server = ?, generation = generation + 1 WHERE generation = ?
"""
SELECT_DATA_VERSION = "PRAGMA data_version"
SELECT_STATE = """
SELECT EXISTS (SELECT 1 FROM owed_invalidations),
       (SELECT server FROM cache_registration), (SELECT generation FROM cache_registration),
       (SELECT json_group_array(json_array(feature, disabled_by, reason, disabled_at_ms)) FROM disabled_features)
"""


class State(NamedTuple):
    """The part of the database that every process observes, because another process may change it at any time.

    `owed`: a deletion of cache keys has failed and is still to be made. `server`: the identity of the server that is
    registered as the cache. `generation`: the number of this registration. `disabled`: the disabled features, as JSON
    of `app.profiles.availability.Disabled`.
    """

    owed: bool
    server: str | None
    generation: int
    disabled: str = "[]"


class DataVersion:
    """Notices the commits of other connections. One instance per process; close it when done. All methods raise
    `StoreUnavailable`."""

    def __init__(self, path: Path) -> None:
        self._connection = connect(path, read_only=True, busy_timeout_s=BUSY_TIMEOUT_S)
        self._version: int | None = None
        self.last = State(owed=True, server=None, generation=0)

    def state(self) -> State:
        """The current state. It is queried only if another connection has committed since the last query."""
        version = self.current()
        if version != self._version:
            owed, server, generation, disabled = self.row(SELECT_STATE)
            self.last, self._version = State(bool(owed), server, generation, disabled), version
        return self.last

    def any_owed(self) -> bool:
        return self.state().owed

    def disabled(self) -> str:
        """The disabled features as JSON, as of the last query. Every process queries at least once a second."""
        return self.last.disabled

    def current(self) -> int:
        """A number that changes whenever another connection commits."""
        version: int = self.row(SELECT_DATA_VERSION)[0]
        return version

    def row(self, statement: str, parameters: Parameters = ()) -> Any:
        return self.rows(statement, parameters)[0]

    def rows(self, statement: str, parameters: Parameters = ()) -> list[Any]:
        try:
            return self._connection.execute(statement, parameters).fetchall()
        except sqlite3.Error as error:
            raise unavailable(error) from error

    def close(self) -> None:
        self._connection.close()


class SqliteRegistrationRepository:
    """The registration of the cache server.

    Implements `app.stores.valkey.server_registration.RegistrationRepository`.
    """

    def __init__(self, database: SqliteDatabase, data_version: DataVersion) -> None:
        self._database = database
        self._data_version = data_version

    def current(self) -> tuple[str | None, int]:
        return self._data_version.last.server, self._data_version.last.generation

    def query(self) -> tuple[str | None, int]:
        state = self._data_version.state()
        return state.server, state.generation

    async def register(self, server: str, after: int) -> None:
        await self._database.execute(UPDATE_REGISTRATION, (server, after))
