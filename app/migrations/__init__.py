"""Migrates a database with Alembic, from an empty one to the schema that `app.stores` uses.

Migrations go forward only: to return to an earlier release after one, restore a backup.

Importing Alembic takes longer than the rest of a start. So `app.stores.migrate` imports this package only if the
database is not at the newest revision.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util.exc import CommandError
from sqlalchemy.exc import DatabaseError

from app.errors import SchemaMismatch, StoreUnavailable
from app.settings.parsers import PostgresUrl

LOCK_NOT_AVAILABLE = "55P03"


def configuration(database: Path | PostgresUrl) -> Config:
    """An Alembic configuration that names the database for `env.py`."""
    config = Config(attributes={"database": database})
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config


def upgrade(database: Path | PostgresUrl) -> None:
    """Migrate a database to the newest revision. Create a SQLite file if it is missing.

    Raises:
        SchemaMismatch: the database is at a revision that this program does not know.
        StoreUnavailable: the database cannot be written.
    """
    try:
        command.upgrade(configuration(database), "head")
    except CommandError as error:
        raise SchemaMismatch(f"the database at {database} cannot be migrated by this program: {error}") from error
    except (OSError, sqlite3.Error, DatabaseError) as error:
        reason: object = error.orig if isinstance(error, DatabaseError) else error
        if getattr(reason, "sqlstate", None) == LOCK_NOT_AVAILABLE:
            reason = "another transaction uses a table that changes; try again when it has ended (see pg_stat_activity)"
        raise StoreUnavailable(f"cannot migrate the database at {database}: {reason}") from error
