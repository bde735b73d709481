"""Stores events, in one transaction for many requests, which takes two round trips: one locks the users, finds the
events that are stored already and draws sequence numbers, the other inserts and commits. The numbers are drawn after
the locks, so those of a user rise in the order of the commits. Interleaving prevented: 1. T1 draws 1; 2. T2 draws 2 for
the same user and commits; 3. a value is computed without event 1, and cached under version 2; 4. T1 commits: the value
is stale, and nothing shows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from psycopg import Cursor

from app.events.ports import Admitted, Appended, ClashingEvent
from app.features.events import TipFeedback, subject_of
from app.stores.postgres.connection import Connection
from app.stores.postgres.database import PostgresDatabase
from app.stores.sql.event_log import COLUMNS, KEYS, EventKey, SqlEventLog, admit, event_key, mark_historical
from app.stores.sql.registries import SELECT_FEATURE_KEYS

# With a LIMIT, each event is sought in the index, in the partition of its user.
SELECT_KNOWN = f"""
SELECT known.* FROM {KEYS} CROSS JOIN LATERAL (
    SELECT user_id, event_id, digest, seq FROM event_log WHERE user_id = key.user_id AND event_id = key.event_id LIMIT 1
) AS known
"""
# Conflicts with `PostgresDatabase.announce_lock`. Interleaving prevented: 1. T1 reads the names of the features; 2. a
# process announces a feature, computes it and caches it; 3. T1 commits, and deletes no key of this feature.
LOCK_FEATURE_KEYS = "LOCK TABLE feature_keys IN ROW SHARE MODE"
DRAW_NUMBERS = "SELECT nextval('event_seq') FROM generate_series(1, ?)"
# The parameter is a JSON array of objects with the fields of `Admitted` and of its event.
INSERT_EVENTS = f"""
WITH event AS MATERIALIZED (
    SELECT * FROM json_to_recordset(CAST(? AS json)) AS event (
        seq bigint, event_id text, subject text, user_id text, digest text, occurred_at_ms bigint, claimed_at_ms bigint,
        received_at_ms bigint, sent_by text, tip_id text, utc_offset_min bigint, decision_id text, action text,
        dwell_ms bigint, traceparent text
    )
), logged AS (
    INSERT INTO event_log ({COLUMNS["event_log"]})
    SELECT {COLUMNS["event_log"].replace("digest", "decode(digest, 'base64')")} FROM event
), waiting AS (
    INSERT INTO outbox ({COLUMNS["outbox"]}) SELECT {COLUMNS["outbox"]} FROM event
), viewed AS (
    INSERT INTO tip_views ({COLUMNS["tip_views"]}) SELECT {COLUMNS["tip_views"]} FROM event WHERE action IS NULL
)
INSERT INTO tip_feedback ({COLUMNS["tip_feedback"]}) SELECT {COLUMNS["tip_feedback"]} FROM event
WHERE action IS NOT NULL
"""
_json = msgspec.json.Encoder().encode


class PostgresEventLog(SqlEventLog):
    _database: PostgresDatabase

    async def append(self, requests: Sequence[Sequence[Admitted]]) -> list[Appended | ClashingEvent]:
        keys = [event_key(item) for events in requests for item in events]
        drawn: dict[EventKey, int] = {}
        asked: list[Cursor[Any]] = []

        def ask(connection: Connection) -> None:
            connection.execute(LOCK_FEATURE_KEYS)
            stored = connection.execute(SELECT_KNOWN, (_json(keys).decode(),))
            asked[:] = connection.execute(SELECT_FEATURE_KEYS), stored, connection.execute(DRAW_NUMBERS, (len(keys),))

        def work(connection: Connection) -> list[Appended | ClashingEvent]:
            features, stored, numbers = asked
            known: dict[EventKey, bytes] = {}
            own: set[EventKey] = set()
            for user_id, event_id, digest, seq in stored:
                if drawn.get((user_id, event_id)) == seq:
                    own.add((user_id, event_id))
                else:
                    known[user_id, event_id] = digest

            def number(key: EventKey) -> int:
                if key not in own:
                    (drawn[key],) = next(numbers)
                return drawn[key]

            found = admit(requests, known, features, number)
            connection.ending.enter_context(connection.raw.pipeline())
            if rows := [_row(seq, item) for seq, item in found.fresh if event_key(item) not in own]:
                connection.execute(INSERT_EVENTS, (_json(rows).decode(),))
            mark_historical(connection, found.historical)
            return found.outcomes

        # If the outcome of a commit is unknown, the work is done again. Stored events with the numbers that the first
        # try drew were stored by that try, so they count as accepted and not as duplicates.
        return await self._database.write(work, of={user_id for user_id, _ in keys}, first=ask, again=True)


def _row(seq: int, item: Admitted) -> dict[str, object]:
    row, event = item._asdict(), item.event
    row["event"] = None
    row |= {"seq": seq, "event_id": event.event_id, "subject": subject_of(event), "user_id": event.user_id}
    row |= {"tip_id": event.tip_id, "decision_id": event.decision_id}
    if isinstance(event, TipFeedback):
        row |= {"action": event.action, "dwell_ms": event.dwell_ms}
    return row
