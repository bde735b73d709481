"""Stores the cutoffs, before which events and decisions must be deleted, and how far the deletion has come. Also
deletes old decisions."""

import json
from collections.abc import Mapping

from app.features.clock import HOUR_MS
from app.stores.sql.database import SERVICE, UPSERT_SERVICE, Connection, SqlRepository, writes

SELECT_CUTOFF = "SELECT value FROM service WHERE name = 'pruned ' || ?"
# Earlier releases stored only the cutoff.
SELECT_DELETED = """
SELECT COALESCE(
    (SELECT value FROM service WHERE name = 'deleted ' || :what),
    (SELECT value FROM service WHERE name = 'pruned ' || :what)
)
"""
SELECT_OLDEST = "SELECT MIN(created_at_ms) FROM tip_scores"
SELECT_PRUNABLE = "SELECT number FROM tip_scores WHERE created_at_ms < ? ORDER BY created_at_ms LIMIT ?"
DELETE_DECISIONS = tuple(
    f"DELETE FROM {table} WHERE number IN (SELECT CAST(value AS BIGINT) FROM json_each(?))"
    for table in ("decision_events", "tip_scores")
)
# What was stored about a decision while it was deleted, or is left by an earlier release.
DELETE_ORPHANS = tuple(
    f"DELETE FROM {table} WHERE number < COALESCE((SELECT MIN(number) FROM tip_scores), 9223372036854775807)"
    for table in ("decision_events", "pool_shadows")
)
# A process may use a replaced prior for a moment, so the one current an hour before the oldest decision is kept. Each
# spec is judged alone: during an upgrade, older processes decide with priors that are older than those of the new spec.
DELETE_PRIORS = """
DELETE FROM bandit_priors AS prior WHERE version < (
    SELECT MAX(version) FROM bandit_priors AS kept
    WHERE kept.spec_hash = prior.spec_hash
        AND kept.created_at_ms <= COALESCE((SELECT MIN(created_at_ms) FROM tip_scores), :before) - :hour
)
"""


class SqlCutoffs(SqlRepository):
    """Stores two times for `events` and for `decisions`: the cutoff, before which rows must be deleted, and the time
    before which they have been. Implements `app.events.retention.Cutoffs`. Every method raises `StoreUnavailable`."""

    async def cutoff(self, what: str) -> int | None:
        stored = await self._database.value(SELECT_CUTOFF, (what,))
        return None if stored is None else int(stored)

    async def deleted_before(self, what: str) -> int:
        """The latest time, in epoch ms, before which rows of the kind `what` have been deleted; 0 if none have been."""
        return int(await self._database.value(SELECT_DELETED, {"what": what}) or 0)

    @writes(of=SERVICE)
    def move(self, connection: Connection, cutoffs: Mapping[str, int], night: int | None) -> bool:
        if night is not None and not connection.execute(UPSERT_SERVICE, ("last pruning", str(night))).rowcount:
            return False
        for what, cutoff_ms in cutoffs.items():
            _upsert_deleted(connection, what, 0)  # an earlier release stored only the cutoff
            connection.execute(UPSERT_SERVICE, (f"pruned {what}", str(cutoff_ms)))
        return True

    @writes(of=SERVICE)
    def deleting(self, connection: Connection, what: str, before_ms: int) -> None:
        _upsert_deleted(connection, what, before_ms)


def _upsert_deleted(connection: Connection, what: str, before_ms: int) -> None:
    (deleted,) = connection.execute(SELECT_DELETED, {"what": what}).fetchone()
    connection.execute(UPSERT_SERVICE, (f"deleted {what}", str(max(int(deleted or 0), before_ms))))


class DecisionRetention(SqlRepository):
    """Deletes old decisions, and the priors that no decision names. When no old decision is left, it also deletes the
    lock rows of users without data. Implements `app.events.retention.Prunable`."""

    async def oldest_ms(self) -> int | None:
        oldest_ms: int | None = await self._database.value(SELECT_OLDEST)
        return oldest_ms

    @writes(of=())
    def prune(self, connection: Connection, before_ms: int, limit: int) -> int:
        numbers = [number for (number,) in connection.execute(SELECT_PRUNABLE, (before_ms, limit))]
        for statement in DELETE_DECISIONS:
            connection.execute(statement, (json.dumps(numbers),))
        locks = () if numbers else self._database.delete_unused_locks  # once, when no old decision is left
        for statement in (*DELETE_ORPHANS, *locks):
            connection.execute(statement)
        connection.execute(DELETE_PRIORS, {"before": before_ms, "hour": HOUR_MS})
        return len(numbers)
