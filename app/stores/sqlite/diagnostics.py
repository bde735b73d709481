"""Diagnoses a SQLite file and its disk for `profiles doctor`. It changes nothing."""

import os
import re
import shutil
import sqlite3
import stat
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from app.errors import SchemaMismatch, StoreUnavailable
from app.operations.doctor import NOT_MIGRATED, Line
from app.operations.samples import Sample
from app.stores.sql.diagnostics import diagnose_contents
from app.stores.sqlite.connection import connect, unavailable
from app.stores.sqlite.database import check_schema
from app.stores.sqlite.integrity_check import findings

MIB, GIB = 2**20, 2**30
WAL_WARN, WAL_BAD = 64 * MIB, GIB
FREE_WARN, FREE_BAD = GIB, 100 * MIB
MOUNTS = Path("/proc/self/mountinfo")
_OCTAL = re.compile(r"\\([0-7]{3})")
# Locks and the shared memory of the write-ahead log do not work between machines.
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "gpfs", "ocfs2", "davfs")
NETWORK_FUSE = ("fuse.sshfs", "fuse.glusterfs", "fuse.s3fs", "fuse.rclone", "fuse.ceph", "fuse.davfs", "fuse.juicefs")
EPHEMERAL = {
    **dict.fromkeys(("tmpfs", "ramfs"), "memory, which a restart of the machine clears"),
    "overlay": "the layer of a container, which is deleted with the container",
}
# The releases that fix the WAL-reset bug: https://sqlite.org/wal.html
FIXED_SINCE = (3, 51, 3)
FIXED_BACKPORTS = ((3, 50, 7), (3, 44, 6))


def diagnose_database(
    path: Path, now_ms: int, days: Mapping[str, int], *, whole: bool
) -> tuple[list[Line], list[Sample]]:
    """Diagnose the file and its contents. Return the report lines, and the newest metric sample of each process.
    `days`: the retention of `events` and of `decisions`, in days. `whole`: check the integrity of the whole file."""
    try:
        with closing(connect(path, read_only=True)) as connection:
            check_schema(connection, path)
            file = path.stat()
            contents, running = diagnose_contents(connection, now_ms, days, whole=whole)
            lines = [
                Line("database", "ok", f"{path} answers and is migrated ({file.st_size / MIB:,.1f} MiB)"),
                _integrity(connection, whole=whole),
                _wal(path),
                _rights(file),
            ]
            return [*lines, *contents], running
    except SchemaMismatch as error:
        return [Line("database", "bad", str(error), NOT_MIGRATED)], []
    except (StoreUnavailable, sqlite3.Error) as error:
        remedy = "Run `profiles migrate` to create a database, or `profiles restore` to restore a backup."
        if path.exists():
            remedy = "Correct this; or keep a copy of the file, and restore a backup with `profiles restore`."
        text = str(unavailable(error) if isinstance(error, sqlite3.Error) else error)
        return [Line("database", "bad", text, remedy)], []


def _integrity(connection: sqlite3.Connection, *, whole: bool) -> Line:
    if found := findings(connection, whole=whole):
        remedy = "Stop the service, keep a copy of the files, and restore a backup with `profiles restore`."
        return Line("integrity", "bad", f"it is damaged: {'; '.join(found)}", remedy)
    checked = "every page, row and index is intact" if whole else "the newest events are intact; --full checks the rest"
    return Line("integrity", "ok", checked)


def _wal(path: Path) -> Line:
    wal = path.with_name(path.name + "-wal")
    size = wal.stat().st_size if wal.exists() else 0
    text = f"the size of the write-ahead log is {size / MIB:,.1f} MiB"
    if size < WAL_WARN:
        return Line("wal", "ok", text)
    remedy = "Find a program that keeps a read transaction open, such as a shell or a backup: the log cannot shrink."
    return Line("wal", "bad" if size >= WAL_BAD else "warn", text, remedy)


def _rights(file: os.stat_result) -> Line:
    if file.st_mode & stat.S_IWOTH:
        return Line("rights", "bad", "every account on this machine may write to the database", "chmod o-w the file.")
    if file.st_nlink > 1:
        text = f"the file has {file.st_nlink} names (hard links), and each has its own write-ahead log"
        return Line("rights", "bad", text, "Remove all but one, unless a backup tool holds the other one for a moment.")
    return Line("rights", "ok", "only some accounts may write to the database")


def diagnose_machine(path: Path) -> list[Line]:
    """Diagnose the disk of the file and the release of SQLite. Return the report lines. If the file is missing, the
    disk of the nearest existing directory above it is diagnosed."""
    place = path.resolve()
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    return [
        diagnose_file_system(place),
        diagnose_space(usage.free, usage.total, place.stat().st_size if place.is_file() else 0),
        diagnose_sqlite(sqlite3.sqlite_version_info),
    ]


def diagnose_file_system(place: Path, mounts: Path = MOUNTS) -> Line:
    """Report whether SQLite can use the file system of a path, and whether that file system is persistent."""
    kind, mounted_at = _file_system(place, mounts)
    if kind in NETWORK or kind.startswith(NETWORK_FUSE):
        text = f"the database lies on a network file system ({kind} at {mounted_at})"
        remedy = "Move it to a local disk: SQLite's log needs memory that processes share."
        return Line("file system", "bad", text, remedy)
    if kind in EPHEMERAL:
        text = f"the database lies in {EPHEMERAL[kind]} ({kind} at {mounted_at})"
        return Line("file system", "warn", text, "Move it to a persistent volume.")
    return Line("file system", "ok", f"{kind} at {mounted_at}" if kind else "unknown: the system does not report it")


def _file_system(place: Path, mounts: Path) -> tuple[str, str]:
    """The type of the file system at a path, and its mount point; both are empty if the system reports none."""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return "", ""
    found = ("", "")
    for line in lines:  # a later mount on the same point hides an earlier one
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        point = _OCTAL.sub(lambda code: chr(int(code[1], 8)), fields[4]) if len(fields) > 4 else ""
        if point and len(point) >= len(found[1]) and os.path.commonpath([place, point]) == point:
            found = (after.split(" ")[0], point)
    return found


def diagnose_space(free: int, total: int, database: int) -> Line:
    """Report whether the disk has room for growth and for a backup. All sizes are in bytes."""
    text = f"{free / GIB:,.1f} GiB free of {total / GIB:,.1f}"
    if free < FREE_BAD:
        return Line("disk space", "bad", text, "Make room: on a full disk events are refused (507) and reads continue.")
    if free < max(FREE_WARN, database):
        remedy = "Make room: a backup on this disk needs as much space as the database, and the database grows."
        return Line("disk space", "warn", text, remedy)
    return Line("disk space", "ok", text)


def diagnose_sqlite(version: tuple[int, ...]) -> Line:
    """Report whether this release of SQLite has the bug that can corrupt a write-ahead log."""
    shown = ".".join(map(str, version))
    if version >= FIXED_SINCE or any(version[:2] == fixed[:2] and version >= fixed for fixed in FIXED_BACKPORTS):
        return Line("sqlite", "ok", f"SQLite {shown} has no known bug that affects the service")
    text = f"SQLite {shown} can corrupt a database when two programs checkpoint and write at once"
    remedy = (
        "The service avoids this: one connection checkpoints, holding the write lock. Let no other program write to "
        "the file while the service runs, or use SQLite 3.51.3, 3.50.7 or 3.44.6."
    )
    return Line("sqlite", "warn", text, remedy)
