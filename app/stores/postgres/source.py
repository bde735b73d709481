"""Computes features in PostgreSQL."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg import errors

from app.stores.postgres.connection import Connection
from app.stores.sql.profile_statement import Dialect
from app.stores.sql.source import SqlSource

# Classes of faults of the server, not of the SQL: https://www.postgresql.org/docs/current/errcodes-appendix.html
_DATABASE_FAULTS = {"08", "53", "55", "57", "58"}
DIALECT = Dialect(
    items="json_array_elements(CAST(:asked AS json)) WITH ORDINALITY AS item (value, key)",
    # Several rows for a user are an error of the SQL.
    value="value",
    version="""COALESCE((SELECT MAX(seq) FROM event_log WHERE user_id = asked.user_id),
            -(SELECT erasures FROM bandit_ledger)) AS version""",
)


class PostgresSource(SqlSource):
    dialect = DIALECT
    errors = psycopg.Error

    def fetch(self, connection: Connection, statement: str, parameters: dict[str, object]) -> list[Any]:
        if connection.raw.info.transaction_status == psycopg.pq.TransactionStatus.IDLE:
            return connection.execute(statement, parameters).fetchall()
        with connection.raw.transaction():  # a savepoint
            return connection.execute(statement, parameters).fetchall()

    def is_database_fault(self, error: psycopg.Error) -> bool:
        state = error.sqlstate
        return state is None or (state[:2] in _DATABASE_FAULTS and not self.interrupted(error))

    def interrupted(self, error: psycopg.Error) -> bool:
        return isinstance(error, errors.QueryCanceled)
