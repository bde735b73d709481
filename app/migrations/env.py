"""Runs the migrations on one database, in one transaction. Alembic executes this script for every command.

`app.stores.migrate` passes the database as an attribute of the configuration. Alembic's own command line passes none;
then the database is that of PROFILES_DATABASE.
"""

import sqlite3
from functools import partial
from pathlib import Path

from alembic import context
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from app.settings import Settings

LOCK = 0x70726F66696C6573  # any number: two programs must not migrate at once

database = context.config.attributes.get("database") or Settings.from_environment().database
if isinstance(database, Path):
    # Explicit transactions, so that a migration is atomic: the driver would commit before DDL.
    open_file = partial(sqlite3.connect, database, timeout=10, isolation_level=None)
    engine = create_engine("sqlite://", creator=open_file, poolclass=NullPool)
    # No checkpoint without the write lock: see `app.stores.sqlite.connection`.
    beginning = ["PRAGMA wal_autocheckpoint = 0", "PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL"]
    beginning.append("BEGIN IMMEDIATE")
else:
    from psycopg import connect

    open_session = partial(connect, database.url, target_session_attrs="read-write")
    engine = create_engine("postgresql+psycopg://", creator=open_session, poolclass=NullPool)
    # While a migration waits for a table, every statement of the service waits behind it.
    beginning = [f"SELECT pg_advisory_xact_lock({LOCK})", "SET LOCAL lock_timeout = '5s'"]

with engine.begin() as connection:
    for statement in beginning:
        connection.exec_driver_sql(statement)
    context.configure(connection=connection)
    context.run_migrations()
