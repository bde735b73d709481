"""Backs up the database while processes write to it, restores backups, and gives copied files an id of their own. A
backup gets a new id. A restored database gets another new id, so values cached from the replaced database are not read
again: the id is part of every cache key. The sequence numbers of a restored database continue a million higher, so that
numbers used after the backup are not used again."""

import fcntl
import os
import secrets
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from app.errors import Conflict, InvalidInput, StoreFull, StoreUnavailable
from app.stores.sqlite.connection import check_rights, connect, error_name, unavailable
from app.stores.sqlite.database import check_schema, draw_id

# The bytes from PENDING_BYTE on, which no page uses: https://sqlite.org/fileformat2.html
LOCKED_FROM, LOCK_BYTES = 0x40000000, 512
PAGES = 4_096
UPDATE_SESSION_SECRET = "UPDATE service SET value = ? WHERE name = 'session_secret'"  # noqa: S105  # a statement


def backup(database: Path, target: Path, on_step: Callable[[int, int], None] = lambda left, total: None) -> None:
    """Copy one snapshot of a database while processes write to it. `on_step` is called after each step with the number
    of pages left and the number of all pages. Raises `Conflict` if the target exists, and `StoreUnavailable` if the
    database cannot be read or the target cannot be written. No partial copy is left."""
    if target.exists():
        raise Conflict(f"{target} already exists, and a backup never overwrites; name another file")
    part = target.with_name(target.name + ".part")
    try:
        _create(part)
        with closing(connect(database, read_only=True)) as source, closing(sqlite3.connect(part)) as copy:
            source.execute("BEGIN")  # one snapshot for all steps; it blocks neither readers nor writers
            source.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()
            source.backup(copy, pages=PAGES, progress=lambda _, left, total: on_step(left, total))
            copy.execute("PRAGMA journal_mode = DELETE")
            draw_id(copy)
            copy.commit()
        _put(part, target, like=database)
    except (sqlite3.Error, OSError) as error:
        raise StoreUnavailable(f"cannot back {database} up to {target}: {error}") from error
    finally:
        _discard(part)


def restore(source: Path, database: Path) -> None:
    """Replace the database by a backup. No process may have the database open: raises `Conflict` if one has. Raises
    `InvalidInput` if the source is damaged, or is no database of this service, `SchemaMismatch` if it is at another
    revision (migrate it first, or use the release that wrote it), and `StoreUnavailable` if the files cannot be read or
    written, or there is no room. After an error, the database is unchanged."""
    part = database.with_name(database.name + ".restoring")
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        _create(part)
        uri = f"{source.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True)) as old, closing(sqlite3.connect(part)) as new:
            old.backup(new)
            [(finding,)] = new.execute("PRAGMA integrity_check(1)")
            if finding != "ok":
                raise InvalidInput(f"{source} is damaged: {finding}")
            check_schema(new, source)
            draw_id(new)
            new.execute(UPDATE_SESSION_SECRET, (secrets.token_hex(32),))  # anyone with the backup can read the old one
            new.execute("UPDATE sqlite_sequence SET seq = seq + 1000000 WHERE name = 'event_log'")
            new.commit()
        with _exclusive(database):
            _put(part, database, like=database if database.exists() else source)
    except sqlite3.DatabaseError as error:
        if isinstance(refused := unavailable(error), StoreFull):
            raise refused from error
        raise InvalidInput(f"{source} is damaged, or is no database: {error}") from error
    except OSError as error:
        raise StoreUnavailable(f"cannot restore {database} from {source}: {error}") from error
    finally:
        _discard(part)


def adopt(database: Path) -> None:
    """Give a database a new id, so that values cached under the old one are not read again. Needed for copies that the
    program cannot recognise, for example a cloned volume. Raises `Conflict` if a process has the database open,
    `SchemaMismatch` if it is at another revision, `StoreUnavailable` if it is absent, damaged or cannot be written."""
    with closing(connect(database, read_only=False)) as connection:
        check_schema(connection, database)
    try:
        with _exclusive(database) as connection:
            if connection is None:
                raise StoreUnavailable(f"the database at {database} is damaged; restore a backup")
            draw_id(connection)
            connection.execute("COMMIT")
    except sqlite3.DatabaseError as error:
        raise unavailable(error) from error


@contextmanager
def _exclusive(database: Path) -> Iterator[sqlite3.Connection | None]:
    """Lock the database exclusively, and delete its write-ahead log. Raises `Conflict` if a process has it open. Yields
    a connection in a transaction; None if the file does not exist or is damaged. The log must be deleted before the
    file is replaced. Otherwise: 1. the file is replaced; 2. this process is killed; 3. the next process finds the old
    log and replays it into the new database. Deleting it after the replacement is too late: the log may then belong to
    a process that has opened the new file."""
    if not database.exists():
        _delete_log(database)
        yield None
        return
    check_rights(database)
    with closing(sqlite3.connect(database, timeout=0.2, isolation_level=None)) as connection:
        try:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            # Leave WAL mode: closing a connection in WAL mode would delete a log by its name.
            if connection.execute("PRAGMA journal_mode = DELETE").fetchone() != ("delete",):
                raise _in_use(database)
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.DatabaseError as error:
            name = error_name(error)
            if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
                raise _in_use(database) from error
            if not name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
                raise unavailable(error) from error
        else:
            yield connection
            return
    # SQLite locks no file that it cannot read, and restoring is for damaged files. So lock the bytes on which every
    # connection in WAL mode holds a shared lock.
    with database.open("r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, LOCK_BYTES, LOCKED_FROM)
        except OSError as error:
            raise _in_use(database) from error
        _delete_log(database)
        yield None


def _in_use(database: Path) -> Conflict:
    return Conflict(f"{database} is in use; stop every process of the service first")


def _delete_log(database: Path) -> None:
    for suffix in ("-wal", "-shm"):
        database.with_name(database.name + suffix).unlink(missing_ok=True)


def _create(part: Path) -> None:
    """Create an empty file that only its owner may read. Replace a file that a killed process left."""
    _discard(part)
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _discard(part: Path) -> None:
    for suffix in ("", "-journal"):  # on a full disk, SQLite leaves the journal of what it could not write
        part.with_name(part.name + suffix).unlink(missing_ok=True)


def _put(part: Path, target: Path, like: Path) -> None:
    """Rename `part` to `target` durably, with the owner and mode of `like`."""
    model = like.stat()
    with suppress(PermissionError):  # only root may change the owner
        os.chown(part, model.st_uid, model.st_gid)
    part.chmod(stat.S_IMODE(model.st_mode))
    part.replace(target)
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
