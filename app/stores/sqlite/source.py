"""Computes features in SQLite."""

from __future__ import annotations

import sqlite3

from app.features.events import KNOWN_SUBJECTS
from app.stores.sql.profile_statement import Dialect
from app.stores.sql.source import SqlSource
from app.stores.sqlite.connection import error_name

# Primary result codes of faults of the database, not of the SQL: https://sqlite.org/rescode.html
_CODES = ("BUSY", "LOCKED", "NOMEM", "READONLY", "IOERR", "CORRUPT", "FULL", "CANTOPEN", "NOTADB")
_DATABASE_FAULTS = tuple(f"SQLITE_{code}" for code in _CODES)
# The index of the log is by user and subject, so the newest event of each subject is sought.
_NEWEST = """COALESCE((SELECT MAX(seq) FROM event_log WHERE user_id = asked.user_id AND subject = '{}'),
            -(SELECT erasures FROM bandit_ledger))"""
DIALECT = Dialect(
    items="json_each(:asked) AS item",
    # If a feature's SQL returns several rows for a user, the value is an empty blob, which is invalid for every dtype.
    value="CASE COUNT(*) WHEN 1 THEN MAX(value) WHEN 0 THEN NULL ELSE x'' END",
    version=f"MAX({', '.join(_NEWEST.format(subject) for subject in sorted(KNOWN_SUBJECTS))}) AS version",
)


class SqliteSource(SqlSource):
    dialect = DIALECT
    errors = sqlite3.Error

    def is_database_fault(self, error: sqlite3.Error) -> bool:
        return error_name(error).startswith(_DATABASE_FAULTS)

    def interrupted(self, error: sqlite3.Error) -> bool:
        return error_name(error) == "SQLITE_INTERRUPT"
