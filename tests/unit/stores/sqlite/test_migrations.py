"""Migrations: the schema fits the code, and other databases are refused."""

from __future__ import annotations

import importlib
import itertools
import os
import pkgutil
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command
from alembic.script import ScriptDirectory

from app.bandit.model.inputs import SPEC_V2
from app.errors import SchemaMismatch, StoreUnavailable
from app.migrations import configuration
from app.stores.migrate import current, migrate
from app.stores.sql.database import SCHEMA_REVISION
from app.stores.sqlite.database import SqliteDatabase
from tests.support.waiting import PATIENCE_S, eventually_sync

STATEMENT = re.compile(r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH RECURSIVE)\b", re.IGNORECASE)


class AnyParameter(dict[str, None]):
    """NULL for every named parameter."""

    def __missing__(self, name: str) -> None:
        return None


def statements(*engines: str) -> Iterator[tuple[str, str]]:
    """The SQL constants of packages in `app.stores`, by module and name."""
    for package in map(importlib.import_module, (f"app.stores.{engine}" for engine in engines)):
        for info in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{info.name}")
            for name, value in vars(module).items():
                texts = value if isinstance(value, tuple) else (value,)
                for text in texts:
                    if isinstance(text, str) and STATEMENT.match(text):
                        yield f"{info.name}.{name}", text


def schema(path: Path) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT name, sql FROM sqlite_schema ORDER BY name").fetchall()
    return [(name, sql and sql.replace('"event_log"', "event_log")) for name, sql in rows]  # quoted by a renaming


def set_revision(path: Path, revision: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))


def test_schema_revision_is_the_head_of_the_migrations(tmp_path: Path) -> None:
    heads = ScriptDirectory.from_config(configuration(tmp_path / "none.db")).get_heads()
    assert heads == [SCHEMA_REVISION]


def test_database_reaches_the_head_when_there_was_no_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "100% new" / "profiles.db"
    assert current(path) is None
    assert migrate(path) == (None, SCHEMA_REVISION)
    assert migrate(path) == (SCHEMA_REVISION, SCHEMA_REVISION)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_alembic_is_not_imported_when_there_is_nothing_to_migrate(database_path: Path) -> None:
    program = (
        "import pathlib, sys; from app.stores.migrate import migrate; "
        "print(*migrate(pathlib.Path(sys.argv[1])), 'alembic' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(database_path)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    assert shown.stdout.split() == [SCHEMA_REVISION, SCHEMA_REVISION, "False"]


def test_each_new_database_has_its_own_id(tmp_path: Path) -> None:
    ids = set()
    for name in ("one.db", "two.db"):
        migrate(tmp_path / name)
        with closing(sqlite3.connect(tmp_path / name)) as connection:
            ids.add(connection.execute("SELECT value FROM service WHERE name = 'database_id'").fetchone())
    assert len(ids) == 2


def test_statements_compile_against_the_migrated_schema(migrated_template: Path) -> None:
    names = set()
    with closing(sqlite3.connect(f"file:{migrated_template}?mode=ro", uri=True)) as connection:
        for name, sql in statements("sql", "sqlite"):
            parameters: AnyParameter | tuple[None, ...] = AnyParameter() if "?" not in sql else (None,) * sql.count("?")
            try:
                connection.execute("EXPLAIN " + sql, parameters)
            except sqlite3.Error as error:
                raise AssertionError(f"{name}: {error}") from error
            names.add(name)
    assert {"event_log.SELECT_KNOWN", "event_log.DELETE_EVENTS", "dead_letters.UPDATE_ATTEMPTS"} < names
    assert {"users.SELECT_ELIGIBLE", "cache_state.DELETE_OWED", "database.SELECT_REVISION"} < names


async def refused(path: Path, error: type[Exception]) -> str:
    with pytest.raises(error) as caught:
        await SqliteDatabase.open(path, readers=1)
    assert str(path) in str(caught.value)
    return str(caught.value)


async def test_database_is_refused_when_the_file_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "none.db"
    assert "profiles migrate" in await refused(path, StoreUnavailable)
    assert not path.exists()


@pytest.mark.parametrize("tables", ["", "CREATE TABLE notes (text)"], ids=["empty", "of another program"])
async def test_database_is_refused_when_it_is_not_migrated(tmp_path: Path, tables: str) -> None:
    path = tmp_path / "other.db"
    path.touch()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(tables)
    assert "not migrated; run `profiles migrate`" in await refused(path, SchemaMismatch)


@pytest.mark.parametrize(
    ("revision", "advice"),
    [("9999", "upgrade the program"), ("0005", "with a release of this project from before 2026-11-30")],
)
async def test_database_is_refused_when_this_program_cannot_migrate_it(
    database_path: Path, revision: str, advice: str
) -> None:
    set_revision(database_path, revision)
    message = await refused(database_path, SchemaMismatch)
    assert revision in message
    assert advice in message
    with pytest.raises(SchemaMismatch, match=revision) as caught:
        migrate(database_path)
    assert str(caught.value) == message


async def test_database_is_refused_until_it_is_migrated_when_it_is_at_an_earlier_revision(tmp_path: Path) -> None:
    path = tmp_path / "profiles.db"
    command.upgrade(configuration(path), "0006")
    message = await refused(path, SchemaMismatch)
    assert "0006" in message
    assert "run `profiles migrate`" in message
    assert migrate(path) == ("0006", SCHEMA_REVISION)


async def test_file_is_refused_when_it_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "profiles.db"
    path.write_bytes(b"no database, but long enough to look like one" * 100)
    for file, reason in ((path, "not a database"), (tmp_path, "no database")):
        assert reason in await refused(file, StoreUnavailable)
        with pytest.raises(StoreUnavailable, match="cannot migrate"):
            migrate(file)
    assert path.read_bytes().startswith(b"no database")


def test_nothing_is_migrated_when_a_migration_fails_half_way(tmp_path: Path) -> None:
    path = tmp_path / "profiles.db"
    with closing(sqlite3.connect(path)) as connection:  # the name of one of the last tables that are created
        connection.execute("CREATE TABLE audit_trail (text)")
    before = schema(path)
    with pytest.raises(StoreUnavailable, match="audit_trail"):
        migrate(path)
    assert schema(path) == before
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("DROP TABLE audit_trail")
    assert migrate(path) == (None, SCHEMA_REVISION)


OLD_KNOWN = "SELECT event_id, digest FROM event_log WHERE event_id IN (SELECT value FROM json_each(?))"
OLD_INSERT = """
INSERT INTO event_log
    (seq, event_id, subject, user_id, digest, occurred_at_ms, claimed_at_ms, received_at_ms, consumed_at_ms, sent_by)
VALUES (
    (SELECT seq + 1 FROM sqlite_sequence WHERE name = 'event_log'), ?, 'signals.tip.served', ?, x'00', 1,
    NULL, 1, 1, NULL
)
"""


@pytest.fixture
def before_versions(tmp_path: Path) -> Path:
    """A database at revision 0006 whose newest events have been pruned."""
    path = tmp_path / "profiles.db"
    command.upgrade(configuration(path), "0006")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('event_log', 0)")
        for number in range(1, 8):
            connection.execute(OLD_INSERT, (f"e{number}", "ann" if number % 2 else "bob"))
        connection.execute("DELETE FROM event_log WHERE seq > 5")
    return path


def test_nothing_is_migrated_when_a_table_was_changed(before_versions: Path) -> None:
    with closing(sqlite3.connect(before_versions, isolation_level=None)) as connection:
        connection.execute("ALTER TABLE event_log RENAME COLUMN event_id TO id")
    before = schema(before_versions)
    with pytest.raises(SchemaMismatch, match="event_log"):
        migrate(before_versions)
    assert schema(before_versions) == before


def log_rows(connection: sqlite3.Connection) -> list[tuple[int, str, str]]:
    return connection.execute("SELECT seq, event_id, user_id FROM event_log ORDER BY seq").fetchall()


def test_event_ids_are_unique_per_user_after_revision_0007(before_versions: Path) -> None:
    with closing(sqlite3.connect(before_versions, isolation_level=None)) as connection:
        before = log_rows(connection)
        command.upgrade(configuration(before_versions), "0007")
        assert log_rows(connection) == before
        connection.execute(OLD_INSERT, ("e1", "bob"))
        assert log_rows(connection) == [*before, (8, "e1", "bob")], "numbers 6 and 7 were used"
        with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
            connection.execute(OLD_INSERT, ("e1", "ann"))
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_processes_of_the_release_before_go_on_when_the_log_is_copied(before_versions: Path) -> None:
    # The number of writes is limited: SQLite's lock is not fair, and an endless writer can keep the migration from it.
    permits, stop, written = threading.Semaphore(5), threading.Event(), []

    def write() -> None:
        with closing(sqlite3.connect(before_versions, isolation_level=None, timeout=PATIENCE_S)) as connection:
            for number in itertools.count(101):
                permits.acquire()
                if stop.is_set():
                    return
                assert connection.execute(OLD_KNOWN, (f'["e{number}"]',)).fetchall() == []
                connection.execute("BEGIN IMMEDIATE")
                connection.execute(OLD_INSERT, (f"e{number}", "cid"))
                connection.execute("COMMIT")
                written.append(f"e{number}")

    with closing(sqlite3.connect(before_versions, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        before = log_rows(reader)
        writer = threading.Thread(target=write)
        writer.start()
        try:
            eventually_sync(lambda: len(written) == 5)
            permits.release(30)
            command.upgrade(configuration(before_versions), "0007")
            permits.release(10)
            eventually_sync(lambda: len(written) == 45)
        finally:
            stop.set()
            permits.release(50)
            writer.join()
        assert log_rows(reader) == before, "its snapshot is the one from before"
        reader.execute("COMMIT")
        rows = log_rows(reader)
    assert [event_id for _, event_id, user_id in rows if user_id == "cid"] == written
    assert [seq for seq, _, _ in rows] == [*range(1, 6), *range(8, 8 + len(written))]


def test_migration_leaves_checkpoints_to_the_service(before_versions: Path) -> None:
    with closing(sqlite3.connect(before_versions, isolation_level=None)) as other:
        other.execute("PRAGMA wal_autocheckpoint = 0")
        other.execute("UPDATE event_log SET digest = zeroblob(5000000) WHERE seq = 1")
        os.utime(before_versions, (0, 0))
        command.upgrade(configuration(before_versions), "0007")  # copies the log
        assert before_versions.stat().st_mtime == 0, "frames were copied to the file without the write lock"


EVENT = """
INSERT INTO event_log (event_id, subject, user_id, digest, occurred_at_ms, received_at_ms, consumed_at_ms, attempts)
VALUES (?, 'signals.tip.served', 'ann', x'00', 1, 2, ?, ?)
"""
DECISION = """
INSERT INTO tip_scores (decision_id, request_id, user_id, created_at_ms, explore, role, served_by, policy_hash,
    spec_hash, state_version, prior_version, profile_origin, profile_present, chosen, chosen_id, elapsed_us, theta, phi,
    request)
VALUES (?, ?, ?, 1, 1, 'champion', 'p', 'h', 's', 0, 0, 'absent', 0, 0, 'tip', 1, x'00', x'00', '{}')
"""


@pytest.fixture
def before_outbox(tmp_path: Path) -> Path:
    """A database at revision 0007 with a consumed event, two that wait, and a decision about the first."""
    path = tmp_path / "profiles.db"
    command.upgrade(configuration(path), "0007")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.executemany(EVENT, [("e1", 9, 1), ("e2", None, 0), ("e3", None, 2)])
        connection.execute(DECISION, ("d", "r", "ann"))
        connection.execute("INSERT INTO decision_events VALUES (1, 1, 'served')")
    return path


def test_waiting_events_are_in_the_outbox_after_revision_0008(before_outbox: Path) -> None:
    command.upgrade(configuration(before_outbox), "0008")
    with closing(sqlite3.connect(before_outbox, isolation_level=None)) as connection:
        assert connection.execute("SELECT * FROM outbox").fetchall() == [(2, "ann", 2, 0), (3, "ann", 2, 2)]
        assert connection.execute("SELECT * FROM decision_events").fetchall() == [(1, "ann", 1, "served")]
        assert [row[0] for row in log_rows(connection)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("shadowed", "changed_at_ms", "challenger"),
    [("s", 0, "s"), ("s", 9, "s"), (None, 9, SPEC_V2.hash), (None, 0, None), ("unreadable s", 9, SPEC_V2.hash)],
)
def test_rollout_is_that_of_the_challenger_before_revision_0016(
    tmp_path: Path, shadowed: str | None, changed_at_ms: int, challenger: str | None
) -> None:
    path = tmp_path / "profiles.db"
    command.upgrade(configuration(path), "0015")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(DECISION, ("d", "r", "ann"))
        if shadowed is not None:
            connection.execute("UPDATE tip_scores SET challenger_p = 0.5, spec_hash = ?", (shadowed,))
        connection.execute("UPDATE rollout SET stage = 'ramp', share = 0.5, changed_at_ms = ?", (changed_at_ms,))
        command.upgrade(configuration(path), "0016")
        assert connection.execute("SELECT stage, challenger FROM rollout").fetchall() == [("ramp", challenger)]


def test_request_ids_are_unique_per_user_after_revision_0008(before_outbox: Path) -> None:
    with closing(sqlite3.connect(before_outbox, isolation_level=None)) as connection:
        with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
            connection.execute(DECISION, ("d2", "r", "bob"))
        command.upgrade(configuration(before_outbox), "0008")
        connection.execute(DECISION, ("d2", "r", "bob"))
        with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
            connection.execute(DECISION, ("d3", "r", "ann"))
