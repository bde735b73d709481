"""Backing the database up while it is written to, and putting a backup in its place.

A restored database gets a new id and a higher sequence number. The id is part of every cache key's epoch, so values
cached from the database that was replaced are out of reach, whatever the cache still holds.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from app.errors import Conflict, InvalidInput, StoreFull, StoreUnavailable
from app.stores.sqlite.connection import connect, read_only_uri, unavailable
from app.stores.sqlite.database import check_schema

# https://sqlite.org/fileformat2.html: the bytes from PENDING_BYTE on, which no page uses.
LOCKED_FROM, LOCK_BYTES = 0x40000000, 512
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
        _put(part, target)
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
        StoreUnavailable: the files cannot be read or written, or there is no room; the database is as it was.
    """
    part = database.with_name(database.name + ".restoring")
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        with closing(sqlite3.connect(read_only_uri(source), uri=True)) as old, closing(sqlite3.connect(part)) as new:
            old.backup(new)
            _check(new, source)
            new.execute(UPDATE_DATABASE_ID, (secrets.token_hex(16),))
            new.execute(UPDATE_SESSION_SECRET, (secrets.token_hex(32),))  # whoever held the backup has seen the old one
            new.execute(UPDATE_SEQ)
            new.commit()
        with _alone(database):
            _put(part, database)
        _forget_log(database)
    except sqlite3.DatabaseError as error:
        if isinstance(refused := unavailable(error), StoreFull):
            raise refused from error
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


@contextmanager
def _alone(database: Path) -> Iterator[None]:
    """Everybody else is kept out meanwhile, and no write-ahead log is left; raises `Conflict` where somebody is in.

    The log must be gone before another file takes the database's place: 1. the file is replaced; 2. we are killed;
    3. whoever opens it next finds the old log beside it, and plays it back into the wrong database.
    """
    if not database.exists():
        yield
        return
    with closing(sqlite3.connect(database, timeout=0.2, isolation_level=None)) as connection:
        try:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("BEGIN EXCLUSIVE")
            connection.execute("COMMIT")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            damaged = False
        except sqlite3.DatabaseError as error:
            name = getattr(error, "sqlite_errorname", "")
            if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
                raise _in_use(database) from error
            if not name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
                raise unavailable(error) from error
            damaged = True
        if not damaged:
            yield
            return
    with _locked(database):  # what SQLite cannot read, it does not lock; and this is when one restores
        _forget_log(database)
        yield


@contextmanager
def _locked(database: Path) -> Iterator[None]:
    """The lock that SQLite would take, on the bytes where every connection to a database in WAL mode holds its own."""
    with database.open("r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, LOCK_BYTES, LOCKED_FROM)
        except OSError as error:
            raise _in_use(database) from error
        yield


def _in_use(database: Path) -> Conflict:
    return Conflict(f"{database} is in use; stop every process of the service first")


def _forget_log(database: Path) -> None:
    for suffix in ("-wal", "-shm"):
        database.with_name(database.name + suffix).unlink(missing_ok=True)


def _put(part: Path, target: Path) -> None:
    """Put a whole file in place, so that it stands there after a loss of power, too."""
    part.replace(target)
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
