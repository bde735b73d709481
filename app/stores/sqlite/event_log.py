"""Stores events, in one transaction for many requests."""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Sequence
from itertools import count

from app.events.ports import Admitted, Appended, ClashingEvent
from app.features.events import TipFeedback, subject_of
from app.stores.sql.database import insert_rows
from app.stores.sql.event_log import COLUMNS, KEYS, EventKey, SqlEventLog, admit, event_key, mark_historical
from app.stores.sql.registries import SELECT_FEATURE_KEYS
from app.stores.sqlite.database import SqliteDatabase

SELECT_KNOWN = f"SELECT user_id, event_id, digest FROM event_log JOIN {KEYS} USING (user_id, event_id)"


class SqliteEventLog(SqlEventLog):
    _database: SqliteDatabase

    async def append(self, requests: Sequence[Sequence[Admitted]]) -> list[Appended | ClashingEvent]:
        def work(connection: sqlite3.Connection) -> list[Appended | ClashingEvent]:
            # Few statements for all requests together: each waits for the GIL.
            features = connection.execute(SELECT_FEATURE_KEYS).fetchall()
            keys = [event_key(item) for events in requests for item in events]
            stored = connection.execute(SELECT_KNOWN, (json.dumps(keys),))
            known: dict[EventKey, bytes] = {(user_id, event_id): digest for user_id, event_id, digest in stored}
            # No other writer draws numbers: the write lock is held. AUTOINCREMENT records the highest explicit number.
            row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'event_log'").fetchone()
            numbers = count((row[0] if row else 0) + 1)
            found = admit(requests, known, features, lambda _: next(numbers))
            _insert(connection, found.fresh)
            mark_historical(connection, found.historical)
            return found.outcomes

        return await self._database.write(work, of=())


def _insert(connection: sqlite3.Connection, fresh: Sequence[tuple[int, Admitted]]) -> None:
    rows: defaultdict[str, list[tuple[object, ...]]] = defaultdict(list)  # by table
    for seq, item in fresh:
        event, digest, occurred_at_ms, offset_min, claimed_at_ms, received_at_ms, sent_by, _, traceparent = item
        subject = subject_of(event)
        times = (occurred_at_ms, claimed_at_ms, received_at_ms)
        rows["event_log"].append((seq, event.event_id, subject, event.user_id, digest, *times, sent_by))
        rows["outbox"].append((seq, event.user_id, received_at_ms, traceparent))
        fact = (seq, event.user_id, event.tip_id, occurred_at_ms, offset_min, received_at_ms, event.decision_id)
        if isinstance(event, TipFeedback):
            rows["tip_feedback"].append((*fact, event.action, event.dwell_ms))
        else:
            rows["tip_views"].append(fact)
    for table, inserted in rows.items():
        insert_rows(connection, table, COLUMNS[table], inserted)
