"""Stores decisions, and reads the data about a user that a decision needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from functools import lru_cache
from typing import Any

from app.bandit.decisions import Decision, DecisionOutcome, Shadow, UserSnapshot
from app.bandit.model.pooled_prior import Prior
from app.bandit.model.specs import Spec
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.bandit.ports import ProposedDecision, RecordedDecision, UserQuery
from app.errors import SpecMismatch
from app.features.ids import user_hash
from app.stores.sql.database import Connection, Database
from app.stores.sql.decision_rows import decision_of, outcome_of, row_of
from app.stores.sql.sufficient_statistics import grow_statistics, newest_prior, read_statistics
from app.telemetry import logger

HOUR_MS = 3_600_000
LOGGED_USERS = 1_000  # unreadable statistics are logged once for each user, and for at most this many users
log = logger("stores.decisions")

SELECT_ERASURES = "SELECT erasures FROM bandit_ledger"
SELECT_SHARE = "SELECT share FROM rollout"
SELECT_BY_REQUEST = "SELECT * FROM tip_scores WHERE user_id = ? AND request_id = ?"
SELECT_BY_ID = "SELECT * FROM tip_scores WHERE decision_id = ?"
SELECT_EVENTS = """
SELECT outcome, COUNT(*) FROM decision_events WHERE user_id = :user_id AND number = :number GROUP BY outcome
"""
# One statement for many decisions. Between two statements the thread would wait for the GIL, up to 5 ms while the event
# loop is busy, and other writers would wait for this one.
_SHADOW = Shadow._fields[1:]
_UPDATE_SHADOWS = """
WITH shadows (decision_id, {columns}) AS (VALUES {rows})
UPDATE tip_scores SET {changes} FROM shadows WHERE tip_scores.decision_id = shadows.decision_id
"""
SELECT_OLDEST = "SELECT MIN(created_at_ms) FROM tip_scores"
SELECT_PRUNABLE = "SELECT number FROM tip_scores WHERE created_at_ms < ? ORDER BY created_at_ms LIMIT ?"
DELETE_DECISIONS = tuple(
    f"DELETE FROM {table} WHERE number IN (SELECT CAST(value AS BIGINT) FROM json_each(?))"
    for table in ("decision_events", "tip_scores")
)
# A process uses a prior for a moment after another process has replaced it. So the prior that was current an hour
# before the oldest decision is kept, and all later ones.
DELETE_PRIORS = """
DELETE FROM bandit_priors WHERE version < (
    SELECT MAX(version) FROM bandit_priors
    WHERE created_at_ms <= COALESCE((SELECT MIN(created_at_ms) FROM tip_scores), :before) - :hour
)
"""


@lru_cache(maxsize=64)
def update_shadows(count: int) -> str:
    """The statement that stores `count` shadows in the rows of their decisions."""
    row = f"({', '.join('?' * (1 + len(_SHADOW)))})"
    return _UPDATE_SHADOWS.format(
        columns=", ".join(_SHADOW),
        rows=", ".join([row] * count),
        changes=", ".join(f"{column} = shadows.{column}" for column in _SHADOW),
    )


class SqlDecisions:
    """The stored decisions. Implements `app.bandit.ports.DecisionRepository`."""

    def __init__(self, database: Database, spec: Spec) -> None:
        """`spec`: the longest list of model inputs. Its prior is read, and users' statistics are extended to it."""
        self._database = database
        self._spec = spec
        self._prior: Prior | None = None
        self._refused: set[int] = set()
        self._logged: set[str] = set()

    async def snapshots(self, questions: Sequence[UserQuery]) -> list[UserSnapshot]:
        # 1. `erasures` is read before the user's data; 2. the user is erased; 3. `record` compares and stores nothing.
        # If it were read last, the erasure would go unnoticed.
        def work(connection: Connection) -> list[UserSnapshot]:
            (erasures,) = connection.execute(SELECT_ERASURES).fetchone()
            (share,) = connection.execute(SELECT_SHARE).fetchone()
            # Cached: it is the same for every user until a newer one is stored.
            prior = self._prior = newest_prior(
                connection, self._spec, self._prior or Prior.none(self._spec), self._refused
            )
            return [
                UserSnapshot(
                    erasures,
                    prior,
                    share,
                    self._evidence_or_none(connection, question.user_id),
                    _by_request(connection, question.user_id, question.request_id),
                )
                for question in questions
            ]

        return await self._database.read(work)

    async def record(self, proposed: Sequence[ProposedDecision]) -> list[RecordedDecision]:
        """Store decisions in the given order. Pad their users' statistics with zeros, as the longest spec demands."""

        def work(connection: Connection) -> list[RecordedDecision]:
            (erasures,) = connection.execute(SELECT_ERASURES).fetchone()
            return [RecordedDecision(self._record(connection, item, erasures), erasures) for item in proposed]

        return await self._database.write(work, of={item.decision.user_id for item in proposed})

    async def add_shadows(self, shadows: Sequence[Shadow]) -> None:
        """Store each shadow in the row of its decision, without waiting for the disk. A crash of the machine may lose
        shadows; the evaluation of the challenger then leaves out their decisions."""
        values = [int(value) if isinstance(value, bool) else value for shadow in shadows for value in shadow]
        statement = update_shadows(len(shadows))
        await self._database.write(lambda connection: connection.execute(statement, values), durable=False, of=())

    async def find(self, decision_id: str) -> tuple[Decision, DecisionOutcome] | None:
        def work(connection: Connection) -> tuple[Decision, DecisionOutcome] | None:
            row = _named(connection, SELECT_BY_ID, decision_id)
            if row is None:
                return None
            return decision_of(row), outcome_of(row, dict(connection.execute(SELECT_EVENTS, row).fetchall()))

        return await self._database.read(work)

    async def oldest_ms(self) -> int | None:
        (oldest_ms,) = await self._database.row(SELECT_OLDEST)
        return None if oldest_ms is None else int(oldest_ms)

    async def prune(self, before_ms: int, limit: int) -> int:
        def work(connection: Connection) -> int:
            numbers = [number for (number,) in connection.execute(SELECT_PRUNABLE, (before_ms, limit))]
            for statement in DELETE_DECISIONS:
                connection.execute(statement, (json.dumps(numbers),))
            connection.execute(DELETE_PRIORS, {"before": before_ms, "hour": HOUR_MS})
            return len(numbers)

        return await self._database.write(work, of=())

    def _evidence_or_none(self, connection: Connection, user_id: str) -> SufficientStatistics | None:
        try:
            return read_statistics(connection, user_id)
        except SpecMismatch as error:
            if user_id not in self._logged and len(self._logged) < LOGGED_USERS:
                self._logged.add(user_id)
                log.warning("statistics_refused", user=user_hash(user_id), error=str(error))
            return None

    def _record(self, connection: Connection, proposed: ProposedDecision, erasures: int) -> Decision | None:
        decision = proposed.decision
        if proposed.erasures != erasures:
            return None
        # 1. Two requests with the same id find no decision; 2. both decide; 3. the second one finds the first's here.
        stored = _by_request(connection, decision.user_id, decision.request_id)
        if stored is not None:
            return stored
        row = row_of(decision)
        placeholders = ", ".join(f":{column}" for column in row)
        connection.execute(f"INSERT INTO tip_scores ({', '.join(row)}) VALUES ({placeholders})", row)
        grow_statistics(connection, decision.user_id, self._spec, decision.created_at_ms)
        return decision


def _by_request(connection: Connection, user_id: str, request_id: str | None) -> Decision | None:
    if request_id is None:
        return None
    row = _named(connection, SELECT_BY_REQUEST, user_id, request_id)
    return None if row is None else decision_of(row)


def _named(connection: Connection, statement: str, *values: str) -> dict[str, Any] | None:
    with closing(connection.execute(statement, values)) as cursor:
        row = cursor.fetchone()
        return None if row is None else dict(zip((column[0] for column in cursor.description), row, strict=True))
