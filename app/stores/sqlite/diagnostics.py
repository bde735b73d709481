"""Diagnoses the database, its disk and this process for `profiles doctor`. It changes nothing."""

from __future__ import annotations

import os
import re
import resource
import shutil
import sqlite3
import stat
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal

from app.errors import SchemaMismatch, StoreUnavailable
from app.events.retention import next_cutoff
from app.features.clock import DAY_MS
from app.operations.doctor import Line, diagnose_features
from app.operations.findings import AUDIT_RULES, waiting_to_be_pruned, wrong_decisions
from app.operations.samples import Sample
from app.profiles.availability import Disabled
from app.stores.sql.backlog import AHEAD_MS, SELECT_AHEAD_COUNT, SELECT_BACKLOG, SELECT_UNKNOWN, Backlog
from app.stores.sql.cutoffs import SELECT_CUTOFF
from app.stores.sql.decisions import SELECT_OLDEST as SELECT_OLDEST_DECISION
from app.stores.sql.event_log import SELECT_OLDEST as SELECT_OLDEST_EVENT
from app.stores.sql.samples import hour_counts, running
from app.stores.sql.sufficient_statistics import damaged, damaged_priors
from app.stores.sqlite.connection import connect, unavailable
from app.stores.sqlite.database import check_schema
from app.stores.sqlite.integrity_check import full_findings, quick_findings

SELECT_NEWEST_SAMPLE = "SELECT MAX(at_ms) FROM samples"
SELECT_DISABLED = "SELECT feature, disabled_by, reason, disabled_at_ms FROM disabled_features ORDER BY feature"
SELECT_OLDEST = {"events": SELECT_OLDEST_EVENT, "decisions": SELECT_OLDEST_DECISION}
MIB, GIB = 2**20, 2**30
WAL_WARN, WAL_BAD = 64 * MIB, GIB
FREE_WARN, FREE_BAD = GIB, 100 * MIB
OPEN_FILES_WARN, OPEN_FILES_BAD = 4_096, 256
OUTBOX_OLD_S = 60.0
SAMPLE_OLD_S = 60.0
MOUNTS = Path("/proc/self/mountinfo")
_OCTAL = re.compile(r"\\([0-7]{3})")
# Locks and the shared memory of the write-ahead log do not work between machines.
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "gpfs", "ocfs2", "davfs")
NETWORK_FUSE = ("fuse.sshfs", "fuse.glusterfs", "fuse.s3fs", "fuse.rclone", "fuse.ceph", "fuse.davfs", "fuse.juicefs")
EPHEMERAL = {
    "tmpfs": "memory, which a restart of the machine clears",
    "ramfs": "memory, which a restart of the machine clears",
    "overlay": "the layer of a container, which is deleted with the container",
}
# For each check that counts faults: its state if the count is not 0, the name of the faults, and the remedy.
COUNTS: dict[str, tuple[Literal["warn", "bad"], str, str]] = {
    "invalidations": (
        "warn",
        "invalidations owed to the cache",
        "Start the cache again. Until a process has made them, every read is computed.",
    ),
    "event times": (
        "warn",
        "events more than five minutes in the future",
        "A clock was wrong when they arrived. Correct it if it still is. They count as recent until that time.",
    ),
    "dead letters": ("warn", "dead letters", "Replay or discard each: /admin/dead-letters."),
    "evidence": (
        "bad",
        "users whose sufficient statistics are damaged",
        "They are scored as new users. Restore their rows of bandit_states from a backup, or erase the users.",
    ),
    "priors": (
        "bad",
        "damaged pooled priors",
        "Check the disk. Decisions use the newest intact prior, and a new one is pooled after the next learning.",
    ),
}
# The releases that fix the WAL-reset bug: https://sqlite.org/wal.html
FIXED_SINCE = (3, 51, 3)
FIXED_BACKPORTS = ((3, 50, 7), (3, 44, 6))


def diagnose_database(
    path: Path, now_ms: int, days: Mapping[str, int], *, whole: bool
) -> tuple[list[Line], list[Sample]]:
    """Diagnose the file and its contents. Return the lines of the report, and the newest sample of each process.
    `days`: the retention of `events` and of `decisions`, in days. `whole`: check the integrity of the whole file."""
    try:
        with closing(connect(path, read_only=True)) as connection:
            check_schema(connection, path)
            return _diagnose(connection, path, now_ms, days, whole=whole)
    except SchemaMismatch as error:
        remedy = "Stop the service and run `profiles migrate`, or use the release that the database belongs to."
        return [Line("database", "bad", str(error), remedy)], []
    except (StoreUnavailable, sqlite3.Error) as error:
        remedy = "Run `profiles migrate` to create a database, or `profiles restore` to restore a backup."
        text = str(unavailable(error) if isinstance(error, sqlite3.Error) else error)
        return [Line("database", "bad", text, remedy)], []


def _diagnose(
    connection: sqlite3.Connection, path: Path, now_ms: int, days: Mapping[str, int], *, whole: bool
) -> tuple[list[Line], list[Sample]]:
    def first(statement: str, *parameters: object) -> int | None:
        row = connection.execute(statement, parameters).fetchone()
        return None if row is None or row[0] is None else int(row[0])

    file, samples = path.stat(), running(connection, now_ms)
    work = Backlog(*connection.execute(SELECT_BACKLOG).fetchone())
    disabled = [Disabled(*row) for row in connection.execute(SELECT_DISABLED)]
    lines = [
        Line("database", "ok", f"{path} answers and is migrated ({file.st_size / MIB:,.1f} MiB)"),
        _integrity(connection, whole=whole),
        _wal(path),
        _rights(file),
        _outbox(now_ms, work.unconsumed, work.oldest_received_at_ms),
        _count("invalidations", work.owed),
        _count("event times", first(SELECT_AHEAD_COUNT, now_ms + AHEAD_MS)),
        _decision_ids(connection.execute(SELECT_UNKNOWN, (now_ms - DAY_MS,)).fetchall()),
        _count("dead letters", work.dead_letters),
        _count("evidence", damaged(connection, whole=whole)),
        _count("priors", damaged_priors(connection)),
        _samples(first(SELECT_NEWEST_SAMPLE), now_ms),
        _audit(hour_counts(connection, now_ms)),
        diagnose_features(samples, {row.feature: str(row) for row in disabled}),
        _retention(
            [
                what
                for what, kept in days.items()
                if next_cutoff(now_ms - kept * DAY_MS, first(SELECT_CUTOFF, what), first(SELECT_OLDEST[what])) is None
            ]
        ),
    ]
    return lines, samples


def _count(check: str, count: int | None) -> Line:
    state, what, remedy = COUNTS[check]
    return Line(check, state, f"{what}: {count:,}", remedy) if count else Line(check, "ok", f"{what}: none")


def _integrity(connection: sqlite3.Connection, *, whole: bool) -> Line:
    if found := (full_findings if whole else quick_findings)(connection):
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


def _outbox(now_ms: int, count: int, oldest_ms: int | None) -> Line:
    age_s = 0.0 if oldest_ms is None else (now_ms - oldest_ms) / 1000
    if age_s < OUTBOX_OLD_S:
        return Line("outbox", "ok", f"{count:,} events wait for a worker")
    text = f"{count:,} events wait for a worker, the oldest for {age_s:,.0f} s"
    return Line("outbox", "warn", text, "Start `profiles worker`, or one more.")


def _decision_ids(senders: Sequence[tuple[str, int]]) -> Line:
    if not (wrong := wrong_decisions(senders)):
        return Line("decision ids", "ok", "every decision id that was sent in the last day is known")
    return Line("decision ids", "warn", " ".join(finding.text for finding in wrong), wrong[0].advice)


def _samples(newest_ms: int | None, now_ms: int) -> Line:
    age_s = None if newest_ms is None else (now_ms - newest_ms) / 1000
    if age_s is not None and age_s <= SAMPLE_OLD_S:
        return Line("samples", "ok", f"a process stored a sample of its metrics {max(0.0, age_s):,.0f} s ago")
    text = "no process has ever stored a sample" if age_s is None else f"the newest sample is {age_s:,.0f} s old"
    remedy = "Start `profiles serve` and `profiles worker`, or find in their logs why they cannot write."
    return Line("samples", "warn", text, remedy)


def _audit(counts: Mapping[str, int]) -> Line:
    found = [(rule, counts[name]) for name, rule in AUDIT_RULES.items() if counts.get(name)]
    if not found:
        return Line("audit", "ok", "the workers' audit has found no wrong value in the last hour")
    text = " ".join(rule.text(count) for rule, count in found)
    return Line("audit", "bad", text, " ".join(rule.advice for rule, _ in found))


def _retention(waiting: Sequence[str]) -> Line:
    for finding in waiting_to_be_pruned(waiting):
        return Line("retention", "warn", finding.text, finding.advice)
    return Line("retention", "ok", "events and decisions past their retention are deleted every night")


def diagnose_machine(path: Path) -> list[Line]:
    """Diagnose the disk of the file, the release of SQLite and the limits of this process. Return the report lines. If
    the file is missing, the disk of the nearest existing directory above it is diagnosed."""
    place = path.resolve()
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return [
        diagnose_file_system(place),
        diagnose_space(usage.free, usage.total, place.stat().st_size if place.is_file() else 0),
        diagnose_sqlite(sqlite3.sqlite_version_info),
        _open_files(soft if soft != resource.RLIM_INFINITY else 2**31),
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


def _open_files(limit: int) -> Line:
    text = f"a process started from here may open {limit:,} files; every connection needs one"
    if limit >= OPEN_FILES_WARN:
        return Line("open files", "ok", text)
    remedy = "Raise the limit: ulimit -n 65536, LimitNOFILE= of systemd, or ulimits: of Compose."
    return Line("open files", "bad" if limit < OPEN_FILES_BAD else "warn", text, remedy)
