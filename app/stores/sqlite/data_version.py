"""The connection on which a process asks, on the event loop's thread, what other connections have committed.

A hop to another thread would cost more than the query. While no connection commits, each question costs one
`PRAGMA data_version`. Invariant: an answer was committed, and true, at some moment since the question was asked.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from app.stores.sqlite.connection import connect, unavailable

BUSY_TIMEOUT_S = 0.02
SELECT_DATA_VERSION = "PRAGMA data_version"
SELECT_STATE = """
SELECT EXISTS (SELECT 1 FROM owed_invalidations),
       (SELECT server FROM cache_registration), (SELECT generation FROM cache_registration),
       (SELECT json_group_array(json_array(feature, disabled_by, reason, disabled_at_ms)) FROM disabled_features)
"""


class State(NamedTuple):
    """Whether an invalidation is owed; which server is registered as the cache, under which generation; which features
    are disabled, as JSON of `app.profiles.availability.Disabled`."""

    owed: bool
    server: str | None
    generation: int | None
    disabled: str = "[]"


class DataVersion:
    """One per process. Close it when done. All methods raise `StoreUnavailable`."""

    def __init__(self, path: Path) -> None:
        self._connection = connect(path, read_only=True, busy_timeout_s=BUSY_TIMEOUT_S)
        self._version: int | None = None
        self.last = State(owed=True, server=None, generation=None)

    def state(self) -> State:
        """The state now."""
        version = self.current()
        if version != self._version:
            owed, server, generation, disabled = self.row(SELECT_STATE)
            self.last, self._version = State(bool(owed), server, generation, disabled), version
        return self.last

    def current(self) -> int:
        """A number that changes whenever another connection commits."""
        version: int = self.row(SELECT_DATA_VERSION)[0]
        return version

    def row(self, sql: str, parameters: Mapping[str, Any] | Sequence[Any] = ()) -> Any:
        """The only row."""
        return self.rows(sql, parameters)[0]

    def rows(self, sql: str, parameters: Mapping[str, Any] | Sequence[Any] = ()) -> list[Any]:
        try:
            return self._connection.execute(sql, parameters).fetchall()
        except sqlite3.Error as error:
            raise unavailable(error) from error

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()
