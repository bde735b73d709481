"""Migrates a database file with Alembic, from an empty file to the schema that `app.stores.sqlite` uses.

Importing Alembic takes longer than the rest of a start. So `app.stores.sqlite.migrate` imports this package only if the
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


def configuration(path: Path) -> Config:
    """An Alembic configuration that names the database file for `env.py`."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("database", str(path).replace("%", "%%"))
    return config


def upgrade(path: Path) -> None:
    """Migrate a database file to the newest revision. Create the file if it is missing.

    Raises:
        SchemaMismatch: the database is at a revision that this program does not know.
        StoreUnavailable: the file cannot be written.
    """
    try:
        command.upgrade(configuration(path), "head")
    except CommandError as error:
        raise SchemaMismatch(f"the database at {path} cannot be migrated by this program: {error}") from error
    except (OSError, sqlite3.Error, DatabaseError) as error:
        raise StoreUnavailable(f"cannot migrate the database at {path}: {error}") from error
