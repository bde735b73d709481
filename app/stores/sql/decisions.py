"""Stores decisions, and reads the data about a user that a decision needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from app.bandit.decisions import Decision, DecisionLine, DecisionOutcome, DecisionRecord, UserSnapshot
from app.bandit.model.inputs import NUMBER_BYTES
from app.bandit.model.sufficient_statistics import Prior, SufficientStatistics
from app.bandit.model.thompson_sampling import Policies
from app.bandit.ports import EARLIEST_MS, LATEST_MS, DecisionMoment, LoggedDecision, ProposedDecision, UserLog
from app.errors import SpecMismatch
from app.features.clock import rfc3339
from app.features.events import stored_action
from app.features.ids import user_hash
from app.stores.sql.database import Connection, Database, SqlRepository, insert_rows, named_rows, reads
from app.stores.sql.decision_rows import array, decision_of, outcome_of, row_of
from app.stores.sql.logged_profiles import readable
from app.stores.sql.shadows import missing_shadows, store_shadows
from app.stores.sql.sufficient_statistics import SELECT_NEWEST_VERSION, SELECT_STATE, prior_of, priors, statistics_of
from app.telemetry import logger

LOGGED_USERS = 1_000  # unreadable statistics are logged once for each user, and for at most this many users
log = logger("stores.decisions")

# What all decisions share. If the stored roll-out is that of another challenger, this one serves no user until the
# roll-out begins anew.
SELECT_COMMON = f"""
SELECT erasures, CASE WHEN challenger <> :spec THEN 0 ELSE share END, salt, ({SELECT_NEWEST_VERSION})
FROM bandit_ledger CROSS JOIN rollout
"""
# Not a join, for which PostgreSQL may read the states of all users.
SELECT_ERASURES_AND_VERSIONS = """
SELECT value, erasures, (SELECT spec_hash FROM bandit_states WHERE user_id = value),
    (SELECT decisions FROM bandit_states WHERE user_id = value) FROM json_each(?) CROSS JOIN bandit_ledger
"""
SELECT_BY_REQUEST = "SELECT * FROM tip_scores WHERE user_id = ? AND request_id = ?"
SELECT_EVENT = "SELECT 1 FROM event_log WHERE user_id = ? AND seq = ?"
# A damaged decision cannot answer its request again. It loses the request id to a new decision.
UPDATE_UNANSWERED = "UPDATE tip_scores SET request_id = NULL WHERE user_id = ? AND request_id = ?"
SELECT_BY_ID = "SELECT * FROM tip_scores WHERE decision_id = ?"
SELECT_PAGE = """
SELECT * FROM tip_scores WHERE (created_at_ms, decision_id) > (:at_ms, :decision_id) AND created_at_ms < :until
ORDER BY created_at_ms, decision_id LIMIT :limit
"""
SELECT_USER_AFTER = "SELECT user_id FROM tip_scores WHERE user_id > ? ORDER BY user_id LIMIT 1"
SELECT_OF_USER = "SELECT * FROM tip_scores WHERE user_id = ? ORDER BY number"
SELECT_EVENTS = """
SELECT outcome, COUNT(*) FROM decision_events WHERE user_id = :user_id AND number = :number GROUP BY outcome
"""
_LINES = """
SELECT number, decision_id, created_at_ms, user_id, chosen_id, role, served_by, state, reward, action,
    chosen, CASE role WHEN 'champion' THEN champion_pi ELSE challenger_pi END AS pi
FROM tip_scores"""
SELECT_LINE = f"{_LINES} WHERE decision_id = ?"
SELECT_NEWEST = f"""{_LINES} WHERE (created_at_ms, number) < (:at_ms, :number) AND created_at_ms >= :since
ORDER BY created_at_ms DESC, number DESC LIMIT :limit"""
# In the order of the numbers, for which an index of the user's decisions exists.
SELECT_NEWEST_OF_USER = f"""{_LINES} WHERE user_id = :user AND number < :number
    AND created_at_ms >= :since AND created_at_ms < :until
ORDER BY number DESC LIMIT :limit"""


class SqlDecisions(SqlRepository):
    """The stored decisions. Implements `app.bandit.ports.DecisionRepository`."""

    def __init__(self, database: Database, policies: Policies) -> None:
        super().__init__(database)
        self._policies = policies
        self._spec = policies.longest
        self._prior: Prior | None = None
        self._refused: int | None = None  # the version of the newest prior, if it is damaged
        self._logged: set[str] = set()

    async def snapshots(self, queries: Sequence[tuple[str, str | None]]) -> list[UserSnapshot]:
        # 1. `erasures` is read before the user's data; 2. the user is erased; 3. `record` compares and stores nothing.
        # If it were read last, the erasure would go unnoticed.
        def work(connection: Connection) -> list[UserSnapshot]:
            erasures, share, salt, newest = connection.execute(SELECT_COMMON, {"spec": self._spec.hash}).fetchone()
            prior = self._newest_prior(connection, newest if self._spec.pooled else 0)
            found = []
            for user_id, request_id in queries:
                stored = readable(_by_request(connection, user_id, request_id), decision_of)
                version, statistics = self._statistics(connection, user_id)
                earlier = stored[0] if stored else None
                found.append(UserSnapshot(erasures, prior, share, salt, version, statistics, earlier))
            return found

        return await self._database.look(work)

    async def record(self, proposed: Sequence[ProposedDecision]) -> list[Decision | None]:
        users = {item.decision.user_id for item in proposed}

        def work(connection: Connection) -> list[Decision | None]:
            # Few statements for all decisions together: each waits for the GIL, or for a round trip.
            found = connection.execute(SELECT_ERASURES_AND_VERSIONS, (json.dumps(list(users)),)).fetchall()
            known = {user_id: erasures_and_version for user_id, *erasures_and_version in found}
            new: dict[tuple[str, str], Decision] = {}
            results = [_accepted(connection, item, known, new) for item in proposed]
            if rows := [row_of(decision) for decision in new.values()]:
                insert_rows(connection, "tip_scores", ", ".join(rows[0]), [[row[k] for k in rows[0]] for row in rows])
            return results

        return await self._database.write(work, of=users)

    async def add_shadows(self, after: tuple[str, int], limit: int) -> tuple[str, int] | None:
        # Computed from one snapshot, without a lock.
        place, shadows = await self._database.read(
            lambda connection: missing_shadows(connection, self._policies, after, limit), snapshot=True
        )
        if shadows:
            await self._database.write(lambda connection: store_shadows(connection, shadows), of=())
        return place

    @reads
    def find(self, connection: Connection, decision_id: str) -> tuple[Decision, DecisionOutcome] | None:
        rows = named_rows(connection, SELECT_BY_ID, (decision_id,))
        events = dict(connection.execute(SELECT_EVENTS, rows[0]).fetchall()) if rows else {}
        found = readable(rows, lambda row: (decision_of(row), outcome_of(row, events)))
        return found[0] if found else None

    @reads
    def page(
        self, connection: Connection, after: DecisionMoment, until_ms: int, limit: int
    ) -> tuple[list[DecisionRecord], DecisionMoment | None]:
        rows = named_rows(connection, SELECT_PAGE, {**after._asdict(), "until": until_ms, "limit": limit + 1})
        records = readable(rows[:limit], lambda row: DecisionRecord.of(decision_of(row), outcome_of(row)))
        moments = [DecisionMoment(row["created_at_ms"], row["decision_id"]) for row in rows]
        return records, moments[limit - 1] if moments[limit:] else None

    @reads
    def line(self, connection: Connection, decision_id: str) -> DecisionLine | None:
        rows = named_rows(connection, SELECT_LINE, (decision_id,))
        return _line(rows[0]) if rows else None

    @reads
    def newest(
        self,
        connection: Connection,
        limit: int,
        *,
        user_id: str | None = None,
        since_ms: int = EARLIEST_MS,
        until_ms: int = LATEST_MS,
        before: tuple[int, int] = (LATEST_MS, LATEST_MS),
    ) -> tuple[list[DecisionLine], tuple[int, int] | None]:
        statement = SELECT_NEWEST if user_id is None else SELECT_NEWEST_OF_USER
        at_ms, number = before if user_id is not None else min(before, (until_ms, 0))
        values = {"user": user_id, "since": since_ms, "until": until_ms, "at_ms": at_ms, "number": number}
        rows = named_rows(connection, statement, {**values, "limit": limit + 1})
        places = [(row["created_at_ms"], row["number"]) for row in rows]
        return [_line(row) for row in rows[:limit]], places[limit - 1] if places[limit:] else None

    async def user_logs(self, after: str, decisions: int) -> list[UserLog]:
        def work(connection: Connection) -> list[UserLog]:
            found: list[UserLog] = []
            user, read = after, 0
            while read < decisions and (row := connection.execute(SELECT_USER_AFTER, (user,)).fetchone()) is not None:
                (user,) = row
                logged = readable(named_rows(connection, SELECT_OF_USER, (user,)), _logged)
                found.append(UserLog(user, self._statistics(connection, user)[1], logged))
                read += len(logged)
            return found

        return await self._database.read(work, snapshot=True)

    @reads
    def priors(self, connection: Connection) -> list[Prior]:
        return [item for item in priors(connection) if item is not None]

    def _newest_prior(self, connection: Connection, version: int) -> Prior:
        """The prior of the newest version. If it is damaged, the one that this process used before, or `Prior.none`."""
        prior = self._prior or Prior.none(self._spec)
        if version not in (prior.version, self._refused):
            try:
                prior = prior_of(connection, self._spec, version)
            except SpecMismatch as error:
                self._refused = version
                log.warning("prior_refused", version=version, error=str(error))
        self._prior = prior
        return prior

    def _statistics(
        self, connection: Connection, user_id: str
    ) -> tuple[tuple[str, int] | None, SufficientStatistics | None]:
        """The `version` and `statistics` of a `UserSnapshot`. Unusable statistics are logged, and returned as None."""
        row = connection.execute(SELECT_STATE, (user_id,)).fetchone()
        if row is None:
            return None, None
        version = row[0], row[2]
        try:
            return version, statistics_of(*row)
        except SpecMismatch as error:
            if user_id not in self._logged and len(self._logged) < LOGGED_USERS:
                self._logged.add(user_id)
                log.warning("statistics_refused", user=user_hash(user_id), error=str(error))
            return version, None


def _accepted(
    connection: Connection, proposed: ProposedDecision, known: Mapping[str, Any], new: dict[tuple[str, str], Decision]
) -> Decision | None:
    """Return the decision to answer with: the earlier one with the same request id, in the database or in `new`, or the
    proposed one, which is added to `new`. None if it must not be stored."""
    decision = proposed.decision
    erasures, *version = known[decision.user_id]
    if proposed.erasures != erasures and not _made_since_erasure(connection, decision):
        return None
    # 1. Two requests with the same id find no decision; 2. both decide; 3. the second one finds the first's here.
    key = decision.user_id, decision.request_id or decision.id
    if key in new:
        return new[key]
    rows = _by_request(connection, decision.user_id, decision.request_id)
    if stored := readable(rows, decision_of):
        return stored[0]
    if rows:
        connection.execute(UPDATE_UNANSWERED, (decision.user_id, decision.request_id))
    # 1. A request reads statistics; 2. a worker changes them; 3. the decision is refused here and made again. If it
    # were stored, the statistics that its shadow needs would be gone (`app.stores.sql.shadows`).
    if version != list(proposed.version or (None, None)):
        return None
    return new.setdefault(key, decision)


def _made_since_erasure(connection: Connection, decision: Decision) -> bool:
    """Whether the profile of the decision was computed after the user's last erasure; False if that is not known. An
    erasure also deletes the user's statistics; the caller checks that their version is still the same."""
    if (read := decision.profile_read) is not None:
        # An erasure deletes all events of the user. So if the oldest of these is still stored, none has come since.
        oldest = min((version for version in read.versions.values() if version > 0), default=0)
        if oldest:
            return connection.execute(SELECT_EVENT, (decision.user_id, oldest)).fetchone() is not None
    return decision.state_version == 0  # neither events nor statistics of the user were read


def _by_request(connection: Connection, user_id: str, request_id: str | None) -> list[dict[str, Any]]:
    return [] if request_id is None else named_rows(connection, SELECT_BY_REQUEST, (user_id, request_id))


def _line(row: Mapping[str, Any]) -> DecisionLine:
    stored = (row["pi"] or b"")[NUMBER_BYTES * row["chosen"] :][:NUMBER_BYTES]
    return DecisionLine(
        decision_id=row["decision_id"],
        decided_at=rfc3339(row["created_at_ms"]),
        user_id=row["user_id"],
        chosen_id=row["chosen_id"],
        probability=array(stored).item() if len(stored) == NUMBER_BYTES else None,
        role=row["role"],
        served_by=row["served_by"],
        state=row["state"],
        reward=row["reward"],
        action=None if row["action"] is None else stored_action(row["action"]),
    )


def _logged(row: Mapping[str, Any]) -> LoggedDecision:
    return LoggedDecision(row["number"], decision_of(row), outcome_of(row))
