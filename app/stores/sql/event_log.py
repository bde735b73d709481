"""The log of all events: their contents, which ones no worker has consumed, and the pruning of old ones.

Invariants: an event is in `event_log` if and only if its row is in `tip_views` or `tip_feedback` under the same `seq`.
A later event of a user has a higher `seq`. No `seq` is reused, even after pruning. An event is in `outbox` until a
worker has consumed it.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta, timezone
from typing import Any, NamedTuple

from app.events.ports import Admitted, Appended, ClashingEvent
from app.features.clock import EPOCH, MILLISECOND
from app.features.events import KNOWN_SUBJECTS, SERVED, LoggedEvent, TipFeedback, TipServed, stored_action, subject_of
from app.stores.sql.database import Connection, SqlRepository, reads
from app.stores.sql.registries import SELECT_FEATURE_KEYS

# An event's key: its user and its id, which is unique among the events of the user.
EventKey = tuple[str, str]
EVENT_COLUMNS = """log.seq, log.event_id, log.subject, log.user_id, COALESCE(log.claimed_at_ms, log.occurred_at_ms),
       log.received_at_ms,
       COALESCE(view.tip_id, feedback.tip_id), COALESCE(view.utc_offset_min, feedback.utc_offset_min),
       COALESCE(view.decision_id, feedback.decision_id), feedback.action, feedback.dwell_ms"""
_FACT = "seq, user_id, tip_id, occurred_at_ms, utc_offset_min, received_at_ms, decision_id"
# The columns that an INSERT of a new event sets, by table.
COLUMNS = {
    "event_log": "seq, event_id, subject, user_id, digest, occurred_at_ms, claimed_at_ms, received_at_ms, sent_by",
    "outbox": "seq, user_id, received_at_ms, traceparent",
    "tip_views": _FACT,
    "tip_feedback": f"{_FACT}, action, dwell_ms",
}
# Every join names the user, so that an event is found in one partition.
EVENT_JOINS = """LEFT JOIN tip_views AS view ON view.user_id = log.user_id AND view.seq = log.seq
LEFT JOIN tip_feedback AS feedback ON feedback.user_id = log.user_id AND feedback.seq = log.seq"""
LOGGED = f"""
SELECT {EVENT_COLUMNS}, outbox.attempts, outbox.traceparent
FROM outbox
JOIN event_log AS log ON log.user_id = outbox.user_id AND log.seq = outbox.seq
{EVENT_JOINS}
"""
_OLDEST_FIRST = "ORDER BY outbox.received_at_ms, outbox.seq LIMIT ?"
SELECT_UNCONSUMED = f"{LOGGED} WHERE outbox.received_at_ms < ? {_OLDEST_FIRST}"
SELECT_UNCONSUMED_AHEAD = f"{LOGGED} WHERE outbox.received_at_ms > ? {_OLDEST_FIRST}"
_SEQS = "seq IN (SELECT CAST(value AS BIGINT) FROM json_each(?))"
SELECT_LOGGED = f"{LOGGED} WHERE outbox.{_SEQS} ORDER BY outbox.seq"
DELETE_CONSUMED = f"DELETE FROM outbox WHERE {_SEQS}"
SELECT_POSITION = "SELECT COALESCE(MAX(seq), 0) FROM event_log"
SELECT_OLDEST = "SELECT MIN(occurred_at_ms) FROM event_log"
SELECT_PRUNABLE = "SELECT user_id, seq FROM event_log WHERE occurred_at_ms < ? ORDER BY occurred_at_ms LIMIT ?"
FINDINGS = 10
# Violations of the first invariant.
SELECT_FAULTS = f"""
SELECT seq, 'has no fact' FROM event_log AS log
WHERE NOT EXISTS (SELECT 1 FROM tip_views AS view WHERE view.user_id = log.user_id AND view.seq = log.seq)
    AND NOT EXISTS (SELECT 1 FROM tip_feedback AS told WHERE told.user_id = log.user_id AND told.seq = log.seq)
UNION ALL
SELECT seq, 'has no row in the log' FROM (
    SELECT user_id, seq FROM tip_views UNION ALL SELECT user_id, seq FROM tip_feedback
) AS facts
WHERE NOT EXISTS (SELECT 1 FROM event_log AS log WHERE log.user_id = facts.user_id AND log.seq = facts.seq)
LIMIT {FINDINGS}
"""
# For a FROM clause: the rows of a JSON array of `EventKey`, which is the parameter.
KEYS = "(SELECT value ->> 0 AS user_id, value ->> 1 AS event_id FROM json_each(?)) AS key"
UPDATE_HISTORICAL = tuple(
    f"""UPDATE {table} AS fact SET received_at_ms = fact.occurred_at_ms
        FROM {KEYS} JOIN event_log AS log ON log.user_id = key.user_id AND log.event_id = key.event_id
        WHERE fact.user_id = log.user_id AND fact.seq = log.seq AND fact.received_at_ms > fact.occurred_at_ms"""
    for table in ("tip_views", "tip_feedback")
)
DELETE_EVENTS = tuple(
    f"DELETE FROM {table} WHERE (user_id, seq) IN (SELECT value ->> 0, CAST(value ->> 1 AS BIGINT) FROM json_each(?))"
    for table in ("outbox", "tip_views", "tip_feedback", "event_log")
)


class SqlEventLog(SqlRepository, ABC):
    """The log of all events. Implements `app.events.ports.EventLog`."""

    @abstractmethod
    async def append(self, requests: Sequence[Sequence[Admitted]]) -> list[Appended | ClashingEvent]:
        """Store the events of all requests in one transaction; return one result per request, in order. A request with
        an event that clashes with a stored one is not stored, and its result is the `ClashingEvent`."""

    @reads
    def unconsumed(
        self, connection: Connection, received_before_ms: int, limit: int, *, or_after_ms: int | None = None
    ) -> list[LoggedEvent]:
        events = logged_events(connection, SELECT_UNCONSUMED, (received_before_ms, limit))
        if or_after_ms is not None and len(events) < limit:
            events += logged_events(connection, SELECT_UNCONSUMED_AHEAD, (or_after_ms, limit - len(events)))
        return events

    @reads
    def logged(self, connection: Connection, seqs: Sequence[int]) -> list[LoggedEvent]:
        return logged_events(connection, SELECT_LOGGED, (json.dumps(seqs),))

    async def mark_consumed(self, seqs: Sequence[int]) -> None:
        await self._database.execute(DELETE_CONSUMED, (json.dumps(seqs),))

    async def stale_features(self) -> Mapping[str, frozenset[str]]:
        return features_by_subject(await self._database.rows(SELECT_FEATURE_KEYS))

    async def oldest_ms(self) -> int | None:
        oldest_ms: int | None = await self._database.value(SELECT_OLDEST)
        return oldest_ms

    async def prune(self, before_ms: int, limit: int) -> int:
        events = await self._database.rows(SELECT_PRUNABLE, (before_ms, limit))

        def work(connection: Connection) -> int:
            counts = [connection.execute(statement, (json.dumps(events),)).rowcount for statement in DELETE_EVENTS]
            return counts[-1]

        return await self._database.write(work, of={user_id for user_id, _ in events})


def features_by_subject(rows: Iterable[tuple[str, str]]) -> dict[str, frozenset[str]]:
    """Map each subject (kind of event) to the features that it invalidates. `rows`: those of `SELECT_FEATURE_KEYS`."""
    found: dict[str, set[str]] = {subject: set() for subject in KNOWN_SUBJECTS}
    for subject, feature in rows:
        found.setdefault(subject, set()).add(feature)
    return {subject: frozenset(features) for subject, features in found.items()}


def event_key(item: Admitted) -> EventKey:
    return item.event.user_id, item.event.event_id


class Admission(NamedTuple):
    """What a transaction stores: the outcome of each request, the new events with their sequence numbers, and the keys
    of all events marked as historical, including those that were stored before."""

    outcomes: list[Appended | ClashingEvent]
    fresh: list[tuple[int, Admitted]]
    historical: list[EventKey]


def admit(
    requests: Sequence[Sequence[Admitted]],
    known: dict[EventKey, bytes],
    feature_keys: Iterable[tuple[str, str]],
    number: Callable[[EventKey], int],
) -> Admission:
    """Decide what to store of each request: its new events, or nothing if one of its events reuses a known id with
    different content. `known` maps the keys of stored events to their digests; the new events are added to it.
    `feature_keys`: the rows of `SELECT_FEATURE_KEYS`. `number` draws a sequence number."""
    features = features_by_subject(feature_keys)
    found = Admission([], [], [])
    for events in requests:
        own = new_events(events, known)
        if isinstance(own, ClashingEvent):
            found.outcomes.append(own)
            continue
        known.update((event_key(item), item.digest) for item in own)
        numbered = [(number(event_key(item)), item) for item in own]
        stale: dict[str, frozenset[str]] = {}
        for item in events:
            user_id, touched = item.event.user_id, features[subject_of(item.event)]
            stale[user_id] = stale[user_id] | touched if user_id in stale else touched
        found.outcomes.append(Appended(len(own), len(events) - len(own), tuple(seq for seq, _ in numbered), stale))
        found.fresh.extend(numbered)
        found.historical.extend(event_key(item) for item in events if item.historical)
    return found


def mark_historical(connection: Connection, keys: Sequence[EventKey]) -> None:
    """Set the arrival time of historical events back to their event time in `tip_views` and `tip_feedback`, which
    features read. `event_log` keeps the real arrival time, from which lag and waiting times are measured."""
    for statement in UPDATE_HISTORICAL if keys else ():
        connection.execute(statement, (json.dumps(keys),))


def new_events(events: Sequence[Admitted], known: Mapping[EventKey, bytes]) -> list[Admitted] | ClashingEvent:
    """The unstored events of a request, each once; or the first event that reuses a known id with different content."""
    own: dict[EventKey, Admitted] = {}
    for index, item in enumerate(events):
        key = event_key(item)
        stored = own[key].digest if key in own else known.get(key)
        if stored is None:
            own[key] = item
        elif stored != item.digest:
            return ClashingEvent(index, item.event.event_id)
    return list(own.values())


def logged_events(connection: Connection, statement: str, parameters: tuple[object, ...]) -> list[LoggedEvent]:
    """Run a statement that selects the columns of `LOGGED`, and decode its rows."""
    return [logged_event(row) for row in connection.execute(statement, parameters).fetchall()]


def logged_event(row: Sequence[Any]) -> LoggedEvent:
    """Decode an event from a row: `EVENT_COLUMNS`, the number of attempts and, if selected, the traceparent."""
    seq, event_id, subject, user_id, claimed_at_ms, received_at_ms, tip_id, offset_min, *others = row
    decision_id, action, dwell_ms, *consumption = others
    zone = timezone(timedelta(minutes=offset_min))
    occurred_at = (EPOCH + claimed_at_ms * MILLISECOND).astimezone(zone)
    common = {"event_id": event_id, "user_id": user_id, "tip_id": tip_id, "decision_id": decision_id}
    if subject == SERVED:
        return LoggedEvent(seq, TipServed(**common, occurred_at=occurred_at), received_at_ms, *consumption)
    feedback = TipFeedback(**common, occurred_at=occurred_at, action=stored_action(action), dwell_ms=dwell_ms)
    return LoggedEvent(seq, feedback, received_at_ms, *consumption)
