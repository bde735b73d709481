"""The tail of the event log: whom the events committed since the last look are about.

It runs on the caller's thread, on a connection kept for it: while no connection committed since the last look it
costs one PRAGMA. The log is written in the order of its sequence numbers, so whatever is new lies above the last one
seen. Invariant: a look tells of every event that was committed before it began and of which no look has told; where
an event was erased before it could be told of, the look says that everything must be forgotten.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from pathlib import Path

from app.features.events import KNOWN_SUBJECTS
from app.stores.sqlite.connection import connect, unavailable
from app.stores.sqlite.data_version import BUSY_TIMEOUT_S, SELECT_DATA_VERSION
from app.stores.sqlite.local_cache_epoch import SELECT_RECALLS

# More events than this at once: to forget everything is cheaper than to go through them on the event loop's thread.
TAIL_CAP = 2_000
SELECT_POSITION = "SELECT COALESCE(MAX(seq), 0) FROM event_log"
SELECT_TAIL = "SELECT seq, user_id FROM event_log WHERE seq > ? ORDER BY seq LIMIT ?"
_SUBJECTS = sorted(KNOWN_SUBJECTS)
SELECT_NEWEST = "SELECT EXISTS (SELECT 1 FROM owed_invalidations WHERE user_id = :user), " + ", ".join(
    f"(SELECT MAX(seq) FROM event_log WHERE user_id = :user AND subject = '{subject}')" for subject in _SUBJECTS
)


class SqliteChangeFeed:
    """Implements `app.profiles.ports.EventTail`. Close it when done."""

    def __init__(self, path: Path) -> None:
        """Raises `StoreUnavailable` where the database cannot be opened."""
        self._connection = connect(path, read_only=True, busy_timeout_s=BUSY_TIMEOUT_S)
        self._version = -1
        self._recalls = ""
        self._position = 0
        self.look()  # what was committed before there was anything to forget

    def look(self) -> frozenset[str] | None:
        """Look now. Raises `StoreUnavailable`."""
        try:
            (version,) = self._connection.execute(SELECT_DATA_VERSION).fetchone()
            if version == self._version:
                return frozenset()
            # A commit between these statements changes the version again, so the next look comes here. The recalls
            # come after the tail: an erasure in between took no event away that the tail did not show.
            tail = self._connection.execute(SELECT_TAIL, (self._position, TAIL_CAP + 1)).fetchall()
            (recalls,) = self._connection.execute(SELECT_RECALLS).fetchone()
            all_gone = recalls != self._recalls or len(tail) > TAIL_CAP
            if all_gone:
                (self._position,) = self._connection.execute(SELECT_POSITION).fetchone()
            elif tail:
                self._position = tail[-1][0]
        except sqlite3.Error as error:
            self._version = -1
            raise unavailable(error) from error
        self._version, self._recalls = version, recalls
        return None if all_gone else frozenset(user_id for _, user_id in tail)

    def newest(self, user_id: str) -> Mapping[str, int] | None:
        """By subject; None while an invalidation is owed. Raises `StoreUnavailable`."""
        try:
            owed, *row = self._connection.execute(SELECT_NEWEST, {"user": user_id}).fetchone()
        except sqlite3.Error as error:
            raise unavailable(error) from error
        return None if owed else {subject: seq for subject, seq in zip(_SUBJECTS, row, strict=True) if seq is not None}

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()
