"""Migrates the database to the schema revision of this program."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from app.errors import StoreUnavailable
from app.settings.parsers import PostgresUrl
from app.stores.sql.database import SCHEMA_REVISION
from app.stores.sqlite.connection import check_rights, revision_of


def migrate(database: Path | PostgresUrl) -> tuple[str | None, str]:
    """Migrate a database to the newest revision, and return the revisions before (None for a new one) and after.

    A missing SQLite file is created. A PostgreSQL database must exist.

    Raises:
        SchemaMismatch: the database is at a revision that this program does not know.
        StoreUnavailable: the database cannot be written.
    """
    before = current(database)
    if before == SCHEMA_REVISION:
        return before, before
    from app.migrations import upgrade  # noqa: PLC0415  # imports alembic: see there

    upgrade(database)
    return before, SCHEMA_REVISION


def current(database: Path | PostgresUrl) -> str | None:
    """The schema revision of a database; None if it has none, or is a SQLite file that does not exist."""
    try:
        return _of_file(database) if isinstance(database, Path) else _of_server(database)
    except (OSError, sqlite3.Error) as error:
        raise StoreUnavailable(f"cannot migrate the database at {database}: {error}") from error


def _of_file(path: Path) -> str | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return None
    check_rights(path)
    with closing(sqlite3.connect(path)) as connection:
        return revision_of(connection)


def _of_server(url: PostgresUrl) -> str | None:
    import psycopg  # noqa: PLC0415  # optional

    from app.stores.postgres.connection import connect, revision_of  # noqa: PLC0415

    try:
        connection = connect(url.url)
        with closing(connection.raw):
            return revision_of(connection)
    except (psycopg.Error, StoreUnavailable) as error:
        raise StoreUnavailable(f"cannot migrate the database at {url}: {error}") from error
