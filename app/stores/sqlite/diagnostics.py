"""Looks at the database and what it lies on, for `profiles doctor`. It changes nothing."""

from __future__ import annotations

import os
import re
import resource
import shutil
import sqlite3
import stat
from contextlib import closing
from pathlib import Path

from app.features.clock import DAY_MS
from app.operations.doctor.facts import DatabaseFacts, MachineFacts
from app.profiles.availability import Disabled
from app.stores.sqlite.connection import connect, unavailable
from app.stores.sqlite.cutoffs import SELECT_CUTOFF
from app.stores.sqlite.database import check_schema
from app.stores.sqlite.decisions import SELECT_OLDEST as SELECT_OLDEST_DECISION
from app.stores.sqlite.event_log import SELECT_OLDEST as SELECT_OLDEST_EVENT
from app.stores.sqlite.integrity_check import full_findings, quick_findings
from app.stores.sqlite.outbox import (
    AHEAD_MS,
    SELECT_AHEAD_COUNT,
    SELECT_LETTER_COUNT,
    SELECT_OWED_COUNT,
    SELECT_UNCONSUMED_COUNT,
    SELECT_UNKNOWN,
)
from app.stores.sqlite.priors import damaged_priors
from app.stores.sqlite.samples import running
from app.stores.sqlite.states import damaged

MOUNTS = Path("/proc/self/mountinfo")
SELECT_NEWEST_SAMPLE = "SELECT MAX(at_ms) FROM samples"
SELECT_DISABLED = "SELECT feature, disabled_by, reason, disabled_at_ms FROM disabled_features ORDER BY feature"
_OCTAL = re.compile(r"\\([0-7]{3})")


def database_facts(path: Path, now_ms: int, *, whole: bool) -> DatabaseFacts:
    """What is in the file; `whole` reads all of it.

    Raises:
        StoreUnavailable: it cannot be opened.
        SchemaMismatch: it is unmigrated, behind, or newer than this program.
    """
    with closing(connect(path, read_only=True)) as connection:
        check_schema(connection, path)
        findings = (full_findings if whole else quick_findings)(connection)
        try:
            unconsumed, oldest_ms = connection.execute(SELECT_UNCONSUMED_COUNT).fetchone()
            (letters,) = connection.execute(SELECT_LETTER_COUNT).fetchone()
            (owed,) = connection.execute(SELECT_OWED_COUNT).fetchone()
            (ahead,) = connection.execute(SELECT_AHEAD_COUNT, (now_ms + AHEAD_MS,)).fetchone()
            unknown = connection.execute(SELECT_UNKNOWN, (now_ms - DAY_MS,)).fetchall()
            kept = {
                what: (_first(connection, SELECT_CUTOFF, what), _first(connection, statement))
                for what, statement in (("events", SELECT_OLDEST_EVENT), ("decisions", SELECT_OLDEST_DECISION))
            }
            unreadable = damaged(connection, whole=whole)
            priors = damaged_priors(connection)
            (sample_ms,) = connection.execute(SELECT_NEWEST_SAMPLE).fetchone()
            samples = running(connection, now_ms)
            disabled = [Disabled(*row) for row in connection.execute(SELECT_DISABLED)]
        except sqlite3.Error as error:
            raise unavailable(error) from error
    wal = path.with_name(path.name + "-wal")
    return DatabaseFacts(
        bytes=path.stat().st_size,
        wal_bytes=wal.stat().st_size if wal.exists() else 0,
        links=path.stat().st_nlink,
        world_writable=bool(path.stat().st_mode & stat.S_IWOTH),
        findings=tuple(findings),
        whole=whole,
        kept=kept,
        unconsumed=unconsumed,
        oldest_unconsumed_s=(now_ms - oldest_ms) / 1000 if oldest_ms is not None else None,
        dead_letters=letters,
        owed=owed,
        events_ahead=ahead,
        unknown_decisions=unknown,
        unreadable=unreadable,
        damaged_priors=priors,
        newest_sample_s=(now_ms - sample_ms) / 1000 if sample_ms is not None else None,
        running=tuple(samples),
        disabled={row.feature: str(row) for row in disabled},
    )


def _first(connection: sqlite3.Connection, statement: str, *parameters: object) -> int | None:
    row = connection.execute(statement, parameters).fetchone()
    return None if row is None or row[0] is None else int(row[0])


def machine_facts(path: Path, mounts: Path = MOUNTS) -> MachineFacts:
    """What the file lies on, or would; and what this process may do."""
    place = path.resolve()
    while not place.exists():
        place = place.parent
    kind, mounted_at = file_system(place, mounts)
    usage = shutil.disk_usage(place)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MachineFacts(
        file_system=kind,
        mounted_at=mounted_at,
        free_bytes=usage.free,
        disk_bytes=usage.total,
        open_files=soft if soft != resource.RLIM_INFINITY else 2**31,
        sqlite=sqlite3.sqlite_version_info,
    )


def file_system(place: Path, mounts: Path = MOUNTS) -> tuple[str, str]:
    """The kind of file system a place is on, and where that is mounted; empty where the system does not tell."""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return "", ""
    found = ("", "")
    for line in lines:  # of two on the same point, the later one hides the earlier
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        point = _OCTAL.sub(lambda code: chr(int(code[1], 8)), fields[4]) if len(fields) > 4 else ""
        if point and len(point) >= len(found[1]) and _is_below(place, point):
            found = (after.split(" ")[0], point)
    return found


def _is_below(place: Path, point: str) -> bool:
    return os.path.commonpath([place, point]) == point
