"""What the log says of users: their newest events, who is eligible, and erasing one."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence

from app.events.ports import Holdings
from app.features.events import KNOWN_SUBJECTS
from app.profiles.ports import END_OF_TIME_MS
from app.stores.sqlite.database import Database
from app.stores.sqlite.dead_letters import erase_letters, letters_of
from app.stores.sqlite.local_cache_epoch import UPSERT_RECALLS
from app.stores.sqlite.owed_invalidations import INSERT_OWED

SELECT_NEWEST = """
SELECT user.value, subject.value,
       (SELECT MAX(seq) FROM event_log WHERE user_id = user.value AND subject = subject.value)
FROM json_each(?) AS user, json_each(?) AS subject
"""
SELECT_NEWEST_USERS = """
SELECT DISTINCT user_id FROM (SELECT user_id FROM event_log ORDER BY seq DESC LIMIT 20000) LIMIT ?
"""
# Each half comes sorted from its covering index and stops at the LIMIT. Without limits of their own SQLite would sort
# all the users that are left, for every page.
SELECT_ELIGIBLE = """
SELECT user_id FROM (
    SELECT DISTINCT user_id FROM tip_views
    WHERE user_id > :after AND occurred_at_ms BETWEEN :since AND :until ORDER BY user_id LIMIT :limit
)
UNION
SELECT user_id FROM (
    SELECT DISTINCT user_id FROM tip_feedback
    WHERE user_id > :after AND occurred_at_ms BETWEEN :since AND :until ORDER BY user_id LIMIT :limit
)
ORDER BY user_id LIMIT :limit
"""
# Both halves come sorted from their covering indexes, so they are merged without a table in between.
SELECT_COUNT_ELIGIBLE = """
SELECT COUNT(*) FROM (
    SELECT user_id FROM tip_views WHERE occurred_at_ms >= :since
    UNION SELECT user_id FROM tip_feedback WHERE occurred_at_ms >= :since
    ORDER BY user_id
)
"""
SELECT_OLDEST = "SELECT MIN(occurred_at_ms) FROM event_log"
_NAMED_IN_LIST = "EXISTS (SELECT 1 FROM json_each(rebuilds.user_ids) WHERE value = :user)"
SELECT_HOLDINGS = f"""
SELECT (SELECT COUNT(*) FROM tip_views WHERE user_id = :user),
       (SELECT COUNT(*) FROM tip_feedback WHERE user_id = :user),
       (SELECT COUNT(*) FROM rebuilds WHERE {_NAMED_IN_LIST}),
       (SELECT COUNT(*) FROM tip_scores WHERE user_id = :user),
       COALESCE((SELECT decisions FROM bandit_states WHERE user_id = :user), 0)
"""
# A skip scan: each step seeks the next user in the index, however many events the last one has. Ids with a common
# prefix stand together in the order of UTF-8 bytes, so the first one without it ends the search.
SELECT_BY_PREFIX = """
WITH RECURSIVE found (user_id, number) AS (
    SELECT MIN(user_id), 1 FROM event_log WHERE user_id >= :prefix
    UNION ALL
    SELECT (SELECT MIN(user_id) FROM event_log WHERE user_id > found.user_id), number + 1 FROM found
    WHERE number < :limit AND substr(found.user_id, 1, length(:prefix)) = :prefix
)
SELECT user_id FROM found WHERE substr(user_id, 1, length(:prefix)) = :prefix ORDER BY number
"""
DELETE_USER = (
    "DELETE FROM tip_views WHERE user_id = :user",
    "DELETE FROM tip_feedback WHERE user_id = :user",
    "DELETE FROM event_log WHERE user_id = :user",
    f"""
    UPDATE rebuilds SET user_ids = '[]' WHERE state NOT IN ('queued', 'running') AND {_NAMED_IN_LIST}
    """,
)
# An active run goes by the places of its list: an erased user leaves an empty one.
UPDATE_ACTIVE_RUNS = f"""
UPDATE rebuilds SET user_ids = (
    SELECT json_group_array(CASE WHEN item.value = :user THEN '' ELSE item.value END)
    FROM json_each(rebuilds.user_ids) AS item
)
WHERE state IN ('queued', 'running') AND {_NAMED_IN_LIST}
"""
SELECT_LEARNED = "SELECT COALESCE(SUM(decisions), 0) FROM bandit_states WHERE user_id = ?"
DELETE_DECISIONS = (
    "DELETE FROM decision_events WHERE number IN (SELECT number FROM tip_scores WHERE user_id = :user)",
    "DELETE FROM bandit_states WHERE user_id = :user",
    "DELETE FROM tip_scores WHERE user_id = :user",
)
# A request that has read data of the user stores nothing derived from it, and the prior is pooled anew.
UPDATE_LEDGER = "UPDATE bandit_ledger SET changes = changes + 1, erasures = erasures + 1"
UPDATE_SEQ = "UPDATE sqlite_sequence SET seq = seq + 1 WHERE name = 'event_log'"


class SqliteUsers:
    """Implements `app.profiles.ports.NewestEvents`, and what admins do with a user."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def newest(self, user_ids: Sequence[str]) -> Mapping[tuple[str, str], int]:
        """(user, subject) to sequence number; absent where the user has no such event."""
        parameters = (json.dumps(user_ids), json.dumps(sorted(KNOWN_SUBJECTS)))
        rows = await self._database.read(lambda connection: connection.execute(SELECT_NEWEST, parameters).fetchall())
        return {(user, subject): seq for user, subject, seq in rows if seq is not None}

    async def eligible(self, after: str, since_ms: int, limit: int, until_ms: int = END_OF_TIME_MS) -> list[str]:
        """A page of users with any event within these times, by id."""
        parameters = {"after": after, "since": since_ms, "until": until_ms, "limit": limit}
        rows = await self._database.read(lambda connection: connection.execute(SELECT_ELIGIBLE, parameters).fetchall())
        return [user_id for (user_id,) in rows]

    async def newest_users(self, limit: int) -> list[str]:
        """Users of the newest events, each once."""
        rows = await self._database.read(lambda found: found.execute(SELECT_NEWEST_USERS, (limit,)).fetchall())
        return [user_id for (user_id,) in rows]

    async def count_eligible(self, since_ms: int) -> int:
        """How many in all."""

        def work(connection: sqlite3.Connection) -> int:
            (count,) = connection.execute(SELECT_COUNT_ELIGIBLE, {"since": since_ms}).fetchone()
            return int(count)

        return await self._database.read(work)

    async def oldest_event_ms(self) -> int | None:
        """Event time of the oldest event; None if there is none."""

        def work(connection: sqlite3.Connection) -> int | None:
            (oldest_ms,) = connection.execute(SELECT_OLDEST).fetchone()
            return int(oldest_ms) if oldest_ms is not None else None

        return await self._database.read(work)

    async def find(self, prefix: str, limit: int) -> list[str]:
        """Users with any event whose id begins so, in the order of UTF-8 bytes; an index is searched once for each."""
        parameters = {"prefix": prefix, "limit": limit}
        rows = await self._database.read(lambda connection: connection.execute(SELECT_BY_PREFIX, parameters).fetchall())
        return [user_id for (user_id,) in rows]

    async def holdings(self, user_id: str) -> Holdings:
        """What `erase` would delete now."""

        def work(connection: sqlite3.Connection) -> Holdings:
            views, feedback, *others = connection.execute(SELECT_HOLDINGS, {"user": user_id}).fetchone()
            return Holdings(views, feedback, len(letters_of(connection, user_id)), *others)

        return await self._database.read(work)

    async def erase(self, user_id: str, now_ms: int) -> Holdings:
        """Delete everything the database holds of a user; what that was.

        In the same transaction the invalidation of the user's keys is owed, and what processes keep near recalled:
        the events that could tell that a value is untrue are gone. The caller settles the debt. The sequence moves
        on, so that a value computed before cannot have the bytes of one computed after.
        """

        def work(connection: sqlite3.Connection) -> Holdings:
            counts = [connection.execute(statement, {"user": user_id}).rowcount for statement in DELETE_USER]
            active = connection.execute(UPDATE_ACTIVE_RUNS, {"user": user_id}).rowcount
            letters = erase_letters(connection, user_id)
            decisions, learned = _erase_decisions(connection, user_id)
            connection.execute(UPDATE_SEQ)
            connection.execute(INSERT_OWED, (now_ms, json.dumps([user_id])))
            connection.execute(UPSERT_RECALLS)
            views, feedback, _, ended = counts
            return Holdings(views, feedback, letters, ended + active, decisions, learned)

        return await self._database.write(work)

    async def erase_decisions(self, user_id: str) -> None:
        """Delete what was decided while the user's cached values were still there; to be called once they are gone.

        1. `erase` commits; 2. a decision begins, and is told the old profile by the cache; 3. the keys are deleted;
        4. the decision is stored. It goes here, or where it comes later, is refused.
        """
        await self._database.write(lambda connection: _erase_decisions(connection, user_id))


def _erase_decisions(connection: sqlite3.Connection, user_id: str) -> tuple[int, int]:
    """How many decisions, and how many of them the evidence was made of."""
    (learned,) = connection.execute(SELECT_LEARNED, (user_id,)).fetchone()
    deleted = [connection.execute(statement, {"user": user_id}).rowcount for statement in DELETE_DECISIONS]
    connection.execute(UPDATE_LEDGER)
    return deleted[-1], learned
