"""Backing the database up while it is written to, and putting a backup in its place.

A backup has an id of its own. A restored database gets a new one, and a higher sequence number. The id is part of
every cache key's epoch, so values cached from the database that was replaced are out of reach, whatever the cache still
holds. A backup gets owner and mode of the database, and a restored one those of the file that it replaces.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from app.errors import Conflict, InvalidInput, StoreFull, StoreUnavailable
from app.stores.sqlite.connection import check_rights, connect, read_only_uri, unavailable
from app.stores.sqlite.database import check_schema, draw_id

# https://sqlite.org/fileformat2.html: the bytes from PENDING_BYTE on, which no page uses.
LOCKED_FROM, LOCK_BYTES = 0x40000000, 512
PAGES = 4_096
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
        _create(part)
        with closing(connect(database, read_only=True)) as source, closing(sqlite3.connect(part)) as copy:
            source.execute("BEGIN")  # one snapshot for all steps; readers and writers go on
            source.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()
            source.backup(copy, pages=PAGES, progress=lambda _, left, total: on_step(left, total))
            copy.execute("PRAGMA journal_mode = DELETE")
            draw_id(copy)
            copy.commit()
        _put(part, target, like=database)
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
        _create(part)
        with closing(sqlite3.connect(read_only_uri(source), uri=True)) as old, closing(sqlite3.connect(part)) as new:
            old.backup(new)
            _check(new, source)
            draw_id(new)
            new.execute(UPDATE_SESSION_SECRET, (secrets.token_hex(32),))  # holders of the backup may know the old one
            new.execute(UPDATE_SEQ)
            new.commit()
        with _alone(database):
            _put(part, database, like=database if database.exists() else source)
    except sqlite3.DatabaseError as error:
        if isinstance(refused := unavailable(error), StoreFull):
            raise refused from error
        raise InvalidInput(f"{source} is no sound database: {error}") from error
    except OSError as error:
        raise StoreUnavailable(f"cannot restore {database} from {source}: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def adopt(database: Path) -> None:
    """Give a database a new id, if the program cannot tell that it is a copy: its volume was cloned, for instance.

    Raises:
        Conflict: some process has the database open.
        SchemaMismatch: it is at another revision.
        StoreUnavailable: there is none, it is damaged, or it cannot be written.
    """
    with closing(connect(database, read_only=False)) as connection:
        check_schema(connection, database)
    try:
        with _alone(database) as alone:
            if alone is None:
                raise StoreUnavailable(f"the database at {database} is damaged")
            draw_id(alone)
            alone.execute("COMMIT")
    except sqlite3.DatabaseError as error:
        raise unavailable(error) from error


def _check(copy: sqlite3.Connection, source: Path) -> None:
    findings = [row[0] for row in copy.execute("PRAGMA integrity_check(3)")]
    if findings != ["ok"]:
        raise InvalidInput(f"{source} is damaged: {findings[0]}")
    check_schema(copy, source)


@contextmanager
def _alone(database: Path) -> Iterator[sqlite3.Connection | None]:
    """Keep other processes out, and leave no write-ahead log; raises `Conflict` if one has the database open.

    Gives a connection within a transaction, or None if SQLite cannot read the file or there is none.

    The log must be gone before another file takes the database's place: 1. the file is replaced; 2. we are killed;
    3. the next process that opens it finds the old log beside it, and plays it back into the wrong database. Afterwards
    is too late: a log of that name may be that of a process that has opened the new file.
    """
    if not database.exists():
        _forget_log(database)
        yield None
        return
    check_rights(database)
    with closing(sqlite3.connect(database, timeout=0.2, isolation_level=None)) as connection:
        try:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            # Closing a connection in WAL mode would delete a log by its name, too.
            if connection.execute("PRAGMA journal_mode = DELETE").fetchone() != ("delete",):
                raise _in_use(database)
            connection.execute("BEGIN EXCLUSIVE")
            damaged = False
        except sqlite3.DatabaseError as error:
            name = getattr(error, "sqlite_errorname", "")
            if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
                raise _in_use(database) from error
            if not name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
                raise unavailable(error) from error
            damaged = True
        if not damaged:
            yield connection
            return
    with _locked(database):  # what SQLite cannot read, it does not lock; and this is when one restores
        _forget_log(database)
        yield None


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


def _create(part: Path) -> None:
    """An empty file that only its owner may read, in the place of one that a killed process left."""
    part.unlink(missing_ok=True)
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _put(part: Path, target: Path, like: Path) -> None:
    """Put a whole file in place, so that it stands there after a loss of power, too, with owner and mode of another."""
    model = like.stat()
    with suppress(PermissionError):  # only root may give a file away
        os.chown(part, model.st_uid, model.st_gid)
    part.chmod(stat.S_IMODE(model.st_mode))
    part.replace(target)
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
