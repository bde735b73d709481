"""Finds out whether other connections have committed, and reads the `State` that all processes share (registered cache
server, owed invalidations, disabled features).

Queries run on the event loop's thread: switching threads would cost more. While no other connection commits, `look`
runs only `PRAGMA data_version`. Invariant: a result was the committed state at some moment after the call began.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from app.profiles.ports import State
from app.stores.sql.database import Parameters
from app.stores.sql.owed_invalidations import OWED_SLOTS
from app.stores.sqlite.connection import connect, unavailable

T = TypeVar("T")
BUSY_TIMEOUT_S = 0.02
SELECT_DATA_VERSION = "PRAGMA data_version"
SELECT_STATE = f"""
WITH RECURSIVE {OWED_SLOTS}
SELECT (SELECT json_group_array(slot) FROM owed WHERE slot IS NOT NULL),
       (SELECT server FROM cache_registration), (SELECT generation FROM cache_registration),
       (SELECT json_group_array(json_array(feature, disabled_by, reason, disabled_at_ms)) FROM disabled_features)
"""


class DataVersion:
    """Notices the commits of other connections. One instance per process; close it when done. All methods raise
    `StoreUnavailable`. Implements `app.profiles.ports.ObservedState`."""

    def __init__(self, path: Path) -> None:
        self._connection = connect(path, read_only=True, busy_timeout_s=BUSY_TIMEOUT_S)
        self._version: int | None = None
        self.last = State()

    def look(self) -> State:
        """The current state. Its tables are read only if another connection has committed since the last call."""
        version = self.current()
        if version != self._version:
            owed, server, generation, disabled = self.row(SELECT_STATE)
            self.last = State(frozenset(json.loads(owed)), server, generation, disabled, self.last.database_id)
            self._version = version
        return self.last

    async def query(self) -> State:
        return self.look()

    def current(self) -> int:
        """A number that changes whenever another connection commits."""
        version: int = self.row(SELECT_DATA_VERSION)[0]
        return version

    def row(self, statement: str, parameters: Parameters = ()) -> Any:
        return self.rows(statement, parameters)[0]

    def rows(self, statement: str, parameters: Parameters = ()) -> list[Any]:
        return self.run(lambda connection: connection.execute(statement, parameters).fetchall())

    def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Call `work` with the connection, on the caller's thread."""
        try:
            return work(self._connection)
        except sqlite3.Error as error:
            raise unavailable(error) from error

    def close(self) -> None:
        self._connection.close()
