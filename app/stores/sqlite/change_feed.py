"""The change feed of the event log: the users of the events committed since the last look.

The log is written in the order of its sequence numbers, so whatever is new lies above the last one seen. Invariant: a
look names every event that was committed before it began and that no look has named; if an event was erased before it
could be named, the look says that everything must be forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping

from app.features.events import KNOWN_SUBJECTS
from app.stores.sqlite.data_version import DataVersion
from app.stores.sqlite.local_cache_epoch import SELECT_RECALLS

# With more events than this, forgetting everything is cheaper than going through them on the event loop's thread.
TAIL_CAP = 2_000
SELECT_POSITION = "SELECT COALESCE(MAX(seq), 0) FROM event_log"
SELECT_TAIL = "SELECT seq, user_id FROM event_log WHERE seq > ? ORDER BY seq LIMIT ?"
_SUBJECTS = sorted(KNOWN_SUBJECTS)
SELECT_NEWEST = "SELECT EXISTS (SELECT 1 FROM owed_invalidations WHERE user_id = :user), " + ", ".join(
    f"(SELECT MAX(seq) FROM event_log WHERE user_id = :user AND subject = '{subject}')" for subject in _SUBJECTS
)


class SqliteChangeFeed:
    """Implements `app.profiles.ports.ChangeFeed`."""

    def __init__(self, database: DataVersion) -> None:
        """Raises `StoreUnavailable`."""
        self._database = database
        self._version: int | None = None
        self._recalls = ""
        self._position = 0
        self.changed_users()  # so that the first look after this names no older event

    def changed_users(self) -> frozenset[str] | None:
        """Look now. Raises `StoreUnavailable`."""
        version = self._database.current()
        if version == self._version:
            return frozenset()
        # A commit between these queries changes the version again, so the next look comes here. The recalls come after
        # the tail: an erasure in between took no event away that the tail did not show.
        tail = self._database.rows(SELECT_TAIL, (self._position, TAIL_CAP + 1))
        (recalls,) = self._database.row(SELECT_RECALLS)
        all_gone = recalls != self._recalls or len(tail) > TAIL_CAP
        if all_gone:
            (self._position,) = self._database.row(SELECT_POSITION)
        elif tail:
            self._position = tail[-1][0]
        self._version, self._recalls = version, recalls
        return None if all_gone else frozenset(user_id for _, user_id in tail)

    def newest(self, user_id: str) -> Mapping[str, int] | None:
        """By subject; None while an invalidation is owed. Raises `StoreUnavailable`."""
        owed, *row = self._database.row(SELECT_NEWEST, {"user": user_id})
        return None if owed else {subject: seq for subject, seq in zip(_SUBJECTS, row, strict=True) if seq is not None}
