"""Finds damage in the database: a quick check at every start, and a full one for `profiles doctor --full`. The quick
check takes milliseconds, however large the file is. It checks that the file is as long as its header says, that the
small tables and their indexes are intact, and that the newest events are in the log, the fact tables and the indexes. A
crash, a full disk or an incomplete copy damages these parts. The full check reads every page."""

import sqlite3

from app.stores.sql.event_log import FINDINGS, SELECT_FAULTS

TAIL = 300
SMALL_TABLES = ("service", "feature_keys", "cache_registration", "alembic_version")

SELECT_TAIL_FAULTS = f"""
WITH tail AS MATERIALIZED (SELECT seq, event_id, subject, user_id FROM event_log ORDER BY seq DESC LIMIT {TAIL})
SELECT seq, 'has no fact' FROM tail
WHERE NOT EXISTS (SELECT 1 FROM tip_views WHERE tip_views.seq = tail.seq)
    AND NOT EXISTS (SELECT 1 FROM tip_feedback WHERE tip_feedback.seq = tail.seq)
UNION ALL
SELECT seq, 'is missing from the index of event ids' FROM tail
WHERE NOT EXISTS (SELECT 1 FROM event_log AS log INDEXED BY event_log_by_id
                  WHERE log.user_id = tail.user_id AND log.event_id = tail.event_id AND log.seq = tail.seq)
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


def findings(connection: sqlite3.Connection, *, whole: bool) -> list[str]:
    """Run the quick check, or the full check if `whole`. Return a description of each fault, up to `FINDINGS`."""
    pragmas = {f"{table}: ": f"PRAGMA integrity_check('{table}')" for table in SMALL_TABLES}
    if whole:
        pragmas = {"": f"PRAGMA integrity_check({FINDINGS})"}
    found: list[str] = []
    try:
        for prefix, pragma in pragmas.items():
            found += [prefix + text for (text,) in connection.execute(pragma).fetchall() if text != "ok"]
        faults = connection.execute(SELECT_FAULTS if whole else SELECT_TAIL_FAULTS).fetchall()
        found += [f"event {seq} {fault}" for seq, fault in faults]
    except sqlite3.DatabaseError as error:
        found.append(f"SQLite reports: {error}")
    return found[:FINDINGS]
