"""Users with many events, stored by one statement a table. Ingesting them would take minutes."""

import sqlite3
from contextlib import closing
from pathlib import Path

SPAN_DAYS = 29
# Users :prefix-0, :prefix-1 and so on with :events each, spread evenly over the window: served tips and feedback in
# turn.
_NUMBERS = """
WITH RECURSIVE numbers (number) AS (SELECT 0 UNION ALL SELECT number + 1 FROM numbers WHERE number + 1 < :total),
made AS (
    SELECT :seq + number AS seq, :prefix || '-' || (number / :events) AS user_id, number % :events AS place,
           :now_ms - 1000 - (number % :events) * (:span_ms / :events) AS occurred_at_ms
    FROM numbers
)
"""
_INSERTS = (
    """INSERT INTO event_log (seq, event_id, subject, user_id, digest, occurred_at_ms, received_at_ms)
    SELECT seq, user_id || '-' || place,
           CASE place % 2 WHEN 0 THEN 'signals.tip.served' ELSE 'signals.tip.feedback' END,
           user_id, zeroblob(16), occurred_at_ms, occurred_at_ms
    FROM made""",
    """INSERT INTO tip_views (seq, user_id, tip_id, occurred_at_ms, utc_offset_min, received_at_ms)
    SELECT seq, user_id, 'tip-' || place / 2, occurred_at_ms, 0, occurred_at_ms FROM made WHERE place % 2 = 0""",
    """INSERT INTO tip_feedback (seq, user_id, tip_id, occurred_at_ms, utc_offset_min, received_at_ms, action, dwell_ms)
    SELECT seq, user_id, 'tip-' || place / 2, occurred_at_ms, 0, occurred_at_ms,
           CASE place % 4 WHEN 1 THEN 'completed' ELSE 'dismissed' END, place % 1000 * 10
    FROM made WHERE place % 2 = 1""",
)


def add_users(database: Path, prefix: str, users: int, events: int, now_ms: int) -> list[str]:
    """Store `users` users with `events` events each in the last 29 days; return their ids."""
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        (seq,) = connection.execute("SELECT COALESCE(MAX(seq), 0) + 1 FROM event_log").fetchone()
        values = {
            "seq": seq,
            "prefix": prefix,
            "events": events,
            "total": users * events,
            "now_ms": now_ms,
            "span_ms": SPAN_DAYS * 86_400_000,
        }
        with connection:
            for statement in _INSERTS:
                table, _, select = statement.partition("\n")
                connection.execute(f"{_NUMBERS} {table}\n{select}", values)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return [f"{prefix}-{number}" for number in range(users)]
