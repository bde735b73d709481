"""Judges the database, its disk and the limits of this process."""

from __future__ import annotations

from collections.abc import Sequence

from app.operations.doctor.facts import DatabaseFacts, Line, MachineFacts
from app.operations.doctor.features import diagnose_features
from app.operations.findings import waiting_to_be_pruned, wrong_decisions

MIB, GIB = 2**20, 2**30
WAL_WARN, WAL_BAD = 64 * MIB, GIB
FREE_WARN, FREE_BAD = GIB, 100 * MIB
OPEN_FILES_WARN, OPEN_FILES_BAD = 4_096, 256
OUTBOX_OLD_S = 60.0
SAMPLE_OLD_S = 60.0
# Their locks, or the shared memory that the write-ahead log needs, do not reach from one machine to another.
NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "gpfs", "ocfs2", "davfs"}
)
NETWORK_FUSE = ("fuse.sshfs", "fuse.glusterfs", "fuse.s3fs", "fuse.rclone", "fuse.ceph", "fuse.davfs", "fuse.juicefs")
FLEETING = {
    "tmpfs": "memory; a restart of the machine empties it",
    "ramfs": "memory; a restart of the machine empties it",
    "overlay": "a container's own layer, which goes with the container",
}
# https://sqlite.org/wal.html: the defect of the WAL-reset, and the releases that mended it.
MENDED_FROM = (3, 51, 3)
MENDED_BACKPORTS = ((3, 50, 7), (3, 44, 6))


def diagnose_database(found: DatabaseFacts) -> list[Line]:
    """Lines about what is in the file."""
    return [
        _integrity(found),
        _wal(found),
        _rights(found),
        _outbox(found),
        _owed(found),
        _ahead(found),
        _decision_ids(found),
        _letters(found),
        _evidence(found),
        _priors(found),
        _samples(found),
        diagnose_features(found.running, found.disabled),
    ]


def diagnose_machine(found: MachineFacts, database_bytes: int) -> list[Line]:
    """Lines about what the file lies on, and about this process."""
    return [_file_system(found), _space(found, database_bytes), diagnose_sqlite(found.sqlite), _open_files(found)]


def diagnose_sqlite(version: tuple[int, ...]) -> Line:
    """Whether this release has the defect that can corrupt a write-ahead log."""
    shown = ".".join(map(str, version))
    mended = version >= MENDED_FROM or any(
        version[:2] == backport[:2] and version >= backport for backport in MENDED_BACKPORTS
    )
    if mended:
        return Line("sqlite", "ok", f"SQLite {shown} has no defect that is known to matter here")
    text = f"SQLite {shown} can corrupt a database when two programs checkpoint and write at once"
    remedy = (
        "The service avoids it: one connection checkpoints, holding the write lock. Let no other program write to the "
        "file while the service runs, or use SQLite 3.51.3, 3.50.7 or 3.44.6."
    )
    return Line("sqlite", "warn", text, remedy)


def _integrity(found: DatabaseFacts) -> Line:
    if found.findings:
        remedy = "Stop the service, copy the files aside, and put a backup in place with `profiles restore`."
        return Line("integrity", "bad", f"it is damaged: {'; '.join(found.findings)}", remedy)
    looked = "every page, row and index is sound" if found.whole else "its end is sound; --full looks at all of it"
    return Line("integrity", "ok", looked)


def _wal(found: DatabaseFacts) -> Line:
    shown = f"the write-ahead log has {found.wal_bytes / MIB:,.1f} MiB"
    if found.wal_bytes < WAL_WARN:
        return Line("wal", "ok", shown)
    remedy = (
        "Look for a program that keeps a read transaction open (a shell, a backup): it keeps the log from shrinking."
    )
    return Line("wal", "bad" if found.wal_bytes >= WAL_BAD else "warn", shown, remedy)


def _rights(found: DatabaseFacts) -> Line:
    if found.world_writable:
        return Line("rights", "bad", "everybody on this machine may write to the database", "chmod o-w the file.")
    if found.links > 1:
        text = f"the file has {found.links} names (hard links), each with a write-ahead log of its own"
        return Line("rights", "bad", text, "Remove all but one, unless a backup tool holds the other one for a moment.")
    return Line("rights", "ok", "not everybody may write to the database")


def _outbox(found: DatabaseFacts) -> Line:
    age_s = found.oldest_unconsumed_s
    if age_s is None or age_s < OUTBOX_OLD_S:
        return Line("outbox", "ok", f"{found.unconsumed:,} events wait for a worker")
    text = f"{found.unconsumed:,} events wait for a worker, the oldest for {age_s:,.0f} s"
    return Line("outbox", "warn", text, "Start `profiles worker`, or one more.")


def _ahead(found: DatabaseFacts) -> Line:
    if not found.events_ahead:
        return Line("event times", "ok", "no event lies in the future")
    text = f"{found.events_ahead:,} lie more than five minutes in the future"
    remedy = "A clock was wrong when they came. They count as recent until that time; correct the clock if it still is."
    return Line("event times", "warn", text, remedy)


def _decision_ids(found: DatabaseFacts) -> Line:
    wrong = wrong_decisions(found.unknown_decisions)
    if not wrong:
        return Line("decision ids", "ok", "every one that was sent in the last day is known")
    return Line("decision ids", "warn", " ".join(finding.text for finding in wrong), wrong[0].advice)


def diagnose_retention(waiting: Sequence[str]) -> Line:
    """Whether the first run that deletes these kinds of things waits for an admin."""
    for finding in waiting_to_be_pruned(waiting):
        return Line("retention", "warn", finding.text, finding.advice)
    return Line("retention", "ok", "what is too old is deleted every night")


def _owed(found: DatabaseFacts) -> Line:
    if not found.owed:
        return Line("invalidations", "ok", "none is owed to the cache")
    text = f"{found.owed:,} are owed to the cache; reads compute until they are made"
    return Line("invalidations", "warn", text, "Bring the cache back; any process that reaches it makes them.")


def _letters(found: DatabaseFacts) -> Line:
    if not found.dead_letters:
        return Line("dead letters", "ok", "there are none")
    return Line("dead letters", "warn", f"{found.dead_letters:,} wait", "Replay or discard each: /admin/dead-letters.")


def _evidence(found: DatabaseFacts) -> Line:
    if not found.unreadable:
        return Line("evidence", "ok", "nobody's learned evidence is known to be damaged")
    users = f"{found.unreadable:,} user{'' if found.unreadable == 1 else 's'}"
    remedy = "They are scored as new ones. Put their rows of bandit_states back from a backup, or erase the users."
    return Line("evidence", "bad", f"the learned evidence of {users} is damaged", remedy)


def _priors(found: DatabaseFacts) -> Line:
    if not (count := found.damaged_priors):
        return Line("priors", "ok", "no pooled prior is damaged")
    text = f"{count:,} pooled prior is damaged" if count == 1 else f"{count:,} pooled priors are damaged"
    remedy = "Decisions use the newest that is sound; a new one is pooled once anything is learned. Look at the disk."
    return Line("priors", "bad", text, remedy)


def _samples(found: DatabaseFacts) -> Line:
    age_s = found.newest_sample_s
    if age_s is not None and age_s <= SAMPLE_OLD_S:
        return Line("samples", "ok", f"a process stored its figures {max(0.0, age_s):,.0f} s ago")
    text = "no process has ever stored its figures" if age_s is None else f"the newest figures are {age_s:,.0f} s old"
    return Line(
        "samples", "warn", text, "Start `profiles serve` and `profiles worker`, or look at why they cannot write."
    )


def _file_system(found: MachineFacts) -> Line:
    kind = found.file_system
    if kind in NETWORK or kind.startswith(NETWORK_FUSE):
        text = f"the database lies on a network file system ({kind} at {found.mounted_at})"
        return Line(
            "file system", "bad", text, "Put it on a local disk: SQLite's log needs memory that processes share."
        )
    if kind in FLEETING:
        text = f"the database lies in {FLEETING[kind]} ({kind} at {found.mounted_at})"
        return Line("file system", "warn", text, "Put it on a volume that stays.")
    return Line("file system", "ok", f"{kind} at {found.mounted_at}" if kind else "of a kind that is not known")


def _space(found: MachineFacts, database_bytes: int) -> Line:
    shown = f"{found.free_bytes / GIB:,.1f} GiB free of {found.disk_bytes / GIB:,.1f}"
    if found.free_bytes < FREE_BAD:
        return Line("disk space", "bad", shown, "Make room: on a full disk events are refused (507), reads go on.")
    if found.free_bytes < max(FREE_WARN, database_bytes):
        remedy = "Make room: a backup beside the database, and growth, want as much as the database takes."
        return Line("disk space", "warn", shown, remedy)
    return Line("disk space", "ok", shown)


def _open_files(found: MachineFacts) -> Line:
    text = f"a process started from here may open {found.open_files:,} files; every connection is one"
    if found.open_files >= OPEN_FILES_WARN:
        return Line("open files", "ok", text)
    remedy = "Raise it: ulimit -n 65536, LimitNOFILE= of systemd, or ulimits: of Compose."
    return Line("open files", "bad" if found.open_files < OPEN_FILES_BAD else "warn", text, remedy)
