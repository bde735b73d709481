"""The look: what a read must know before it believes the cache, from a connection kept for nothing else.

It runs on the caller's thread; a hop to another thread would cost more than the look. While no connection committed
since the last look, it costs one PRAGMA. Invariant: what a look returns was committed, and true, at some moment since
the look began.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import NamedTuple

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
    """One per process. Close it when done."""

    def __init__(self, path: Path) -> None:
        """Raises `StoreUnavailable` where the database cannot be opened."""
        self._connection = connect(path, read_only=True, busy_timeout_s=BUSY_TIMEOUT_S)
        self._version = -1
        self.last = State(owed=True, server=None, generation=None)

    def look(self) -> State:
        """Look now. Raises `StoreUnavailable`."""
        try:
            (version,) = self._connection.execute(SELECT_DATA_VERSION).fetchone()
            if version != self._version:  # some connection committed since
                owed, server, generation, disabled = self._connection.execute(SELECT_STATE).fetchone()
                self.last, self._version = State(bool(owed), server, generation, disabled), version
        except sqlite3.Error as error:
            self._version = -1
            raise unavailable(error) from error
        return self.last

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()
