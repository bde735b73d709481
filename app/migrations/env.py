"""Alembic's entry: migrates the file named by the configuration, or by PROFILES_DATABASE.

`app.stores.sqlite.upgrade` passes the path as the main option `database`; for alembic's own command line the settings
name it.
"""

from pathlib import Path

from alembic import context
from sqlalchemy import URL, create_engine, event
from sqlalchemy.pool import NullPool

from app.settings import Settings

path = context.config.get_main_option("database") or str(Settings.from_environment().database)
# As a name and nothing else: in a URL that is put together, `?` and `%` would mean something.
engine = create_engine(URL.create("sqlite", database=str(Path(path).absolute())), poolclass=NullPool)


@event.listens_for(engine, "connect")
def _configure(connection, _record):  # type: ignore[no-untyped-def]
    # The driver would commit before DDL; with explicit transactions a migration is whole or undone.
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
