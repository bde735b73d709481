"""Tells a process which users have new events, and when it must clear its local cache of profiles in memory.

The log is written in the order of its sequence numbers, so new events have higher numbers than the last one seen. No
event shows that a user was erased, that values were rebuilt, or that a deletion of cache keys succeeded after it had
failed. Each of these advances the *local cache epoch*, a counter in the database, in its transaction or afterwards.
Every process that sees a new epoch clears its local cache (`app.profiles.online.local_cache`).

Invariant: a call of `changed_users` names the user of every event that was committed before the call began and that no
earlier call has covered. If the event was erased meanwhile, the call returns None instead.
"""

from __future__ import annotations

from collections.abc import Mapping

from app.features.events import KNOWN_SUBJECTS
from app.stores.sql.event_log import SELECT_POSITION
from app.stores.sql.local_cache_epoch import SELECT_LOCAL_CACHE_EPOCH
from app.stores.sqlite.data_version import DataVersion

# With more events than this, clearing the local cache is cheaper than handling each on the event loop's thread.
TAIL_CAP = 2_000
SELECT_TAIL = "SELECT seq, user_id FROM event_log WHERE seq > ? ORDER BY seq LIMIT ?"
_SUBJECTS = sorted(KNOWN_SUBJECTS)
SELECT_NEWEST = "SELECT EXISTS (SELECT 1 FROM owed_invalidations WHERE user_id = :user), " + ", ".join(
    f"(SELECT MAX(seq) FROM event_log WHERE user_id = :user AND subject = '{subject}')" for subject in _SUBJECTS
)


class SqliteChangeFeed:
    """The new events that this process has not seen. Implements `app.profiles.ports.ChangeFeed`."""

    def __init__(self, data_version: DataVersion) -> None:
        """Begin after the newest committed event. Raises `StoreUnavailable`."""
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
