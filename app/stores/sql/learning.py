"""Attributes events to decisions, and adds the rewards of decisions to the users' sufficient statistics.

Invariants: an event that has been applied to a decision is in `decision_events`, and is never applied again. The state
of a decision becomes `learned` in the transaction that adds the decision's input vector to the user's statistics, and
only from `open` or `served`. Before a user's statistics change, the missing shadows of the user's decisions are stored.
A decision is learned with all inputs of the statistics, even if it was logged with fewer. `settled_at_ms` shows the
order in which a user's decisions were learned, even if the clocks of workers differ: it is later than the last change
of the user's statistics, `bandit_states.updated_at_ms`. Decisions learned in one transaction have the same
`settled_at_ms`.

Statistics of a shorter spec are extended by a replay of the user's learned decisions, under the lock of the user. A
replay can be long, so it runs in a transaction per user, before the transaction that learns from many users.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec

from app.bandit.decisions import EventOutcome
from app.bandit.learning.attribution import GRACE_MS, NO_FEEDBACK, JudgedDecision, Judgement, Rules, judge, latest_made
from app.bandit.model.inputs import NUMBER_BYTES, SPECS, Array, Spec
from app.bandit.model.sufficient_statistics import SufficientStatistics, sound
from app.bandit.model.thompson_sampling import Policies
from app.errors import SpecMismatch
from app.features.events import KNOWN_SUBJECTS, LoggedEvent
from app.features.ids import user_hash
from app.stores.sql.database import Connection, Database, SqlRepository, named_rows, reads, writes
from app.stores.sql.decision_rows import array, decision_of
from app.stores.sql.logged_profiles import DAMAGE
from app.stores.sql.samples import ASIDE
from app.stores.sql.shadows import add_user_shadows
from app.stores.sql.sufficient_statistics import read_statistics, set_aside, write_statistics
from app.telemetry import logger

GROWN_AT_ONCE = 10
log = logger("stores.learning")

# Each of these three queries searches an index once. For many events this is faster than parsing a JSON array.
SELECT_IS_UNSETTLED = """
SELECT 1 FROM tip_scores WHERE user_id = ? AND chosen_id = ? AND state IN ('open', 'served') LIMIT 1
"""
SELECT_IS_DECISION = "SELECT 1 FROM tip_scores WHERE decision_id = ? AND user_id = ?"
SELECT_SENT_BY = "SELECT COALESCE(sent_by, 'an earlier release') FROM event_log WHERE user_id = ? AND seq = ?"
UPSERT_UNKNOWN = """
INSERT INTO unknown_decisions (sent_by, events, newest_ms) VALUES (?, ?, ?)
ON CONFLICT (sent_by) DO UPDATE SET newest_ms = excluded.newest_ms,
    events = excluded.events + CASE WHEN unknown_decisions.newest_ms < excluded.newest_ms - 86400000 THEN 0
        ELSE unknown_decisions.events END
"""
# The decision that an event is about, if the event has not been applied before.
_DECISION = """
SELECT *, EXISTS (
    SELECT 1 FROM decision_events WHERE user_id = :user AND number = tip_scores.number AND outcome = 'served'
) AS told_served
FROM tip_scores
"""
_NEW = "NOT EXISTS (SELECT 1 FROM decision_events WHERE user_id = :user AND seq = :seq)"
SELECT_NAMED = f"{_DECISION} WHERE decision_id = :decision AND user_id = :user AND {_NEW}"
SELECT_NEWEST = f"""{_DECISION}
WHERE user_id = :user AND chosen_id = :tip AND state IN ('open', 'served') AND created_at_ms <= :latest AND {_NEW}
ORDER BY number DESC LIMIT 1
"""
INSERT_COUNTED = "INSERT INTO decision_events (seq, user_id, number, outcome) VALUES (?, ?, ?, ?)"
UPDATE_SERVED = "UPDATE tip_scores SET state = 'served', served_at_ms = ? WHERE user_id = ? AND number = ?"
UPDATE_LEARNED = """
UPDATE tip_scores SET state = 'learned', served_at_ms = :served_at_ms, reward = :reward, reward_source = :source,
    action = :action, settled_at_ms = COALESCE(
        (SELECT updated_at_ms + 1 FROM bandit_states WHERE user_id = :user AND updated_at_ms >= :now), :now
    )
WHERE user_id = :user AND number = :number AND state IN ('open', 'served')
"""
# A waiting event may be the feedback. The outbox may have a million events and has no index by user, so the events of
# the user are searched, from the oldest waiting one on. A scalar subquery: PostgreSQL might turn NOT EXISTS into a join
# that reads the whole outbox.
_SUBJECTS = ", ".join(f"'{subject}'" for subject in sorted(KNOWN_SUBJECTS))
_NO_EVENT_WAITS = f"""(
    SELECT 1 FROM event_log JOIN outbox ON outbox.user_id = event_log.user_id AND outbox.seq = event_log.seq
    WHERE event_log.user_id = decision.user_id AND event_log.subject IN ({_SUBJECTS})
        AND event_log.seq >= (SELECT MIN(seq) FROM outbox) LIMIT 1
) IS NULL"""
_CLOSED = f"""state = 'served' AND served_at_ms < :closed
    AND spec_hash IN (SELECT value FROM json_each(:known))
    AND COALESCE((SELECT spec_hash FROM bandit_states WHERE user_id = decision.user_id), decision.spec_hash)
        IN (SELECT value FROM json_each(:known))
    AND {_NO_EVENT_WAITS}
ORDER BY served_at_ms"""
SELECT_CLOSED = f"SELECT user_id, number FROM tip_scores AS decision WHERE {_CLOSED} LIMIT :limit"
SELECT_UNSERVED = f"""
SELECT user_id, number FROM tip_scores AS decision
WHERE state = 'open' AND created_at_ms < :closed AND {_NO_EVENT_WAITS} ORDER BY created_at_ms LIMIT :limit
"""
_FOUND = "(user_id, number) IN (SELECT value ->> 0, CAST(value ->> 1 AS BIGINT) FROM json_each(:found))"
SELECT_STILL_CLOSED = f"SELECT * FROM tip_scores AS decision WHERE {_FOUND} AND {_CLOSED}"
UPDATE_EXPIRED = f"""
UPDATE tip_scores AS decision SET state = 'expired', settled_at_ms = :now
WHERE {_FOUND} AND state = 'open' AND {_NO_EVENT_WAITS}
"""
# The result matches the hash of no spec, so the decision is not selected again.
UPDATE_ASIDE = f"UPDATE tip_scores SET spec_hash = '{ASIDE}' || spec_hash WHERE user_id = ? AND number = ?"
SELECT_LEARNED = "SELECT * FROM tip_scores WHERE user_id = ? AND state = 'learned' ORDER BY settled_at_ms, number"
SELECT_TO_GROW = "SELECT user_id FROM bandit_states WHERE spec_hash IN (SELECT value FROM json_each(?)) LIMIT ?"
SELECT_NOT_GROWN = """
SELECT user_id FROM bandit_states
WHERE user_id IN (SELECT value FROM json_each(?)) AND spec_hash IN (SELECT value FROM json_each(?))
"""


class SqlLearning(SqlRepository):
    """Learns from events, in write transactions. Implements `app.bandit.ports.LearningRepository`."""

    def __init__(self, database: Database, policies: Policies, rules: Rules) -> None:
        super().__init__(database)
        self._policies = policies
        self._shorter = json.dumps([spec.hash for spec in policies.longest.shorter()])
        self._rules = rules

    @reads
    def concerned(self, connection: Connection, events: Sequence[LoggedEvent]) -> list[LoggedEvent]:
        queries = [_query(item) for item in events]
        found = {query for query in set(queries) if connection.execute(query[0], query[1:]).fetchone() is not None}
        return [item for item, query in zip(events, queries, strict=True) if query in found]

    @writes(of=())
    def note_unknown(self, connection: Connection, events: Sequence[LoggedEvent], now_ms: int) -> Mapping[str, int]:
        found = [connection.execute(SELECT_SENT_BY, (item.event.user_id, item.seq)).fetchone() for item in events]
        counts = Counter(str(row[0]) for row in found if row is not None)
        connection.executemany(UPSERT_UNKNOWN, [(sent_by, counts[sent_by], now_ms) for sent_by in sorted(counts)])
        return counts

    async def learn(self, events: Sequence[LoggedEvent], now_ms: int) -> Mapping[EventOutcome, int]:
        def work(connection: Connection) -> Mapping[EventOutcome, int]:
            transaction = _LearningTransaction(connection, self._policies, now_ms)
            outcomes = [transaction.take(event, self._rules) for event in events]
            write_statistics(connection, transaction.evidence, now_ms)
            return Counter(outcome for outcome in outcomes if outcome is not None)

        users = {item.event.user_id for item in events}
        await self._grow(users, now_ms)
        try:
            return await self._database.write(work, of=users)
        except SpecMismatch:
            # The transaction was rolled back, so another one sets the damaged statistics aside and logs it.
            await self._database.write(
                lambda connection: [set_aside(connection, user_id) for user_id in users], of=users
            )
            raise

    async def settle(self, now_ms: int, limit: int) -> Mapping[str, int]:
        """Settle decisions whose time for feedback has ended: for up to `limit` with a served tip, learn the default
        reward; mark up to `limit` others as expired. Return the number of decisions by result. A read finds the
        decisions first, so that the write lock is taken only if there are any."""
        closed = {"closed": now_ms - self._rules.window_ms - GRACE_MS, "known": json.dumps(list(SPECS))}

        def find(connection: Connection) -> tuple[list[Any], list[Any]]:
            served = connection.execute(SELECT_CLOSED, {**closed, "limit": limit}).fetchall()
            return served, connection.execute(SELECT_UNSERVED, {**closed, "limit": limit}).fetchall()

        served, unserved = await self._database.read(find)
        if not served and not unserved:
            return {"default": 0, "expired": 0, "set aside": 0}
        await self._grow({user_id for user_id, _ in served}, now_ms)

        def work(connection: Connection) -> Mapping[str, int]:
            transaction = _LearningTransaction(connection, self._policies, now_ms)
            reward = self._rules.rewards[NO_FEEDBACK]
            rows = named_rows(connection, SELECT_STILL_CLOSED, {**closed, "found": json.dumps(served)})
            learned = [transaction.learn_default(row, reward) for row in rows]
            write_statistics(connection, transaction.evidence, now_ms)
            expired = connection.execute(UPDATE_EXPIRED, {"now": now_ms, "found": json.dumps(unserved)}).rowcount
            return {"default": learned.count(True), "expired": expired, "set aside": learned.count(False)}

        return await self._database.write(work, of={user_id for user_id, _ in served + unserved})

    async def grow(self, now_ms: int) -> int:
        users = [user_id for (user_id,) in await self._database.rows(SELECT_TO_GROW, (self._shorter, GROWN_AT_ONCE))]
        await self._grow(users, now_ms)
        return len(users)

    async def _grow(self, users: Iterable[str], now_ms: int) -> None:
        """Extend these users' statistics to `Policies.longest`, the spec with the most inputs, if they belong to a
        shorter one. Set damaged statistics aside."""

        def work(connection: Connection, user_id: str) -> None:
            if set_aside(connection, user_id):
                return
            known = read_statistics(connection, user_id)
            if known is not None and known.spec.size < self._policies.longest.size:  # no other worker was faster
                add_user_shadows(connection, self._policies, user_id, known)
                grown = _grown(connection, self._policies, user_id, known)
                write_statistics(connection, {user_id: grown}, now_ms)

        for (user_id,) in await self._database.rows(SELECT_NOT_GROWN, (json.dumps(list(users)), self._shorter)):
            await self._database.write(partial(work, user_id=user_id), of=[user_id])


def _query(logged: LoggedEvent) -> tuple[str, ...]:
    """An SQL statement that selects a row if the event may concern a decision, followed by its parameters."""
    event = logged.event
    if event.decision_id is not None:
        return SELECT_IS_DECISION, event.decision_id, event.user_id
    return SELECT_IS_UNSETTLED, event.user_id, event.tip_id


def _vector(row: Mapping[str, Any], spec: Spec) -> Array:
    """The input vector of a decision. Inputs of `spec` that the decision was logged without are computed from the
    stored request. If the request is damaged, these inputs are missing from the vector."""
    phi = array(row["phi"])
    if len(phi) < spec.size:  # the decision was made before the statistics grew
        with suppress(*DAMAGE):
            return decision_of(row).vector(spec)
    return phi


def _grown(
    connection: Connection,
    policies: Policies,
    user_id: str,
    known: SufficientStatistics | None,
    phi_spec: Spec | None = None,
) -> SufficientStatistics:
    """A user's statistics, extended to the spec that `Policies.grown` chooses. The sums over the new inputs are
    computed from the learned decisions in the log. Raises the errors of `Policies.grown`."""
    padded = policies.grown(known, phi_spec)
    spec = padded.spec
    if known is None or known.spec == spec:
        return padded
    try:
        replayed = SufficientStatistics.none(spec)
        for row in named_rows(connection, SELECT_LEARNED, (user_id,)):
            replayed = replayed.learned(_vector(row, spec), row["reward"])
        grown = known.grown(spec, replayed)
        if not sound(spec, grown.pack(), grown.decisions):
            raise SpecMismatch("the logged decisions are not those that the statistics have learned")
        return grown
    except (SpecMismatch, ValueError) as error:  # the log is damaged, or the statistics come from a backup
        log.warning("log_not_replayed", user=user_hash(user_id), error=str(error))
        return padded


class _LearningTransaction(msgspec.Struct):
    """Learns within one transaction. `evidence`: the statistics of its users, read once, and written at the end."""

    connection: Connection
    policies: Policies
    now_ms: int
    evidence: dict[str, SufficientStatistics] = msgspec.field(default_factory=dict)

    def take(self, logged: LoggedEvent, rules: Rules) -> EventOutcome | None:
        """Apply an event to its decision. Return the outcome; None if it concerns no decision or was applied before."""
        event = logged.event
        known = {"user": event.user_id, "decision": event.decision_id, "tip": event.tip_id, "seq": logged.seq}
        statement = SELECT_NEWEST if event.decision_id is None else SELECT_NAMED
        for row in named_rows(self.connection, statement, {**known, "latest": latest_made(logged)}):  # at most one
            judgement = judge(JudgedDecision(**{name: row[name] for name in JudgedDecision._fields}), logged, rules)
            if judgement.outcome == "served" and judgement.state == "served":
                self.connection.execute(UPDATE_SERVED, (judgement.served_at_ms, row["user_id"], row["number"]))
            elif judgement.outcome == "learned":
                self._learn(row, judgement)
            self.connection.execute(INSERT_COUNTED, (logged.seq, row["user_id"], row["number"], judgement.outcome))
            return judgement.outcome
        return None

    def learn_default(self, row: Mapping[str, Any], reward: float) -> bool:
        """Learn `reward` for a decision without feedback. If the decision or the user's statistics are damaged, return
        False, and overwrite the spec hash of the damaged row, so that no process reads the row again."""
        try:
            self._learn(row, Judgement("late", "learned", row["served_at_ms"], reward))
        except SpecMismatch as error:
            if not set_aside(self.connection, row["user_id"]):  # the statistics are readable, so the decision is not
                self.connection.execute(UPDATE_ASIDE, (row["user_id"], row["number"]))
                log.warning("decision_set_aside", number=row["number"], error=str(error))
            return False
        return True

    def _learn(self, row: Mapping[str, Any], judgement: Judgement) -> None:
        """Learn from a row of `tip_scores`. Raises `SpecMismatch` if its vector or the statistics cannot be used."""
        user_id, spec = row["user_id"], SPECS.get(row["spec_hash"])
        if spec is None:
            raise SpecMismatch(f"the decision's vector is of spec {row['spec_hash'][:12]}, which this release lacks")
        if len(row["phi"]) != spec.size * NUMBER_BYTES:
            raise SpecMismatch(f"the decision's vector of {spec.id} {spec.version} has {len(row['phi'])} bytes")
        assert judgement.reward is not None
        known = self.evidence.get(user_id)
        if known is None:
            known = read_statistics(self.connection, user_id)
            add_user_shadows(self.connection, self.policies, user_id, known)
        evidence = _grown(self.connection, self.policies, user_id, known, spec)
        self.evidence[user_id] = evidence.learned(_vector(row, evidence.spec), judgement.reward)
        source = "feedback" if judgement.action is not None else "default"
        place = {"now": self.now_ms, "user": user_id, "number": row["number"]}
        self.connection.execute(UPDATE_LEARNED, {**judgement._asdict(), "source": source, **place})
