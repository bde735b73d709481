"""Bringing the database to this program's revision. Imported only by the command that migrates: alembic is slow."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util.exc import CommandError
from sqlalchemy.exc import DatabaseError

import app.migrations
from app.errors import SchemaMismatch, StoreUnavailable
from app.stores.sqlite.database import SELECT_REVISION


def configuration(path: Path) -> Config:
    """Alembic's configuration for a database file."""
    config = Config()
    config.set_main_option("script_location", str(Path(app.migrations.__file__).parent).replace("%", "%%"))
    config.set_main_option("database", str(path).replace("%", "%%"))
    return config


def migrate(path: Path) -> tuple[str | None, str]:
    """Migrate to the newest revision, making the file where it is missing; the revisions before and after.

    Raises:
        SchemaMismatch: the database is at a revision this program does not know.
        StoreUnavailable: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        before = current(path)
        command.upgrade(configuration(path), "head")
    except CommandError as error:
        raise SchemaMismatch(f"the database at {path} cannot be migrated by this program: {error}") from error
    except (OSError, sqlite3.Error, DatabaseError) as error:
        raise StoreUnavailable(f"cannot migrate the database at {path}: {error}") from error
    return before, current(path) or ""


def current(path: Path) -> str | None:
    """The revision a database is at; None where it has none or does not exist."""
    if not path.exists():
        return None
    connection = sqlite3.connect(path)
    try:
        row = connection.execute(SELECT_REVISION).fetchone()
    except sqlite3.OperationalError:
        return None
    finally:
        connection.close()
    return str(row[0]) if row else None
