"""Stores dead letters: events whose consumption failed repeatedly, and queued payloads that were rejected."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from app.events.erasure import names
from app.events.ports import DeadLetter
from app.stores.sql.database import Connection, SqlRepository, writes
from app.stores.sql.event_log import DELETE_CONSUMED, SELECT_LOGGED, logged_events

_COLUMNS = "id, source, payload, error, traceback, attempts, seq, created_at_ms, last_failed_at_ms"
INSERT_PAYLOAD = """
INSERT INTO dead_letters (source, payload, error, traceback, attempts, created_at_ms, last_failed_at_ms)
VALUES ('queue', ?, ?, '', 1, ?, ?) RETURNING id
"""
UPDATE_ATTEMPTS = "UPDATE outbox SET attempts = attempts + 1 WHERE seq = ? RETURNING attempts, user_id"
INSERT_EVENT = """
INSERT INTO dead_letters
    (source, payload, error, traceback, attempts, seq, user_id, created_at_ms, last_failed_at_ms)
VALUES ('consumption', ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (seq) DO UPDATE SET error = excluded.error, traceback = excluded.traceback,
    attempts = dead_letters.attempts + excluded.attempts, last_failed_at_ms = excluded.last_failed_at_ms
"""
INSERT_REVIVED = """
INSERT INTO outbox (seq, user_id, received_at_ms) SELECT seq, user_id, received_at_ms FROM event_log
WHERE user_id = ? AND seq = ? ON CONFLICT DO NOTHING
"""
SELECT_LETTERS = f"SELECT {_COLUMNS} FROM dead_letters WHERE id > ? ORDER BY id LIMIT ?"
UPDATE_REFUSED = """
UPDATE dead_letters SET error = ?, attempts = attempts + 1, last_failed_at_ms = ? WHERE id = ? AND seq IS NULL
"""
DELETE_LETTER = "DELETE FROM dead_letters WHERE id = ?"
SELECT_OWNER = "SELECT user_id FROM dead_letters WHERE id = ? AND seq IS NOT NULL"
# A letter without a `user_id` never became an event. Its payload may name the user.
SELECT_POSSIBLY_THEIRS = "SELECT id, payload, user_id FROM dead_letters WHERE user_id = ? OR user_id IS NULL"


def letters_of(connection: Connection, user_id: str) -> dict[int, tuple[str, str | None]]:
    """The dead letters that name a user, by id. Each value is a pair: the payload, and the payload without the user's
    events, which is None if no event is left."""
    found: dict[int, tuple[str, str | None]] = {}
    for letter_id, payload, owner in connection.execute(SELECT_POSSIBLY_THEIRS, (user_id,)):
        if owner is not None:
            found[letter_id] = payload, None
            continue
        try:
            value = msgspec.json.decode(payload)
        except (msgspec.DecodeError, RecursionError):
            value = payload
        if isinstance(value, list):
            raws = msgspec.json.decode(payload, type=list[msgspec.Raw])
            rest = [raw for raw, item in zip(raws, value, strict=True) if not names(item, user_id)]
            if len(rest) < len(value):
                text = "[" + ",".join(bytes(item).decode() for item in rest) + "]"
                found[letter_id] = payload, text if rest else None
        elif names(value, user_id):
            found[letter_id] = payload, None
    return found


def erase_letters(connection: Connection, user_id: str) -> int:
    """Remove a user from the dead letters. Return the number of letters that were deleted or changed. A letter with
    events of several users keeps those of the other users."""
    erased = set[int]()
    while found := letters_of(connection, user_id):
        erased |= found.keys()
        connection.executemany(DELETE_LETTER, [(letter_id,) for letter_id, (_, rest) in found.items() if rest is None])
        changed = [(rest, letter_id, payload) for letter_id, (payload, rest) in found.items() if rest is not None]
        # Changes nothing if another user has been removed from the payload since it was read.
        connection.executemany("UPDATE dead_letters SET payload = ? WHERE id = ? AND payload = ?", changed)
    return len(erased)


class SqlDeadLetters(SqlRepository):
    """Dead letters in the database. Implements `app.events.ports.DeadLetters`."""

    @writes(of=())
    def bury_payloads(self, connection: Connection, payloads: Sequence[tuple[str, str]], now_ms: int) -> Sequence[int]:
        rows = [(payload, error, now_ms, now_ms) for payload, error in payloads]
        return [int(connection.execute(INSERT_PAYLOAD, row).fetchone()[0]) for row in rows]

    @writes(of=())
    def failed(self, connection: Connection, seq: int, error: str, traceback: str, now_ms: int, limit: int) -> bool:
        row = connection.execute(UPDATE_ATTEMPTS, (seq,)).fetchone()
        if row is None or row[0] < limit:
            return False
        attempts, user_id = row
        (event,) = logged_events(connection, SELECT_LOGGED, (f"[{seq}]",)) or (None,)
        payload = msgspec.json.encode(event.event).decode() if event else "null"
        connection.execute(INSERT_EVENT, (payload, error, traceback, attempts, seq, user_id, now_ms, now_ms))
        connection.execute(DELETE_CONSUMED, (f"[{seq}]",))
        return True

    async def list(self, after: int, limit: int) -> list[DeadLetter]:
        return [DeadLetter(*row) for row in await self._database.rows(SELECT_LETTERS, (after, limit))]

    async def get(self, letter_id: int) -> DeadLetter | None:
        row = await self._database.row(f"SELECT {_COLUMNS} FROM dead_letters WHERE id = ?", (letter_id,))
        return DeadLetter(*row) if row else None

    async def discard(self, letter_id: int) -> bool:
        return bool(await self._database.execute(DELETE_LETTER, (letter_id,)))

    async def count(self) -> int:
        return int(await self._database.value("SELECT COUNT(*) FROM dead_letters"))

    async def refused(self, letter_id: int, reason: str, now_ms: int) -> None:
        await self._database.execute(UPDATE_REFUSED, (reason, now_ms, letter_id))

    async def revive(self, letter_id: int) -> bool:
        def work(connection: Connection) -> bool:
            event = connection.execute(f"{DELETE_LETTER} RETURNING user_id, seq", (letter_id,)).fetchone()
            if event is not None:
                connection.execute(INSERT_REVIVED, event)
            return event is not None

        owner = await self._database.row(SELECT_OWNER, (letter_id,))
        return owner is not None and await self._database.write(work, of=owner)
