"""Queries the event log (users and their events), and erases users."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from app.events.ports import ActivityCount, Holdings, TracedEvent
from app.features.clock import DAY_MS
from app.features.events import KNOWN_SUBJECTS
from app.profiles.ports import COUNTED, END_OF_TIME_MS, RecentEvent
from app.stores.sql.cache_state import ADVANCE_LOCAL_CACHE_EPOCH, insert_owed
from app.stores.sql.database import Connection, SqlRepository, reads
from app.stores.sql.dead_letters import erase_letters, letters_of
from app.stores.sql.event_log import EVENT_COLUMNS, EVENT_JOINS, SELECT_OLDEST, logged_event
from app.stores.sql.profile_statement import LOCAL_HOUR

SELECT_NEWEST = """
SELECT asked.value, kind.value,
       (SELECT MAX(seq) FROM event_log WHERE user_id = asked.value AND subject = kind.value)
FROM json_each(?) AS asked, json_each(?) AS kind
"""
SELECT_NEWEST_USERS = """
SELECT DISTINCT user_id FROM (SELECT user_id FROM event_log ORDER BY seq DESC LIMIT 20000) AS newest LIMIT ?
"""
# A skip scan: each step seeks the next user in the index, and the event time of one of the user's rows, however many
# events the user has. Both engines make a row of `found` only when it is asked for, so the LIMIT ends the scan.
SELECT_ELIGIBLE = """
WITH RECURSIVE found (user_id) AS (
    SELECT MIN(user_id) FROM event_log WHERE user_id > :after
    UNION ALL
    SELECT (SELECT MIN(user_id) FROM event_log WHERE user_id > found.user_id) FROM found WHERE user_id IS NOT NULL
)
SELECT user_id FROM found
WHERE EXISTS (
    SELECT 1 FROM tip_views WHERE user_id = found.user_id AND occurred_at_ms BETWEEN :since AND :until
) OR EXISTS (
    SELECT 1 FROM tip_feedback WHERE user_id = found.user_id AND occurred_at_ms BETWEEN :since AND :until
)
LIMIT :limit
"""
_NAMED_IN_LIST = "EXISTS (SELECT 1 FROM json_each(rebuilds.user_ids) WHERE value = :user)"
SELECT_HOLDINGS = f"""
SELECT (SELECT COUNT(*) FROM tip_views WHERE user_id = :user),
       (SELECT COUNT(*) FROM tip_feedback WHERE user_id = :user),
       (SELECT COUNT(*) FROM rebuilds WHERE {_NAMED_IN_LIST}),
       (SELECT COUNT(*) FROM tip_scores WHERE user_id = :user),
       COALESCE((SELECT decisions FROM bandit_states WHERE user_id = :user), 0)
"""
# A skip scan: each step seeks the next user in the index, however many events a user has. In the order of UTF-8 bytes,
# ids with a common prefix are adjacent, so the first id without the prefix ends the search.
SELECT_BY_PREFIX = """
WITH RECURSIVE found (user_id, number) AS (
    SELECT MIN(user_id), 1 FROM event_log WHERE user_id >= :prefix
    UNION ALL
    SELECT (SELECT MIN(user_id) FROM event_log WHERE user_id > found.user_id), number + 1 FROM found
    WHERE number < :limit AND substr(found.user_id, 1, length(:prefix)) = :prefix
)
SELECT user_id FROM found WHERE substr(user_id, 1, length(:prefix)) = :prefix ORDER BY number
"""
# Each subject comes sorted from its index and stops at the LIMIT, however many events the user has.
_NEWEST_SEQS = "\n    UNION ALL\n".join(
    f"""    SELECT seq FROM (
        SELECT seq FROM event_log WHERE user_id = :user AND subject = '{subject}' ORDER BY seq DESC LIMIT :limit
    ) AS newest"""
    for subject in sorted(KNOWN_SUBJECTS)
)
SELECT_NEWEST_TRACED = f"""
SELECT {EVENT_COLUMNS}, COALESCE(letter.attempts, outbox.attempts, 0),
    log.occurred_at_ms, log.claimed_at_ms, outbox.seq IS NULL, letter.id
FROM (
{_NEWEST_SEQS}
    ORDER BY seq DESC LIMIT :limit
) AS newest
JOIN event_log AS log ON log.user_id = :user AND log.seq = newest.seq
{EVENT_JOINS}
LEFT JOIN outbox ON outbox.user_id = log.user_id AND outbox.seq = log.seq
LEFT JOIN dead_letters AS letter ON letter.seq = log.seq
ORDER BY log.seq DESC
"""
_WITHIN = f"user_id = :user AND occurred_at_ms > :until - :days * {DAY_MS} AND occurred_at_ms <= :until"
_PLACE = f"(:until - occurred_at_ms) / {DAY_MS} AS days_ago, {LOCAL_HOUR}"
SELECT_ACTIVITY = f"""
SELECT {_PLACE}, 'served' AS kind, COUNT(*) FROM tip_views WHERE {_WITHIN} GROUP BY days_ago, local_hour
UNION ALL
SELECT {_PLACE}, action AS kind, COUNT(*) FROM tip_feedback WHERE {_WITHIN} GROUP BY days_ago, local_hour, kind
"""
SELECT_RECENT = "SELECT seq, user_id, received_at_ms FROM event_log WHERE seq > ? ORDER BY seq DESC LIMIT ?"
SELECT_ANY_UNCONSUMED = "SELECT EXISTS (SELECT 1 FROM outbox WHERE user_id = ? AND seq > ?)"
DELETE_EVENTS = (
    "DELETE FROM tip_views WHERE user_id = :user",
    "DELETE FROM tip_feedback WHERE user_id = :user",
    "DELETE FROM outbox WHERE user_id = :user AND seq IN (SELECT seq FROM event_log WHERE user_id = :user)",
    "DELETE FROM event_log WHERE user_id = :user",
)
SELECT_RUNS_NAMING = f"SELECT id, user_ids FROM rebuilds WHERE {_NAMED_IN_LIST}"
# Changes nothing if another user has been removed from the list since it was read.
UPDATE_RUN = "UPDATE rebuilds SET user_ids = ? WHERE id = ? AND user_ids = ?"
SELECT_LEARNED = "SELECT COALESCE(SUM(decisions), 0) FROM bandit_states WHERE user_id = ?"
_OF_DECISIONS = "number IN (SELECT number FROM tip_scores WHERE user_id = :user)"
DELETE_DECISIONS = (
    f"DELETE FROM decision_events WHERE user_id = :user AND {_OF_DECISIONS}",
    "DELETE FROM bandit_states WHERE user_id = :user",
    f"DELETE FROM pool_shadows WHERE {_OF_DECISIONS}",
    "DELETE FROM tip_scores WHERE user_id = :user",
)
DELETE_ERASED_FIRST = "DELETE FROM pooled_ranges WHERE spec_hash = :spec AND first_user = :user RETURNING revision"
UPDATE_ERASED_SUM = """
UPDATE pooled_ranges SET users = NULL, decisions = NULL, evidence = NULL, claimed_at_ms = 0, revision = revision + :lost
WHERE spec_hash = :spec AND first_user = (
    SELECT MAX(first_user) FROM pooled_ranges WHERE spec_hash = :spec AND first_user <= :user
)
"""


class SqlUsers(SqlRepository):
    """Implements `app.profiles.ports.UserQueries` and `app.events.ports.UserRecords`."""

    async def newest(self, user_ids: Sequence[str]) -> Mapping[tuple[str, str], int]:
        rows = await self._database.rows(SELECT_NEWEST, (json.dumps(user_ids), json.dumps(sorted(KNOWN_SUBJECTS))))
        return {(user, subject): seq for user, subject, seq in rows if seq is not None}

    async def eligible(self, after: str, since_ms: int, limit: int, until_ms: int = END_OF_TIME_MS) -> list[str]:
        parameters = {"after": after, "since": since_ms, "until": until_ms, "limit": limit}
        return [user_id for (user_id,) in await self._database.rows(SELECT_ELIGIBLE, parameters)]

    async def newest_users(self, limit: int) -> list[str]:
        """Up to `limit` of the users of the newest 20,000 events, each once, in no particular order."""
        return [user_id for (user_id,) in await self._database.rows(SELECT_NEWEST_USERS, (limit,))]

    async def count_eligible(self, since_ms: int) -> int:
        parameters = {"after": "", "since": since_ms, "until": END_OF_TIME_MS, "limit": COUNTED}
        return int(await self._database.value(f"SELECT COUNT(*) FROM ({SELECT_ELIGIBLE}) AS eligible", parameters))

    async def oldest_event_ms(self) -> int | None:
        oldest_ms: int | None = await self._database.value(SELECT_OLDEST)
        return oldest_ms

    async def find(self, prefix: str, limit: int) -> list[str]:
        rows = await self._database.rows(SELECT_BY_PREFIX, {"prefix": prefix, "limit": limit})
        return [user_id for (user_id,) in rows]

    async def newest_events(self, user_id: str, limit: int) -> list[TracedEvent]:
        rows = await self._database.rows(SELECT_NEWEST_TRACED, {"user": user_id, "limit": limit})
        return [
            TracedEvent(logged_event(event), counted_at_ms, claimed_at_ms, bool(consumed), letter_id)
            for *event, counted_at_ms, claimed_at_ms, consumed, letter_id in rows
        ]

    async def activity(self, user_id: str, until_ms: int, days: int) -> list[ActivityCount]:
        rows = await self._database.rows(SELECT_ACTIVITY, {"user": user_id, "until": until_ms, "days": days})
        return [ActivityCount(*row) for row in rows]

    async def recent(self, after_seq: int, limit: int) -> list[RecentEvent]:
        return [RecentEvent(*row) for row in await self._database.rows(SELECT_RECENT, (after_seq, limit))]

    async def any_unconsumed(self, user_id: str, after_seq: int) -> bool:
        return bool(await self._database.value(SELECT_ANY_UNCONSUMED, (user_id, after_seq)))

    @reads
    def holdings(self, connection: Connection, user_id: str) -> Holdings:
        """Count the rows that `erase` would delete now, by kind."""
        views, feedback, *others = connection.execute(SELECT_HOLDINGS, {"user": user_id}).fetchone()
        return Holdings(views, feedback, len(letters_of(connection, user_id)), *others)

    async def erase(self, user_id: str, now_ms: int) -> Holdings:
        """Delete all data of a user. Return the number of deleted rows of each kind. Without events, nothing shows that
        cached values of the user are stale. So the transaction also records that the user's cache keys must be deleted,
        which the caller does next. It makes every process clear its local cache. And it advances the counter of
        erasures, so that no value computed later has the version of an earlier value."""

        def work(connection: Connection) -> Holdings:
            views, feedback, *_ = [
                connection.execute(statement, {"user": user_id}).rowcount for statement in DELETE_EVENTS
            ]
            runs = _erase_from_runs(connection, user_id)
            letters = erase_letters(connection, user_id)
            decisions, learned = self._erase_decisions(connection, user_id)
            insert_owed(connection, [user_id], now_ms)
            connection.execute(ADVANCE_LOCAL_CACHE_EPOCH)
            return Holdings(views, feedback, letters, runs, decisions, learned)

        return await self._database.write(work, of=[user_id])

    async def erase_decisions(self, user_id: str) -> None:
        """Delete the decisions that used cached values of an erased user. Call it after the keys were deleted. It
        deletes the decision of this interleaving: 1. `erase` commits; 2. a request reads the old profile from the
        cache; 3. the keys are deleted; 4. the request stores its decision. If step 4 comes after this call, the request
        stores nothing, because the counter of erasures has changed and the events of the old profile are gone."""
        await self._database.write(lambda connection: self._erase_decisions(connection, user_id), of=[user_id])

    def _erase_decisions(self, connection: Connection, user_id: str) -> tuple[int, int]:
        """Delete a user's decisions, sufficient statistics and lock row (see `Database.delete_lock`). Return the number
        of deleted decisions, and of the decisions that the statistics had learned from."""
        (learned,) = connection.execute(SELECT_LEARNED, (user_id,)).fetchone()
        deleted = [connection.execute(statement, {"user": user_id}).rowcount for statement in DELETE_DECISIONS]
        if deleted[1]:
            _erase_sums(connection, user_id)
        # An erasure advances the counter. A request that has read the user's data before then stores nothing.
        connection.execute("UPDATE bandit_ledger SET erasures = erasures + 1")
        for statement in self._database.delete_lock:
            connection.execute(statement, (user_id,))
        return deleted[-1], learned


def _erase_sums(connection: Connection, user_id: str) -> None:
    """Delete the sums over ranges of users that include this user's statistics. Workers sum the ranges again later."""
    # The sum is updated before the range is deleted. Otherwise: 1. a worker locks a sum, to cut its range at the user;
    # 2. the DELETE finds no range of the user yet; 3. the worker commits it, and it stays, with the user's id.
    for (spec_hash,) in connection.execute("SELECT DISTINCT spec_hash FROM pooled_ranges").fetchall():
        erased = {"spec": spec_hash, "user": user_id, "lost": 0}
        connection.execute(UPDATE_ERASED_SUM, erased)
        if (joined := connection.execute(DELETE_ERASED_FIRST, erased).fetchone()) is not None:
            connection.execute(UPDATE_ERASED_SUM, {**erased, "lost": joined[0]})


def _erase_from_runs(connection: Connection, user_id: str) -> int:
    """Replace a user by an empty id in the lists of rebuild runs, because an active run stores its progress as a
    position in its list. Return the number of lists that named the user."""
    named = set[str]()
    while rows := connection.execute(SELECT_RUNS_NAMING, {"user": user_id}).fetchall():
        for run_id, stored in rows:
            named.add(run_id)
            rest = ["" if item == user_id else item for item in json.loads(stored)]
            connection.execute(UPDATE_RUN, (json.dumps(rest), run_id, stored))
    return len(named)
