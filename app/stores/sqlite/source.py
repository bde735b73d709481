"""Computes features in SQLite: one statement and one thread hop for whatever is asked.

Where the statement fails because of one feature's SQL (an overflow, malformed JSON), each feature is computed alone,
and where that fails too, for each user alone, so that the fault stays with the cells it belongs to.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence

from app.features.registry import Registry, indices
from app.profiles.ports import Asked, Snapshot
from app.stores.sqlite.database import Database
from app.stores.sqlite.profile_statement import build

# Primary result codes that speak of the database, not of the SQL: https://sqlite.org/rescode.html
_OF_THE_DATABASE = {
    "BUSY",
    "LOCKED",
    "NOMEM",
    "READONLY",
    "INTERRUPT",
    "IOERR",
    "CORRUPT",
    "FULL",
    "CANTOPEN",
    "NOTADB",
}


class SqliteSource:
    """Implements `app.profiles.ports.Source`."""

    def __init__(self, database: Database, registry: Registry) -> None:
        self._database = database
        self._width = len(registry)
        self._statement = build(registry)

    async def compute(self, clock_ms: int, asked: Sequence[Asked]) -> Snapshot:
        """Compute every asked row in one snapshot."""
        return await self._database.read(lambda connection: self._compute(connection, clock_ms, asked))

    def _compute(self, connection: sqlite3.Connection, clock_ms: int, asked: Sequence[Asked]) -> Snapshot:
        try:
            seq, rows = self._run(connection, clock_ms, asked)
        except sqlite3.Error as error:
            if not _is_of_the_sql(error):
                raise
            return self._compute_apart(connection, clock_ms, asked)
        return Snapshot(seq, rows, {})

    def _run(
        self, connection: sqlite3.Connection, clock_ms: int, asked: Sequence[Asked]
    ) -> tuple[int, list[Sequence[object]]]:
        parameters = {"clock_ms": clock_ms, "asked": json.dumps(asked)}
        rows = connection.execute(self._statement, parameters).fetchall()
        return rows[0][0], [row[1:] for row in rows]

    def _compute_apart(self, connection: sqlite3.Connection, clock_ms: int, asked: Sequence[Asked]) -> Snapshot:
        errors: dict[tuple[int, int], str] = {}
        rows: list[Sequence[object]] = []
        connection.execute("BEGIN")  # one snapshot for all the pieces
        try:
            seq = self._run(connection, clock_ms, [asked[0]._replace(mask=0)])[0]
            for place, row in enumerate(asked):
                values: list[object] = [None] * self._width
                for index in indices(row.mask):
                    try:
                        values[index] = self._run(connection, clock_ms, [row._replace(mask=1 << index)])[1][0][index]
                    except sqlite3.Error as error:
                        if not _is_of_the_sql(error):
                            raise
                        errors[place, index] = f"the SQL failed: {error}"
                rows.append(values)
        finally:
            connection.execute("ROLLBACK")
        return Snapshot(seq, rows, errors)


def _is_of_the_sql(error: sqlite3.Error) -> bool:
    name = getattr(error, "sqlite_errorname", "")
    parts = name.split("_")
    return len(parts) < 2 or parts[1] not in _OF_THE_DATABASE
