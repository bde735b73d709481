"""Alembic, run from code. Imported only where there is something to migrate: that takes longer than a whole start."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util.exc import CommandError
from sqlalchemy.exc import DatabaseError

import app.migrations
from app.errors import SchemaMismatch, StoreUnavailable


def configuration(path: Path) -> Config:
    """Alembic's configuration for a database file."""
    config = Config()
    config.set_main_option("script_location", str(Path(app.migrations.__file__).parent).replace("%", "%%"))
    config.set_main_option("database", str(path).replace("%", "%%"))
    return config


def upgrade(path: Path) -> None:
    """Bring the database to the newest revision, making the file where it is missing.

    Raises:
        SchemaMismatch: the database is at a revision this program does not know.
        StoreUnavailable: the file cannot be written.
    """
    try:
        command.upgrade(configuration(path), "head")
    except CommandError as error:
        raise SchemaMismatch(f"the database at {path} cannot be migrated by this program: {error}") from error
    except (OSError, sqlite3.Error, DatabaseError) as error:
        raise StoreUnavailable(f"cannot migrate the database at {path}: {error}") from error
