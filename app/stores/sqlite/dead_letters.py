"""Dead letters in SQLite."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping

import msgspec

from app.events.naming import names, not_naming
from app.events.ports import DeadLetter
from app.stores.sqlite.database import Database
from app.stores.sqlite.event_log import SELECT_LOGGED, logged_events

_COLUMNS = "id, source, payload, error, traceback, attempts, seq, created_at_ms, last_failed_at_ms"
INSERT_PAYLOAD = """
INSERT INTO dead_letters (source, payload, error, traceback, attempts, created_at_ms, last_failed_at_ms)
VALUES ('queue', ?, ?, ?, 1, ?, ?)
"""
UPDATE_ATTEMPTS = (
    "UPDATE event_log SET attempts = attempts + 1 WHERE seq = ? AND consumed_at_ms IS NULL RETURNING attempts, user_id"
)
INSERT_EVENT = """
INSERT INTO dead_letters
    (source, payload, error, traceback, attempts, seq, user_id, created_at_ms, last_failed_at_ms)
VALUES ('consumption', ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (seq) DO UPDATE SET error = excluded.error, traceback = excluded.traceback,
    attempts = dead_letters.attempts + excluded.attempts, last_failed_at_ms = excluded.last_failed_at_ms
"""
UPDATE_CONSUMED_ONE = "UPDATE event_log SET consumed_at_ms = ? WHERE seq = ?"
UPDATE_REVIVED = "UPDATE event_log SET consumed_at_ms = NULL, attempts = 0 WHERE seq = ?"
SELECT_LETTERS = f"SELECT {_COLUMNS} FROM dead_letters WHERE id > ? ORDER BY id LIMIT ?"
SELECT_LETTER = f"SELECT {_COLUMNS} FROM dead_letters WHERE id = ?"
SELECT_LETTER_SEQ = "SELECT seq FROM dead_letters WHERE id = ?"
SELECT_NEWEST_ID = "SELECT COALESCE(MAX(id), 0) FROM dead_letters"
SELECT_COUNT_LETTERS = "SELECT COUNT(*) FROM dead_letters"
UPDATE_REFUSED = """
UPDATE dead_letters SET error = ?, attempts = attempts + 1, last_failed_at_ms = ? WHERE id = ? AND seq IS NULL
"""
DELETE_LETTER = "DELETE FROM dead_letters WHERE id = ?"


# Without a `user_id` it never became an event; its payload may tell whose it was meant to be.
SELECT_POSSIBLY_THEIRS = "SELECT id, payload, user_id FROM dead_letters WHERE user_id = ? OR user_id IS NULL"
UPDATE_PAYLOAD = "UPDATE dead_letters SET payload = ? WHERE id = ?"


def letters_of(connection: sqlite3.Connection, user_id: str) -> dict[int, str | None]:
    """A user's letters. Of a job for several users, what is left of it without this one; else None."""
    found: dict[int, str | None] = {}
    for letter_id, payload, owner in connection.execute(SELECT_POSSIBLY_THEIRS, (user_id,)):
        if owner is not None:
            found[letter_id] = None
            continue
        try:
            value = msgspec.json.decode(payload)
        except (msgspec.DecodeError, RecursionError):
            value = payload
        if isinstance(value, list):
            rest = not_naming(msgspec.json.decode(payload, type=list[msgspec.Raw]), value, user_id)
            if len(rest) < len(value):
                found[letter_id] = "[" + ",".join(bytes(item).decode() for item in rest) + "]" if rest else None
        elif names(value, user_id):
            found[letter_id] = None
    return found


def erase_letters(connection: sqlite3.Connection, user_id: str) -> int:
    """Delete a user's letters; how many there were. Of a job for several users only this one's part goes."""
    found = letters_of(connection, user_id)
    for letter_id, rest in found.items():
        if rest is None:
            connection.execute(DELETE_LETTER, (letter_id,))
        else:
            connection.execute(UPDATE_PAYLOAD, (rest, letter_id))
    return len(found)


class SqliteDeadLetters:
    """Implements `app.events.ports.DeadLetters`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def bury_payload(self, payload: str, error: str, traceback: str, now_ms: int) -> int:
        """The new letter's id."""

        def work(connection: sqlite3.Connection) -> int:
            cursor = connection.execute(INSERT_PAYLOAD, (payload, error, traceback, now_ms, now_ms))
            return cursor.lastrowid or 0

        return await self._database.write(work)

    async def failed(self, seq: int, error: str, traceback: str, now_ms: int, limit: int) -> bool:
        """Count, and bury at the limit, in one transaction."""

        def work(connection: sqlite3.Connection) -> bool:
            row = connection.execute(UPDATE_ATTEMPTS, (seq,)).fetchone()
            if row is None or row[0] < limit:
                return False
            attempts, user_id = row
            (event,) = logged_events(connection, SELECT_LOGGED, (f"[{seq}]",)) or (None,)
            payload = msgspec.json.encode(event.event).decode() if event else "null"
            connection.execute(INSERT_EVENT, (payload, error, traceback, attempts, seq, user_id, now_ms, now_ms))
            connection.execute(UPDATE_CONSUMED_ONE, (now_ms, seq))
            return True

        return await self._database.write(work)

    async def list(self, after: int, limit: int) -> list[DeadLetter]:
        """By id."""
        return await self._database.read(
            lambda connection: [
                DeadLetter(*row) for row in connection.execute(SELECT_LETTERS, (after, limit)).fetchall()
            ]
        )

    async def get(self, letter_id: int) -> DeadLetter | None:
        """One, or None."""
        row = await self._database.read(lambda connection: connection.execute(SELECT_LETTER, (letter_id,)).fetchone())
        return DeadLetter(*row) if row else None

    async def discard(self, *letter_ids: int) -> int:
        """Forget them."""

        def work(connection: sqlite3.Connection) -> int:
            return sum(connection.execute(DELETE_LETTER, (letter_id,)).rowcount for letter_id in letter_ids)

        return await self._database.write(work)

    async def newest_id(self) -> int:
        """Of all."""
        return await self._number(SELECT_NEWEST_ID)

    async def count(self) -> int:
        """All of them."""
        return await self._number(SELECT_COUNT_LETTERS)

    async def refused(self, reasons: Mapping[int, str], now_ms: int) -> None:
        """The newest reason is the one to mend."""
        rows = [(reason, now_ms, letter_id) for letter_id, reason in reasons.items()]
        await self._database.write(lambda connection: connection.executemany(UPDATE_REFUSED, rows).rowcount)

    async def revive(self, *letter_ids: int) -> int:
        """The events come back to the unconsumed; once, however many ask for it at once."""

        def work(connection: sqlite3.Connection) -> int:
            count = 0
            for letter_id in letter_ids:
                row = connection.execute(SELECT_LETTER_SEQ, (letter_id,)).fetchone()
                if row is not None and row[0] is not None:
                    connection.execute(UPDATE_REVIVED, (row[0],))
                count += connection.execute(DELETE_LETTER, (letter_id,)).rowcount
            return count

        return await self._database.write(work)

    async def _number(self, statement: str) -> int:
        (number,) = await self._database.read(lambda connection: connection.execute(statement).fetchone())
        return int(number)
