"""Runs the migrations on one database file. Alembic executes this script for every command.

`app.migrations.upgrade` passes the path as the main option `database`. If Alembic's own command line is used, the path
is that of PROFILES_DATABASE.
"""

from pathlib import Path

from alembic import context
from sqlalchemy import URL, create_engine, event
from sqlalchemy.pool import NullPool

from app.settings import Settings

path = context.config.get_main_option("database") or str(Settings.from_environment().database)
# Not a URL string: in a URL, `?` and `%` in the path would have a meaning.
engine = create_engine(URL.create("sqlite", database=str(Path(path).absolute())), poolclass=NullPool)


@event.listens_for(engine, "connect")
def _configure(connection, _record):  # type: ignore[no-untyped-def]
    # Explicit transactions, so that a migration is atomic: the driver would commit before DDL.
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA busy_timeout = 10000")


@event.listens_for(engine, "begin")
def _begin(connection):  # type: ignore[no-untyped-def]
    connection.exec_driver_sql("BEGIN IMMEDIATE")


with engine.connect() as connection:
    context.configure(connection=connection, transactional_ddl=True)
    with context.begin_transaction():
        context.run_migrations()
