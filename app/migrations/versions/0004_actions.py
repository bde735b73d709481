"""Removes the CHECK constraints on actions. `app.features.events.Action` declares them, and ingest rejects others.

On SQLite, they are removed with the procedure of https://sqlite.org/lang_altertable.html#otheralter for changes that do
not affect stored rows: only the definition of the tables changes, however many rows they have. The same transaction
increases the schema version, so that other connections read the schema again. Connections of the previous release may
stay open.
"""

import sqlite3
import sys

from alembic import op
from alembic.util.exc import CommandError
from sqlalchemy import Connection, text
from sqlalchemy.exc import OperationalError

from app.migrations.statements import changed_definition, on_postgres, run

revision = "0004"
down_revision = "0003"

CHECK = " CHECK (action IN ('completed', 'dismissed', 'snoozed'))"
COLUMNS = {"tip_feedback": "action TEXT NOT NULL", "tip_scores": "action TEXT"}


def upgrade() -> None:
    for table, column in COLUMNS.items():
        if on_postgres():
            run(f"ALTER TABLE {table} DROP CONSTRAINT {table}_action_check")
        else:
            _define(op.get_bind(), table, changed_definition(table, f" {column}{CHECK},", f" {column},"))


def _define(connection: Connection, table: str, sql: str) -> None:
    """Replace the stored definition of a table. The change must not affect how rows are stored."""
    layout = text("SELECT * FROM pragma_table_xinfo(:table)").bindparams(table=table)
    before = connection.execute(layout).all()
    _write_schema(connection, table, sql)
    version = connection.execute(text("PRAGMA schema_version")).scalar_one()
    connection.execute(text(f"PRAGMA schema_version = {version + 1}"))
    connection.execute(text("PRAGMA writable_schema = RESET"))  # off, and this connection reads the schema again
    if connection.execute(layout).all() != before:  # the stored rows would be unreadable
        raise CommandError(f"the columns of {table} would change")


def _write_schema(connection: Connection, table: str, sql: str) -> None:
    driver = connection.connection.driver_connection
    if sys.version_info >= (3, 12) and isinstance(driver, sqlite3.Connection):
        driver.setconfig(sqlite3.SQLITE_DBCONFIG_DEFENSIVE, False)  # Apple's SQLite protects the schema otherwise
    connection.execute(text("PRAGMA writable_schema = ON"))
    update = text("UPDATE sqlite_schema SET sql = :sql WHERE type = 'table' AND name = :table")
    try:
        connection.execute(update, {"sql": sql, "table": table})
    except OperationalError as error:
        if "may not be modified" not in str(error):
            raise
        advice = "use Python 3.12 or later, or one that brings its own SQLite"
        raise CommandError(f"this SQLite protects the schema, which Python 3.11 cannot change; {advice}") from error
