"""Migrates the database to the schema revision of this program."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from app.errors import StoreUnavailable
from app.stores.sqlite.connection import check_rights
from app.stores.sqlite.database import SCHEMA_REVISION, SELECT_REVISION


def migrate(path: Path) -> tuple[str | None, str]:
    """Migrate a database to the newest revision, and return the revisions before (None for a new file) and after.

    A missing file is created.

    Raises:
        SchemaMismatch: the database is at a revision that this program does not know.
        StoreUnavailable: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        before = current(path)
    except (OSError, sqlite3.Error) as error:
        raise StoreUnavailable(f"cannot migrate the database at {path}: {error}") from error
    if before == SCHEMA_REVISION:
        return before, before
    from app.migrations import upgrade  # noqa: PLC0415  # imports alembic: see there

    upgrade(path)
    after = current(path)
    if after != SCHEMA_REVISION:
        raise StoreUnavailable(f"the database at {path} is at revision {after} after migrating, not {SCHEMA_REVISION}")
    return before, after


def current(path: Path) -> str | None:
    """The schema revision of a database; None if it has none or does not exist."""
    if not path.exists():
        return None
    check_rights(path)
    with closing(sqlite3.connect(path)) as connection:
        try:
            row = connection.execute(SELECT_REVISION).fetchone()
        except sqlite3.OperationalError:
            return None
    return str(row[0]) if row else None
