"""Migrates the database to the schema revision of this program, with the migrations of `app.migrations`."""

import sqlite3
from contextlib import closing
from pathlib import Path

from app.errors import SchemaMismatch, StoreUnavailable
from app.settings.parsers import PostgresUrl
from app.stores.sql.database import SCHEMA_REVISION, check_migratable
from app.stores.sqlite.connection import check_rights, revision_of

LOCK_NOT_AVAILABLE = "55P03"


def migrate(database: Path | PostgresUrl) -> tuple[str | None, str]:
    """Migrate a database to the newest revision, and return the revisions before (None for a new one) and after.

    A missing SQLite file is created. A PostgreSQL database must exist.

    Raises:
        SchemaMismatch: the database is at a revision that this program cannot migrate.
        StoreUnavailable: the database cannot be written.
    """
    before = current(database)
    if before == SCHEMA_REVISION:
        return before, before
    check_migratable(before, database)
    # Importing Alembic takes longer than the rest of a start.
    from alembic import command  # noqa: PLC0415
    from alembic.util.exc import CommandError  # noqa: PLC0415
    from sqlalchemy.exc import DatabaseError  # noqa: PLC0415

    from app.migrations import configuration  # noqa: PLC0415

    try:
        command.upgrade(configuration(database), "head")
    except CommandError as error:
        raise SchemaMismatch(f"the database at {database} cannot be migrated by this program: {error}") from error
    except (OSError, sqlite3.Error, DatabaseError) as error:
        reason: object = error.orig if isinstance(error, DatabaseError) else error
        if getattr(reason, "sqlstate", None) == LOCK_NOT_AVAILABLE:
            reason = "another transaction uses a table that changes; try again when it has ended (see pg_stat_activity)"
        raise StoreUnavailable(f"cannot migrate the database at {database}: {reason}") from error
    return before, SCHEMA_REVISION


def current(database: Path | PostgresUrl) -> str | None:
    """The schema revision of a database; None if it has none, or is a SQLite file that does not exist."""
    try:
        if not isinstance(database, Path):
            from app.stores.postgres import connection as postgres  # noqa: PLC0415  # psycopg is optional

            with closing(postgres.connect(database.url)) as server:
                return postgres.revision_of(server)
        database.parent.mkdir(parents=True, exist_ok=True)
        if not database.exists():
            return None
        check_rights(database)
        with closing(sqlite3.connect(database)) as file:
            return revision_of(file)
    except (OSError, sqlite3.Error, StoreUnavailable) as error:
        raise StoreUnavailable(f"cannot migrate the database at {database}: {error}") from error
