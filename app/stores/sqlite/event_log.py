"""Stores events, in one transaction for many requests."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from functools import cache
from itertools import count

from app.events.ports import Admitted, Appended, ClashingEvent
from app.features.events import TipFeedback, subject_of
from app.stores.sql.event_log import EventKey, SqlEventLog, admit, event_key, features_by_subject
from app.stores.sql.registries import SELECT_FEATURE_KEYS
from app.stores.sqlite.database import SqliteDatabase

_KEYS = "SELECT value ->> 0, value ->> 1 FROM json_each(?)"
SELECT_KNOWN = f"SELECT user_id, event_id, digest FROM event_log WHERE (user_id, event_id) IN ({_KEYS})"
SELECT_LAST_SEQ = "SELECT seq FROM sqlite_sequence WHERE name = 'event_log'"
INSERT_LOG = """
INSERT INTO event_log
    (seq, event_id, subject, user_id, digest, occurred_at_ms, claimed_at_ms, received_at_ms, sent_by)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
INSERT_OUTBOX = "INSERT INTO outbox (seq, user_id, received_at_ms, traceparent) VALUES (?, ?, ?, ?)"
INSERT_VIEW = """
INSERT INTO tip_views (seq, user_id, tip_id, occurred_at_ms, utc_offset_min, received_at_ms, decision_id)
VALUES (?, ?, ?, ?, ?, ?, ?)
"""
INSERT_FEEDBACK = """
INSERT INTO tip_feedback
    (seq, user_id, tip_id, occurred_at_ms, utc_offset_min, received_at_ms, decision_id, action, dwell_ms)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
# Only the facts change: features read from them when an event was known. The log keeps the real arrival, from which
# lag and waiting times are measured.
UPDATE_HISTORICAL = tuple(
    f"""UPDATE {table} SET received_at_ms = occurred_at_ms WHERE received_at_ms > occurred_at_ms
        AND seq IN (SELECT seq FROM event_log WHERE (user_id, event_id) IN ({_KEYS}))"""
    for table in ("tip_views", "tip_feedback")
)
# Each size makes one statement, which stays in the connection's cache. SQLite allows 32,766 values in one statement.
_ROWS_AT_ONCE = (256, 64, 16, 4, 1)


class SqliteEventLog(SqlEventLog):
    """The log of all events. Implements `app.events.ports.EventLog`."""

    _database: SqliteDatabase

    async def append(self, requests: Sequence[Sequence[Admitted]]) -> list[Appended | ClashingEvent]:
        return await self._database.write(lambda connection: _append_all(connection, requests), of=())


def _append_all(
    connection: sqlite3.Connection, requests: Sequence[Sequence[Admitted]]
) -> list[Appended | ClashingEvent]:
    """Store the events of all requests, with few statements for all of them together: each statement waits for the
    GIL."""
    features = features_by_subject(connection.execute(SELECT_FEATURE_KEYS))
    keys = [event_key(item) for events in requests for item in events]
    known: dict[EventKey, bytes] = {
        (user_id, event_id): digest
        for user_id, event_id, digest in connection.execute(SELECT_KNOWN, (json.dumps(keys),))
    }
    # No other writer draws numbers: the write lock is held. AUTOINCREMENT records the highest explicit number.
    row = connection.execute(SELECT_LAST_SEQ).fetchone()
    numbers = count((row[0] if row else 0) + 1)
    found = admit(requests, known, features, lambda _: next(numbers))
    if found.fresh:
        _insert(connection, found.fresh)
    if found.historical:
        for statement in UPDATE_HISTORICAL:
            connection.execute(statement, (json.dumps(found.historical),))
    return found.outcomes


def _insert(connection: sqlite3.Connection, fresh: Sequence[tuple[int, Admitted]]) -> None:
    log_rows: list[tuple[object, ...]] = []
    waiting: list[tuple[object, ...]] = []
    views: list[tuple[object, ...]] = []
    feedback: list[tuple[object, ...]] = []
    for seq, item in fresh:
        event, digest, occurred_at_ms, offset_min, claimed_at_ms, received_at_ms, sent_by, _, traceparent = item
        subject = subject_of(event)
        times = (occurred_at_ms, claimed_at_ms, received_at_ms)
        log_rows.append((seq, event.event_id, subject, event.user_id, digest, *times, sent_by))
        waiting.append((seq, event.user_id, received_at_ms, traceparent))
        fact = (seq, event.user_id, event.tip_id, occurred_at_ms, offset_min, received_at_ms, event.decision_id)
        if isinstance(event, TipFeedback):
            feedback.append((*fact, event.action, event.dwell_ms))
        else:
            views.append(fact)
    _insert_rows(connection, INSERT_LOG, log_rows)
    _insert_rows(connection, INSERT_OUTBOX, waiting)
    _insert_rows(connection, INSERT_VIEW, views)
    _insert_rows(connection, INSERT_FEEDBACK, feedback)


def _insert_rows(connection: sqlite3.Connection, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
    """Insert many rows per statement. `executemany` takes the GIL twice per row. Each time costs a fraction of a
    millisecond while the event loop is busy, so that a commit of 2,000 events took seconds."""
    start = 0
    for size in _ROWS_AT_ONCE:
        while len(rows) - start >= size:
            values = [value for row in rows[start : start + size] for value in row]
            connection.execute(_with_rows(statement, size), values)
            start += size


@cache
def _with_rows(statement: str, size: int) -> str:
    """Extend an INSERT of one row to `size` rows. `statement` must end with the placeholders of its row."""
    row = statement[statement.rindex("(") :].strip()
    return statement.rstrip() + f", {row}" * (size - 1)
