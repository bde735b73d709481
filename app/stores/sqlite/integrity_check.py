"""Is the database sound? A look at start that takes milliseconds however large the file is, and a full one on demand.

At start: the file is as long as its header says; the small tables and their indexes are whole; each of the newest
events has its fact and its log row, and is found by its indexes. Damage by a crash, a full disk or a copy of half a
file lies there. What SQLite itself would find in every page takes as long as reading the file: `full_findings` is for
`profiles doctor --full`.
"""

from __future__ import annotations

import sqlite3

TAIL = 300
SMALL_TABLES = ("service", "feature_keys", "cache_registration", "alembic_version")
FINDINGS = 10

SELECT_TAIL_HALVES = f"""
WITH tail AS MATERIALIZED (SELECT seq, event_id, subject, user_id FROM event_log ORDER BY seq DESC LIMIT {TAIL})
SELECT seq, 'has no fact' FROM tail
WHERE NOT EXISTS (SELECT 1 FROM tip_views WHERE tip_views.seq = tail.seq)
    AND NOT EXISTS (SELECT 1 FROM tip_feedback WHERE tip_feedback.seq = tail.seq)
UNION ALL
SELECT seq, 'is missing from the index of event ids' FROM tail
WHERE NOT EXISTS (SELECT 1 FROM event_log AS log INDEXED BY sqlite_autoindex_event_log_1
                  WHERE log.event_id = tail.event_id AND log.seq = tail.seq)
UNION ALL
SELECT seq, 'is missing from the index of users' FROM tail
WHERE NOT EXISTS (SELECT 1 FROM event_log AS log INDEXED BY event_log_by_user
                  WHERE log.user_id = tail.user_id AND log.subject = tail.subject AND log.seq = tail.seq)
UNION ALL
SELECT seq, 'has no row in the log' FROM (
    SELECT seq FROM (SELECT seq FROM tip_views ORDER BY seq DESC LIMIT {TAIL})
    UNION ALL SELECT seq FROM (SELECT seq FROM tip_feedback ORDER BY seq DESC LIMIT {TAIL})
) AS facts
WHERE NOT EXISTS (SELECT 1 FROM event_log WHERE event_log.seq = facts.seq)
LIMIT {FINDINGS}
"""
SELECT_ALL_HALVES = f"""
SELECT seq, 'has no fact' FROM event_log
WHERE NOT EXISTS (SELECT 1 FROM tip_views WHERE tip_views.seq = event_log.seq)
    AND NOT EXISTS (SELECT 1 FROM tip_feedback WHERE tip_feedback.seq = event_log.seq)
UNION ALL
SELECT seq, 'has no row in the log' FROM (SELECT seq FROM tip_views UNION ALL SELECT seq FROM tip_feedback) AS facts
WHERE NOT EXISTS (SELECT 1 FROM event_log WHERE event_log.seq = facts.seq)
LIMIT {FINDINGS}
"""


def quick_findings(connection: sqlite3.Connection) -> list[str]:
    """What is wrong, as far as some milliseconds tell; empty where nothing is."""
    found: list[str] = []
    try:
        for table in SMALL_TABLES:
            rows = connection.execute(f"PRAGMA integrity_check('{table}')").fetchall()
            found += [f"{table}: {text}" for (text,) in rows if text != "ok"]
        found += _halves(connection, SELECT_TAIL_HALVES)
    except sqlite3.DatabaseError as error:
        found.append(_said(error))
    return found[:FINDINGS]


def full_findings(connection: sqlite3.Connection) -> list[str]:
    """Everything that SQLite and the log can tell; reads the whole file."""
    found: list[str] = []
    try:
        rows = connection.execute(f"PRAGMA integrity_check({FINDINGS})").fetchall()
        found += [text for (text,) in rows if text != "ok"]
        found += _halves(connection, SELECT_ALL_HALVES)
    except sqlite3.DatabaseError as error:
        found.append(_said(error))
    return found[:FINDINGS]


def _halves(connection: sqlite3.Connection, statement: str) -> list[str]:
    return [f"event {seq} {what}" for seq, what in connection.execute(statement).fetchall()]


def _said(error: sqlite3.DatabaseError) -> str:
    return f"SQLite says: {error}"
