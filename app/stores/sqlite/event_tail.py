"""The tail of the event log: whom the events committed since the last look are about.

It runs on the caller's thread, on a connection kept for it: while no connection committed since the last look it
costs one PRAGMA. The log is written in the order of its sequence numbers, so whatever is new lies above the last one
seen. Invariant: a look tells of every event that was committed before it began and of which no look has told.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from pathlib import Path

from app.features.events import KNOWN_SUBJECTS
from app.stores.sqlite.connection import connect, unavailable
from app.stores.sqlite.database import Database
from app.stores.sqlite.lookout import BUSY_TIMEOUT_S, SELECT_DATA_VERSION

# More events than this at once: to forget everything is cheaper than to go through them on the event loop's thread.
TAIL_CAP = 2_000
SELECT_POSITION = "SELECT COALESCE(MAX(seq), 0) FROM event_log"
SELECT_TAIL = "SELECT seq, user_id FROM event_log WHERE seq > ? ORDER BY seq LIMIT ?"
SELECT_RECALLS = "SELECT COALESCE((SELECT value FROM service WHERE name = 'recalls'), '0')"
UPSERT_RECALLS = """
INSERT INTO service (name, value) VALUES ('recalls', '1')
ON CONFLICT (name) DO UPDATE SET value = CAST(CAST(value AS INTEGER) + 1 AS TEXT)
"""
SELECT_NEWEST = "SELECT {}".format(
    ", ".join(
        f"(SELECT MAX(seq) FROM event_log WHERE user_id = :user AND subject = '{subject}')"
        for subject in sorted(KNOWN_SUBJECTS)
    )
)
_SUBJECTS = sorted(KNOWN_SUBJECTS)


class SqliteEventTail:
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
            # A commit between these statements changes the version again, so the next look comes here.
            (recalls,) = self._connection.execute(SELECT_RECALLS).fetchone()
            tail = self._connection.execute(SELECT_TAIL, (self._position, TAIL_CAP + 1)).fetchall()
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

    def newest(self, user_id: str) -> Mapping[str, int]:
        """By subject. Raises `StoreUnavailable`."""
        try:
            row = self._connection.execute(SELECT_NEWEST, {"user": user_id}).fetchone()
        except sqlite3.Error as error:
            raise unavailable(error) from error
        return {subject: seq for subject, seq in zip(_SUBJECTS, row, strict=True) if seq is not None}

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


async def recall(database: Database) -> None:
    """Let every process forget what it keeps near. Committed when this returns; raises `StoreUnavailable`."""
    await database.write(lambda connection: connection.execute(UPSERT_RECALLS))
