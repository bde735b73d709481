"""Damage is found by the quick check at start, or by the full check on demand."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from app.errors import StoreUnavailable
from app.stores.sqlite.connection import connect
from app.stores.sqlite.database import SqliteDatabase
from app.stores.sqlite.event_log import SqliteEventLog
from app.stores.sqlite.integrity_check import TAIL, findings
from tests.support.events import admitted, feedback, served

EVENTS = 2 * TAIL
NEWEST, OLD = EVENTS, 5


@pytest.fixture
async def filled(database_path: Path) -> Path:
    """A closed and checkpointed database with events."""
    database = await SqliteDatabase.open(database_path, readers=1)
    made = [admitted((served if number % 2 else feedback)(f"user-{number % 9}")) for number in range(EVENTS)]
    await SqliteEventLog(database).append([made])
    await database.close()
    execute(database_path, "PRAGMA wal_checkpoint(TRUNCATE)")
    return database_path


def cut(path: Path, pages: int) -> None:
    """Remove pages from the end of the file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - pages * 4096])


def overwrite_root(path: Path, table: str) -> None:
    """Overwrite the root page of a table."""
    with closing(sqlite3.connect(path)) as connection:
        (root,) = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,)).fetchone()
    content = bytearray(path.read_bytes())
    content[(root - 1) * 4096 : root * 4096] = b"\x17" * 4096
    path.write_bytes(content)


def execute(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement).fetchall()


def quick(path: Path) -> list[str]:
    with closing(connect(path, read_only=True)) as connection:
        return findings(connection, whole=False)


def full(path: Path) -> list[str]:
    with closing(connect(path, read_only=True)) as connection:
        return findings(connection, whole=True)


def lose_index_entry(path: Path, index: str) -> None:
    """Change the row of the newest event while the index is missing from the schema."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        row = connection.execute("SELECT * FROM sqlite_schema WHERE name = ?", (index,)).fetchone()
        connection.execute("DELETE FROM sqlite_schema WHERE name = ?", (index,))
        connection.execute("PRAGMA writable_schema = RESET")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE event_log SET user_id = 'other' WHERE seq = ?", (NEWEST,))
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("INSERT INTO sqlite_schema VALUES (?, ?, ?, ?, ?)", row)
        connection.execute("PRAGMA writable_schema = RESET")


async def test_no_damage_is_found_in_an_intact_database(filled: Path) -> None:
    assert quick(filled) == full(filled) == []
    await (await SqliteDatabase.open(filled, readers=1)).close()


Damage = Callable[[Path], None]
EVENT_DAMAGE: list[tuple[str, Damage, str]] = [
    ("no fact", lambda path: execute(path, f"DELETE FROM tip_views WHERE seq >= {NEWEST - 1}"), "has no fact"),
    ("no log row", lambda path: execute(path, f"DELETE FROM event_log WHERE seq = {NEWEST}"), "has no row in the log"),
    ("index", lambda path: lose_index_entry(path, "event_log_by_user"), "is missing from the index of users"),
]


@pytest.mark.parametrize(("damage", "finding"), [row[1:] for row in EVENT_DAMAGE], ids=[row[0] for row in EVENT_DAMAGE])
async def test_database_is_refused_when_the_newest_events_are_damaged(
    filled: Path, damage: Damage, finding: str
) -> None:
    damage(filled)
    assert finding in quick(filled)[0]
    with pytest.raises(StoreUnavailable, match=f"is damaged: event .* {finding}"):
        await SqliteDatabase.open(filled, readers=1)


@pytest.mark.parametrize(
    "damage", [lambda path: cut(path, 2), lambda path: overwrite_root(path, "event_log")], ids=["cut", "overwritten"]
)
async def test_database_is_refused_when_pages_are_damaged(filled: Path, damage: Damage) -> None:
    damage(filled)
    with pytest.raises(StoreUnavailable, match=r"damaged|malformed"):
        await SqliteDatabase.open(filled, readers=1)


def test_only_the_full_check_finds_damage_of_old_events(filled: Path) -> None:
    execute(filled, f"DELETE FROM tip_feedback WHERE seq = {OLD}")
    assert quick(filled) == []
    assert full(filled) == [f"event {OLD} has no fact"]
