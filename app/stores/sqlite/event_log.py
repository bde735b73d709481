"""Stores events in the event log and their contents in the fact tables.

Invariants: an event is in `event_log` if and only if its row is in `tip_views` or `tip_feedback` under the same `seq`.
A later commit has higher `seq`s. None is reused, even after pruning (AUTOINCREMENT keeps the high-water mark).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta, timezone
from functools import cache
from typing import Any

from app.events.ports import Admitted, Appended, ClashingEvent
from app.features.clock import EPOCH, MILLISECOND
from app.features.events import LoggedEvent, TipEvent, TipFeedback, TipServed, stored_action, subject_of
from app.stores.sqlite.database import Database

# An event's key: its user and its id, which is unique among the events of the user.
_KEYS = "SELECT value ->> 0, value ->> 1 FROM json_each(?)"
SELECT_KNOWN = f"SELECT user_id, event_id, digest FROM event_log WHERE (user_id, event_id) IN ({_KEYS})"
SELECT_LAST_SEQ = "SELECT seq FROM sqlite_sequence WHERE name = 'event_log'"
SELECT_FEATURE_KEYS = "SELECT subject, json_group_array(feature) FROM feature_keys GROUP BY subject"
INSERT_LOG = """
INSERT INTO event_log
    (seq, event_id, subject, user_id, digest, occurred_at_ms, claimed_at_ms, received_at_ms, consumed_at_ms,
     sent_by)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
INSERT_VIEW = """
INSERT INTO tip_views (seq, user_id, tip_id, occurred_at_ms, utc_offset_min, received_at_ms, decision_id)
VALUES (?, ?, ?, ?, ?, ?, ?)
"""
INSERT_FEEDBACK = """
INSERT INTO tip_feedback
    (seq, user_id, tip_id, occurred_at_ms, utc_offset_min, received_at_ms, decision_id, action, dwell_ms)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_Key = tuple[str, str]
# Each size makes one statement, which stays in the connection's cache. SQLite allows 32,766 values in one statement.
_ROWS_AT_ONCE = (256, 64, 16, 4, 1)
EVENT_COLUMNS = """log.seq, log.event_id, log.subject, log.user_id, COALESCE(log.claimed_at_ms, log.occurred_at_ms),
       log.received_at_ms, log.attempts,
       COALESCE(view.tip_id, feedback.tip_id), COALESCE(view.utc_offset_min, feedback.utc_offset_min),
       COALESCE(view.decision_id, feedback.decision_id), feedback.action, feedback.dwell_ms"""
EVENT_JOINS = """LEFT JOIN tip_views AS view ON view.seq = log.seq
LEFT JOIN tip_feedback AS feedback ON feedback.seq = log.seq"""
LOGGED = f"""
SELECT {EVENT_COLUMNS}
FROM event_log AS log
{EVENT_JOINS}
"""
SELECT_UNCONSUMED = (
    LOGGED + "WHERE log.consumed_at_ms IS NULL AND log.received_at_ms < ? ORDER BY log.received_at_ms, log.seq LIMIT ?"
)
SELECT_UNCONSUMED_AHEAD = (
    LOGGED + "WHERE log.consumed_at_ms IS NULL AND log.received_at_ms > ? ORDER BY log.received_at_ms, log.seq LIMIT ?"
)
SELECT_LOGGED = (
    LOGGED + "WHERE log.consumed_at_ms IS NULL AND log.seq IN (SELECT value FROM json_each(?)) ORDER BY log.seq"
)
UPDATE_CONSUMED = """
UPDATE event_log SET consumed_at_ms = ?
WHERE consumed_at_ms IS NULL AND seq IN (SELECT value FROM json_each(?))
"""
# Only the facts change: features read from them when an event was known. The log keeps the real arrival, from which
# lag and waiting times are measured.
UPDATE_HISTORICAL = tuple(
    f"""UPDATE {table} SET received_at_ms = occurred_at_ms WHERE received_at_ms > occurred_at_ms
        AND seq IN (SELECT seq FROM event_log WHERE (user_id, event_id) IN ({_KEYS}))"""
    for table in ("tip_views", "tip_feedback")
)
SELECT_OLDEST = "SELECT MIN(occurred_at_ms) FROM event_log"
SELECT_PRUNABLE = "SELECT seq FROM event_log WHERE occurred_at_ms < ? ORDER BY occurred_at_ms LIMIT ?"
DELETE_BY_SEQ = tuple(
    f"DELETE FROM {table} WHERE seq IN (SELECT value FROM json_each(?))"
    for table in ("tip_views", "tip_feedback", "event_log")
)


class SqliteEventLog:
    """The log of all events. Implements `app.events.ports.EventLog`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def append(
        self, requests: Sequence[Sequence[Admitted]], consumed_at_ms: int | None = None
    ) -> list[Appended | ClashingEvent]:
        """Store the events of all requests in one transaction. If `consumed_at_ms` is given, they are stored as
        consumed at that time, so that no worker consumes them."""
        return await self._database.write(lambda connection: _append_all(connection, requests, consumed_at_ms))

    async def unconsumed(
        self, received_before_ms: int, limit: int, *, or_after_ms: int | None = None
    ) -> list[LoggedEvent]:
        def work(connection: sqlite3.Connection) -> list[LoggedEvent]:
            events = logged_events(connection, SELECT_UNCONSUMED, (received_before_ms, limit))
            if or_after_ms is not None and len(events) < limit:
                events += logged_events(connection, SELECT_UNCONSUMED_AHEAD, (or_after_ms, limit - len(events)))
            return events

        return await self._database.read(work)

    async def logged(self, seqs: Sequence[int]) -> list[LoggedEvent]:
        return await self._database.read(
            lambda connection: logged_events(connection, SELECT_LOGGED, (json.dumps(seqs),))
        )

    async def mark_consumed(self, seqs: Sequence[int], now_ms: int) -> None:
        await self._database.execute(UPDATE_CONSUMED, (now_ms, json.dumps(seqs)))

    async def stale_features(self, subjects: Collection[str]) -> Mapping[str, frozenset[str]]:
        known = await self._database.read(_features_by_subject)
        return {subject: known.get(subject, frozenset()) for subject in subjects}

    async def oldest_ms(self) -> int | None:
        (oldest_ms,) = await self._database.row(SELECT_OLDEST)
        return None if oldest_ms is None else int(oldest_ms)

    async def prune(self, before_ms: int, limit: int) -> int:
        def work(connection: sqlite3.Connection) -> int:
            seqs = [seq for (seq,) in connection.execute(SELECT_PRUNABLE, (before_ms, limit))]
            for statement in DELETE_BY_SEQ:
                connection.execute(statement, (json.dumps(seqs),))
            return len(seqs)

        return await self._database.write(work)


def _features_by_subject(connection: sqlite3.Connection) -> dict[str, frozenset[str]]:
    rows = connection.execute(SELECT_FEATURE_KEYS).fetchall()
    return {subject: frozenset(json.loads(features)) for subject, features in rows}


def _append_all(
    connection: sqlite3.Connection, requests: Sequence[Sequence[Admitted]], consumed_at_ms: int | None
) -> list[Appended | ClashingEvent]:
    """Find the new events of each request, then insert those of all requests together: every statement waits for the
    GIL. A request stores nothing if one of its events reuses a known id with different content."""
    features = _features_by_subject(connection)
    keys = [_key(item) for events in requests for item in events]
    known: dict[_Key, bytes] = {
        (user_id, event_id): digest
        for user_id, event_id, digest in connection.execute(SELECT_KNOWN, (json.dumps(keys),))
    }
    # No other writer draws numbers: the write lock is held. AUTOINCREMENT records the highest explicit number.
    row = connection.execute(SELECT_LAST_SEQ).fetchone()
    first = (row[0] if row else 0) + 1
    fresh: list[Admitted] = []
    historical: list[_Key] = []
    outcomes: list[Appended | ClashingEvent] = []
    for events in requests:
        own = _fresh(events, known)
        if isinstance(own, ClashingEvent):
            outcomes.append(own)
            continue
        known.update((_key(item), item.digest) for item in own)
        seqs = tuple(range(first + len(fresh), first + len(fresh) + len(own)))
        outcomes.append(Appended(len(own), len(events) - len(own), seqs, _stale(events, features)))
        fresh += own
        historical += [_key(item) for item in events if item.historical]
    if fresh:
        _insert(connection, first, fresh, consumed_at_ms)
    if historical:
        for statement in UPDATE_HISTORICAL:
            connection.execute(statement, (json.dumps(historical),))
    return outcomes


def _key(item: Admitted) -> _Key:
    return item.event.user_id, item.event.event_id


def _fresh(events: Sequence[Admitted], known: Mapping[_Key, bytes]) -> list[Admitted] | ClashingEvent:
    """The unstored events of a request, each once; or the first event that reuses a known id with different content."""
    own: dict[_Key, Admitted] = {}
    for index, item in enumerate(events):
        key = _key(item)
        stored = own[key].digest if key in own else known.get(key)
        if stored is None:
            own[key] = item
        elif stored != item.digest:
            return ClashingEvent(index, item.event.event_id)
    return list(own.values())


def _stale(events: Sequence[Admitted], features: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    stale: dict[str, frozenset[str]] = {}
    for item in events:
        user_id = item.event.user_id
        touched = features.get(subject_of(item.event), frozenset())
        stale[user_id] = stale[user_id] | touched if user_id in stale else touched
    return stale


def _insert(connection: sqlite3.Connection, first: int, fresh: Sequence[Admitted], consumed_at_ms: int | None) -> None:
    log_rows: list[tuple[object, ...]] = []
    views: list[tuple[object, ...]] = []
    feedback: list[tuple[object, ...]] = []
    for seq, item in enumerate(fresh, start=first):
        event, digest, occurred_at_ms, offset_min, claimed_at_ms, received_at_ms, sent_by, _ = item
        subject = subject_of(event)
        times = (occurred_at_ms, claimed_at_ms, received_at_ms, consumed_at_ms)
        log_rows.append((seq, event.event_id, subject, event.user_id, digest, *times, sent_by))
        fact = (seq, event.user_id, event.tip_id, occurred_at_ms, offset_min, received_at_ms, event.decision_id)
        if isinstance(event, TipFeedback):
            feedback.append((*fact, event.action, event.dwell_ms))
        else:
            views.append(fact)
    for statement, rows in ((INSERT_LOG, log_rows), (INSERT_VIEW, views), (INSERT_FEEDBACK, feedback)):
        if rows:
            _insert_rows(connection, statement, rows)


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


def logged_events(connection: sqlite3.Connection, statement: str, parameters: tuple[object, ...]) -> list[LoggedEvent]:
    """Run a statement that selects `EVENT_COLUMNS`, and decode its rows."""
    return [logged_event(row) for row in connection.execute(statement, parameters).fetchall()]


def logged_event(row: Sequence[Any]) -> LoggedEvent:
    """Decode an event from a row of `EVENT_COLUMNS`."""
    return LoggedEvent(row[0], _event(row), row[5], row[6])


def _event(row: Sequence[object]) -> TipEvent:
    _, event_id, subject, user_id, claimed_at_ms, _, _, tip_id, offset_min, decision_id, action, dwell_ms = row
    zone = timezone(timedelta(minutes=_whole(offset_min)))
    common = {
        "event_id": event_id,
        "user_id": user_id,
        "tip_id": tip_id,
        "occurred_at": (EPOCH + _whole(claimed_at_ms) * MILLISECOND).astimezone(zone),
        "decision_id": decision_id,
    }
    if subject == "signals.tip.served":
        return TipServed(**common)  # type: ignore[arg-type]  # columns of a STRICT table
    return TipFeedback(**common, action=stored_action(str(action)), dwell_ms=dwell_ms)  # type: ignore[arg-type]


def _whole(value: object) -> int:
    assert isinstance(value, int)
    return value
