"""Backing the database up while it is written to, and putting a backup in its place.

A restored database gets a new id and a higher sequence number. The id is part of every cache key's epoch, so values
cached from the database that was replaced are out of reach, whatever the cache still holds.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from app.errors import Conflict, InvalidInput, StoreUnavailable
from app.stores.sqlite.connection import connect
from app.stores.sqlite.database import check_schema

UPDATE_DATABASE_ID = "UPDATE service SET value = ? WHERE name = 'database_id'"
UPDATE_SESSION_SECRET = "UPDATE service SET value = ? WHERE name = 'session_secret'"  # noqa: S105  # no secret
UPDATE_SEQ = "UPDATE sqlite_sequence SET seq = seq + 1000000 WHERE name = 'event_log'"


def backup(database: Path, target: Path, on_step: Callable[[int, int], None] = lambda left, total: None) -> None:
    """Copy a database, consistent as of one moment, while others write to it. `on_step(pages left, pages)`.

    Raises:
        Conflict: the target exists.
        StoreUnavailable: the database cannot be read, or the target not written; no half copy stays.
    """
    if target.exists():
        raise Conflict(f"{target} exists already; a backup never overwrites")
    part = target.with_name(target.name + ".part")
    try:
        with closing(connect(database, read_only=True)) as source, closing(sqlite3.connect(part)) as copy:
            # One step, so that a busy writer cannot make it begin again and again; readers and writers go on.
            source.backup(copy, pages=-1, progress=lambda _, left, total: on_step(left, total))
            copy.execute("PRAGMA journal_mode = DELETE")
        part.replace(target)
    except (sqlite3.Error, OSError) as error:
        raise StoreUnavailable(f"cannot back {database} up to {target}: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def restore(source: Path, database: Path) -> None:
    """Put a backup in the place of the database, which no process may have open.

    Raises:
        InvalidInput: the source is no sound database of this service.
        SchemaMismatch: it is at another revision; migrate it first, or use the program it belongs to.
        Conflict: some process has the database open.
        StoreUnavailable: the files cannot be read or written; the database is as it was.
    """
    part = database.with_name(database.name + ".restoring")
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        with closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True)) as old, closing(sqlite3.connect(part)) as new:
            old.backup(new)
            _check(new, source)
            new.execute(UPDATE_DATABASE_ID, (secrets.token_hex(16),))
            new.execute(UPDATE_SESSION_SECRET, (secrets.token_hex(32),))  # whoever held the backup has seen the old one
            new.execute(UPDATE_SEQ)
            new.commit()
        with closing(_alone(database)):
            part.replace(database)
        for suffix in ("-wal", "-shm"):
            database.with_name(database.name + suffix).unlink(missing_ok=True)
    except sqlite3.DatabaseError as error:
        raise InvalidInput(f"{source} is no sound database: {error}") from error
    except OSError as error:
        raise StoreUnavailable(f"cannot restore {database} from {source}: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def _check(copy: sqlite3.Connection, source: Path) -> None:
    findings = [row[0] for row in copy.execute("PRAGMA integrity_check(3)")]
    if findings != ["ok"]:
        raise InvalidInput(f"{source} is damaged: {findings[0]}")
    check_schema(copy, source)


def _alone(database: Path) -> sqlite3.Connection:
    """A connection that keeps everybody else out; raises `Conflict` where somebody is in."""
    if not database.exists():
        return sqlite3.connect(":memory:")
    connection = sqlite3.connect(database, timeout=0.2, isolation_level=None)
    try:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("BEGIN EXCLUSIVE")
        connection.execute("COMMIT")
    except sqlite3.OperationalError as error:
        connection.close()
        raise Conflict(f"{database} is in use; stop every process of the service first") from error
    return connection
