"""The migrated schema and the code agree; whatever is no migrated database of this program is refused."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError

import app.stores.sqlite
from app.errors import SchemaMismatch, StoreUnavailable
from app.migrations import configuration
from app.stores.sqlite.database import SCHEMA_REVISION, Database
from app.stores.sqlite.migrate import current, migrate

STATEMENT = re.compile(r"\s*(SELECT|INSERT|UPDATE|DELETE)\b", re.IGNORECASE)


class AnyParameter(dict[str, None]):
    """Null for every named parameter."""

    def __missing__(self, name: str) -> None:
        return None


def statements() -> Iterator[tuple[str, str]]:
    """Every SQL constant of the store, by name."""
    for info in pkgutil.iter_modules(app.stores.sqlite.__path__):
        module = importlib.import_module(f"app.stores.sqlite.{info.name}")
        for name, value in vars(module).items():
            texts = value if isinstance(value, tuple) else (value,)
            for text in texts:
                if isinstance(text, str) and STATEMENT.match(text):
                    yield f"{info.name}.{name}", text


def schema(path: Path) -> list[tuple[str, str]]:
    """What the database consists of."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT name, sql FROM sqlite_schema ORDER BY name").fetchall()


def set_revision(path: Path, revision: str) -> None:
    """Pretend that another program migrated the database."""
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
        "import pathlib, sys; from app.stores.sqlite.migrate import migrate; "
        "print(*migrate(pathlib.Path(sys.argv[1])), 'alembic' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(database_path)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    assert shown.stdout.split() == [SCHEMA_REVISION, SCHEMA_REVISION, "False"]


def test_schema_is_the_same_when_it_was_taken_down_and_up_again(tmp_path: Path) -> None:
    path = tmp_path / "profiles.db"
    migrate(path)
    before = schema(path)
    command.downgrade(configuration(path), "base")
    assert {name for name, _ in schema(path) if not name.startswith("sqlite_")} == {"alembic_version"}
    assert migrate(path) == (None, SCHEMA_REVISION)
    assert schema(path) == before


def test_database_id_differs_when_two_databases_are_made(tmp_path: Path) -> None:
    ids = set()
    for name in ("one.db", "two.db"):
        migrate(tmp_path / name)
        with closing(sqlite3.connect(tmp_path / name)) as connection:
            ids.add(connection.execute("SELECT value FROM service WHERE name = 'database_id'").fetchone())
    assert len(ids) == 2


@pytest.mark.parametrize("sql", [pytest.param(sql, id=name) for name, sql in sorted(set(statements()))])
def test_statement_compiles_against_the_migrated_schema(migrated_template: Path, sql: str) -> None:
    with closing(sqlite3.connect(f"file:{migrated_template}?mode=ro", uri=True)) as connection:
        parameters: AnyParameter | tuple[None, ...] = AnyParameter() if "?" not in sql else (None,) * sql.count("?")
        connection.execute("EXPLAIN " + sql, parameters)


def test_statements_of_every_kind_are_found() -> None:
    names = {name for name, _ in statements()}
    assert {"event_log.INSERT_LOG", "event_log.DELETE_BY_SEQ", "dead_letters.UPDATE_ATTEMPTS"} < names
    assert {"users.SELECT_ELIGIBLE", "owed_invalidations.DELETE_OWED", "database.SELECT_REVISION"} < names


async def refused(path: Path, error: type[Exception]) -> str:
    """The message with which opening is refused."""
    with pytest.raises(error) as caught:
        await Database.open(path, readers=1)
    assert str(path) in str(caught.value)
    return str(caught.value)


async def test_database_is_refused_when_the_file_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "none.db"
    assert "profiles migrate" in await refused(path, StoreUnavailable)
    assert not path.exists()


@pytest.mark.parametrize("content", [b"", None], ids=["empty", "of something else"])
async def test_database_is_refused_when_it_is_not_migrated(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "other.db"
    if content is not None:
        path.write_bytes(content)
    else:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE notes (text)")
    assert "not migrated; run `profiles migrate`" in await refused(path, SchemaMismatch)


async def test_database_is_refused_when_it_was_taken_down(database_path: Path) -> None:
    command.downgrade(configuration(database_path), "base")
    assert "not migrated" in await refused(database_path, SchemaMismatch)


async def test_database_is_refused_when_it_is_newer(database_path: Path) -> None:
    set_revision(database_path, "9999")
    message = await refused(database_path, SchemaMismatch)
    assert "newer (9999)" in message
    assert "upgrade the program" in message
    with pytest.raises(SchemaMismatch, match="9999"):
        migrate(database_path)


async def test_database_is_refused_when_it_is_older(database_path: Path) -> None:
    set_revision(database_path, "0000")
    assert "run `profiles migrate`" in await refused(database_path, SchemaMismatch)


async def test_file_is_refused_when_it_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "profiles.db"
    path.write_bytes(b"no database, but long enough to look like one" * 100)
    assert "not a database" in await refused(path, StoreUnavailable)
    with pytest.raises(StoreUnavailable, match="not a database"):
        migrate(path)
    assert path.read_bytes().startswith(b"no database")


async def test_directory_is_refused_as_a_database(tmp_path: Path) -> None:
    assert "no database" in await refused(tmp_path, StoreUnavailable)
    with pytest.raises(StoreUnavailable, match="cannot migrate"):
        migrate(tmp_path)


def test_nothing_is_migrated_when_a_migration_fails_half_way(tmp_path: Path) -> None:
    path = tmp_path / "profiles.db"
    with closing(sqlite3.connect(path)) as connection:  # stands in the way of one of the last tables
        connection.execute("CREATE TABLE audit_trail (text)")
    before = schema(path)
    with pytest.raises(StoreUnavailable, match="audit_trail"):
        migrate(path)
    assert schema(path) == before
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("DROP TABLE audit_trail")
    assert migrate(path) == (None, SCHEMA_REVISION)


INSERT_FEEDBACK = """
INSERT INTO tip_feedback (user_id, tip_id, occurred_at_ms, utc_offset_min, received_at_ms, action, dwell_ms)
VALUES ('ann', 'tip', 1, 0, 1, ?, ?)
"""


@pytest.fixture
def before_actions(tmp_path: Path) -> Path:
    """A database of the release before 0004, with rows."""
    path = tmp_path / "profiles.db"
    command.upgrade(configuration(path), "0003")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.executemany(INSERT_FEEDBACK, [("completed", 5), ("dismissed", None), ("snoozed", 0)])
        with pytest.raises(sqlite3.IntegrityError, match="action IN"):
            connection.execute(INSERT_FEEDBACK, ("shared", 1))
    return path


def actions(connection: sqlite3.Connection) -> list[str]:
    """The actions of the stored feedback, in order."""
    return [row[0] for row in connection.execute("SELECT action FROM tip_feedback ORDER BY seq")]


def test_any_action_is_stored_when_the_constraint_is_gone(before_actions: Path) -> None:
    places = "SELECT name, rootpage FROM sqlite_schema ORDER BY name"
    with closing(sqlite3.connect(before_actions)) as connection:
        before = connection.execute(places).fetchall()
    assert migrate(before_actions) == ("0003", SCHEMA_REVISION)
    with closing(sqlite3.connect(before_actions, isolation_level=None)) as connection:
        after = [row for row in connection.execute(places).fetchall() if row[0] in dict(before)]
        assert after == before, "a table was written anew"
        connection.execute(INSERT_FEEDBACK, ("shared", 1))
        with pytest.raises(sqlite3.IntegrityError, match="dwell_ms BETWEEN"):
            connection.execute(INSERT_FEEDBACK, ("shared", -1))
        assert actions(connection) == ["completed", "dismissed", "snoozed", "shared"]
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert not [sql for name, sql in schema(before_actions) if sql and "'snoozed'" in sql]


def test_open_connections_go_on_when_the_constraint_goes(before_actions: Path) -> None:
    with (
        closing(sqlite3.connect(before_actions, isolation_level=None)) as reader,
        closing(sqlite3.connect(before_actions, isolation_level=None)) as writer,
    ):
        writer.execute(INSERT_FEEDBACK, ("completed", 1))  # prepared, and kept by the driver
        reader.execute("BEGIN")
        assert len(actions(reader)) == 4
        migrate(before_actions)
        writer.execute(INSERT_FEEDBACK, ("snoozed", 1))
        assert len(actions(reader)) == 4
        reader.execute("COMMIT")
        assert len(actions(reader)) == 5


def test_constraint_is_as_it_was_when_the_migration_is_undone(before_actions: Path) -> None:
    before = schema(before_actions)
    migrate(before_actions)
    with closing(sqlite3.connect(before_actions, isolation_level=None)) as connection:
        connection.execute(INSERT_FEEDBACK, ("shared", 1))
        with pytest.raises(CommandError, match="tip_feedback has rows with the action 'shared'"):
            command.downgrade(configuration(before_actions), "0003")
        assert current(before_actions) == SCHEMA_REVISION
        connection.execute("DELETE FROM tip_feedback WHERE action = 'shared'")
        command.downgrade(configuration(before_actions), "0003")
        with pytest.raises(sqlite3.IntegrityError, match="action IN"):
            connection.execute(INSERT_FEEDBACK, ("shared", 1))
    assert schema(before_actions) == before


def test_nothing_is_migrated_when_a_table_is_not_as_it_should_be(before_actions: Path) -> None:
    with closing(sqlite3.connect(before_actions, isolation_level=None)) as connection:
        connection.execute("ALTER TABLE tip_scores RENAME COLUMN action TO deed")
    before = schema(before_actions)
    with pytest.raises(SchemaMismatch, match="tip_scores is not as the earlier revisions made it"):
        migrate(before_actions)
    assert schema(before_actions) == before
