"""Notices commits of other connections: reads the `State` that all processes share, and tells which users have new
events.

Queries run on the event loop's thread: switching threads would cost more. While no other connection commits, `look`
and `changed_users` run only `PRAGMA data_version`. Invariants: a result was the committed state at some moment after
the call began. A call of `changed_users` names the user of every event that was committed before the call began and
that no earlier call has covered. If the event was erased meanwhile, the call returns None instead.

The log is written in the order of its sequence numbers, so new events have higher numbers than the last one seen. No
event shows that a user was erased, that values were rebuilt, or that a deletion of cache keys succeeded after it had
failed. Each of these changes advances the *local cache epoch*, a counter in the database, in its own or a later
transaction. Every process that sees a new epoch clears its local cache (`app.profiles.online.local_cache`).
"""

import json
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from app.features.events import KNOWN_SUBJECTS
from app.profiles.ports import State
from app.stores.sql.cache_state import OWED_SLOTS, SELECT_LOCAL_CACHE_EPOCH
from app.stores.sql.database import Parameters
from app.stores.sql.event_log import SELECT_POSITION
from app.stores.sqlite.connection import connect, unavailable

T = TypeVar("T")
BUSY_TIMEOUT_S = 0.02
SELECT_STATE = f"""
WITH RECURSIVE {OWED_SLOTS}
SELECT (SELECT json_group_array(slot) FROM owed WHERE slot IS NOT NULL),
       (SELECT server FROM cache_registration), (SELECT generation FROM cache_registration),
       (SELECT json_group_array(json_array(feature, disabled_by, reason, disabled_at_ms)) FROM disabled_features)
"""
# With more events than this, clearing the local cache is cheaper than handling each on the event loop's thread.
TAIL_CAP = 2_000
SELECT_TAIL = "SELECT seq, user_id FROM event_log WHERE seq > ? ORDER BY seq LIMIT ?"
_SUBJECTS = sorted(KNOWN_SUBJECTS)
# An owed invalidation of any user counts: the table has no index by user, and many rows while the cache is away.
SELECT_NEWEST = "SELECT EXISTS (SELECT 1 FROM owed_invalidations), " + ", ".join(
    f"(SELECT MAX(seq) FROM event_log WHERE user_id = :user AND subject = '{subject}')" for subject in _SUBJECTS
)


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
        return int(self.row("PRAGMA data_version")[0])

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


class SqliteChangeFeed:
    """The new events that this process has not seen. Implements `app.profiles.ports.ChangeFeed`."""

    def __init__(self, data_version: DataVersion) -> None:
        """The feed begins after the newest committed event. Raises `StoreUnavailable`."""
        self._data_version = data_version
        self._version: int | None = None
        self._epoch = ""
        self._position = 0
        self.changed_users()  # the next call names only events that are committed from now on

    def changed_users(self) -> frozenset[str] | None:
        version = self._data_version.current()
        if version == self._version:
            return frozenset()
        # A commit between these queries changes the version again, so the next call queries again. The epoch is read
        # last: an erasure before it may have removed events from the tail, and has advanced the epoch.
        tail = self._data_version.rows(SELECT_TAIL, (self._position, TAIL_CAP + 1))
        (epoch,) = self._data_version.row(SELECT_LOCAL_CACHE_EPOCH)
        clear = epoch != self._epoch or len(tail) > TAIL_CAP
        if clear:
            (self._position,) = self._data_version.row(SELECT_POSITION)
        elif tail:
            self._position = tail[-1][0]
        self._version, self._epoch = version, epoch
        return None if clear else frozenset(user_id for _, user_id in tail)

    def newest(self, user_id: str) -> Mapping[str, int] | None:
        owed, *row = self._data_version.row(SELECT_NEWEST, {"user": user_id})
        return None if owed else {subject: seq for subject, seq in zip(_SUBJECTS, row, strict=True) if seq is not None}
