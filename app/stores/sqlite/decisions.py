"""Decisions in SQLite, and what a decision must know of a user."""

from __future__ import annotations

import json
import sqlite3
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
from app.stores.sqlite.database import Database
from app.stores.sqlite.decision_rows import SETTLED, WRITTEN, decision_of, outcome_of, row_of
from app.stores.sqlite.priors import newest_prior
from app.stores.sqlite.states import grow_statistics, read_statistics
from app.telemetry import logger

HOUR_MS = 3_600_000
TOLD_OF = 1_000  # users whose evidence cannot be read are told of once each, and no more than so many
log = logger("stores.decisions")

SELECT_ERASURES = "SELECT erasures FROM bandit_ledger"
SELECT_SHARE = "SELECT share FROM rollout"
INSERT_DECISION = (
    f"INSERT INTO tip_scores ({', '.join(WRITTEN)}) VALUES ({', '.join('?' * len(WRITTEN))})"  # placeholders
)
_COLUMNS = ", ".join((*WRITTEN, *SETTLED))
SELECT_BY_REQUEST = f"SELECT {_COLUMNS} FROM tip_scores WHERE request_id = ?"
SELECT_BY_ID = f"SELECT {_COLUMNS}, number FROM tip_scores WHERE decision_id = ?"
SELECT_EVENTS = "SELECT outcome, COUNT(*) FROM decision_events WHERE number = ? GROUP BY outcome"
# Of many decisions in one statement, so in one step: between two, the thread would wait for Python's lock, which the
# event loop gives away every 5 ms at most while it is busy, and other writers wait for this one.
_SHADOW = Shadow._fields[1:]
_UPDATE_SHADOWS = """
WITH shadows (decision_id, {columns}) AS (VALUES {rows})
UPDATE tip_scores SET {changes} FROM shadows WHERE tip_scores.decision_id = shadows.decision_id
"""
SELECT_OLDEST = "SELECT MIN(created_at_ms) FROM tip_scores"
SELECT_PRUNABLE = "SELECT number FROM tip_scores WHERE created_at_ms < ? ORDER BY created_at_ms LIMIT ?"
DELETE_DECISIONS = tuple(
    f"DELETE FROM {table} WHERE number IN (SELECT value FROM json_each(?))"
    for table in ("decision_events", "tip_scores")
)
# A process goes on for a moment with a prior that another has replaced; so what was in force an hour before the oldest
# decision stays, and all that came after.
DELETE_PRIORS = """
DELETE FROM bandit_priors WHERE version < (
    SELECT MAX(version) FROM bandit_priors
    WHERE created_at_ms <= COALESCE((SELECT MIN(created_at_ms) FROM tip_scores), :before) - :hour
)
"""


@lru_cache(maxsize=64)
def update_shadows(count: int) -> str:
    """The statement that adds so many shadows."""
    row = f"({', '.join('?' * (1 + len(_SHADOW)))})"
    return _UPDATE_SHADOWS.format(
        columns=", ".join(_SHADOW),
        rows=", ".join([row] * count),
        changes=", ".join(f"{column} = shadows.{column}" for column in _SHADOW),
    )


class SqliteDecisions:
    """Implements `app.bandit.ports.DecisionRepository`."""

    def __init__(self, database: Database, spec: Spec) -> None:
        """`spec`: the one that priors are pooled under."""
        self._database = database
        self._spec = spec
        self._prior = Prior.none(spec)
        self._refused: set[int] = set()
        self._told: set[str] = set()

    async def snapshots(self, questions: Sequence[UserQuery]) -> list[UserSnapshot]:
        """One hop. The erasures are read first: what is read after them is no older."""

        def work(connection: sqlite3.Connection) -> list[UserSnapshot]:
            (erasures,) = connection.execute(SELECT_ERASURES).fetchone()
            (share,) = connection.execute(SELECT_SHARE).fetchone()
            # Cached: it is the same for every user until there is a newer one.
            prior = self._prior = newest_prior(connection, self._spec, self._prior, self._refused)
            return [
                UserSnapshot(
                    erasures,
                    prior,
                    share,
                    self._evidence_or_none(connection, question.user_id),
                    _by_request(connection, question.request_id),
                )
                for question in questions
            ]

        return await self._database.read(work)

    async def record(self, proposed: Sequence[ProposedDecision]) -> list[RecordedDecision]:
        """In the order proposed; the evidence that was read grows along."""

        def work(connection: sqlite3.Connection) -> list[RecordedDecision]:
            (erasures,) = connection.execute(SELECT_ERASURES).fetchone()
            return [RecordedDecision(self._record(connection, item, erasures), erasures) for item in proposed]

        return await self._database.write(work)

    async def add_shadows(self, shadows: Sequence[Shadow]) -> None:
        """A decision that is gone, erased or pruned, stays gone. One whose shadow is lost is not evaluated: no more."""
        values = [value for shadow in shadows for value in shadow]
        statement = update_shadows(len(shadows))
        await self._database.write(lambda connection: connection.execute(statement, values), durable=False)

    async def find(self, decision_id: str) -> tuple[Decision, DecisionOutcome] | None:
        """One hop."""

        def work(connection: sqlite3.Connection) -> tuple[Decision, DecisionOutcome] | None:
            row = _named(connection, SELECT_BY_ID, decision_id)
            if row is None:
                return None
            return decision_of(row), outcome_of(row, dict(connection.execute(SELECT_EVENTS, (row["number"],))))

        return await self._database.read(work)

    async def oldest_ms(self) -> int | None:
        """By the time at which it was made."""
        (found,) = await self._database.read(lambda connection: connection.execute(SELECT_OLDEST).fetchone())
        return found if found is None else int(found)

    async def prune(self, before_ms: int, limit: int) -> int:
        """One small transaction."""

        def work(connection: sqlite3.Connection) -> int:
            numbers = [number for (number,) in connection.execute(SELECT_PRUNABLE, (before_ms, limit))]
            for statement in DELETE_DECISIONS:
                connection.execute(statement, (json.dumps(numbers),))
            connection.execute(DELETE_PRIORS, {"before": before_ms, "hour": HOUR_MS})
            return len(numbers)

        return await self._database.write(work)

    def _evidence_or_none(self, connection: sqlite3.Connection, user_id: str) -> SufficientStatistics | None:
        try:
            return read_statistics(connection, user_id)
        except SpecMismatch as error:
            if user_id not in self._told and len(self._told) < TOLD_OF:
                self._told.add(user_id)
                log.warning("statistics_refused", user=user_hash(user_id), error=str(error))
            return None

    def _record(self, connection: sqlite3.Connection, proposed: ProposedDecision, erasures: int) -> Decision | None:
        decision = proposed.decision
        if proposed.erasures != erasures:
            return None
        # 1. Two requests with one id look, and find nothing; 2. both decide; 3. the later one finds the other's here.
        stored = _by_request(connection, decision.request_id)
        if stored is not None:
            return stored
        connection.execute(INSERT_DECISION, row_of(decision))
        # What was grown to decide stays grown.
        grow_statistics(connection, decision.user_id, self._spec, decision.created_at_ms)
        return decision


def _by_request(connection: sqlite3.Connection, request_id: str | None) -> Decision | None:
    if request_id is None:
        return None
    row = _named(connection, SELECT_BY_REQUEST, request_id)
    return None if row is None else decision_of(row)


def _named(connection: sqlite3.Connection, statement: str, value: str) -> dict[str, Any] | None:
    with closing(connection.execute(statement, (value,))) as cursor:
        row = cursor.fetchone()
        return None if row is None else dict(zip((column[0] for column in cursor.description), row, strict=True))
