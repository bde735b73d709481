"""Stores each user's sufficient statistics, sums over ranges of users, and the priors pooled from these sums.

Each row belongs to a spec, a list of model inputs, and holds the spec's hash. Invariants: rows of a spec that this
release does not know are never read, added to or overwritten. Damaged statistics and damaged priors are never used.

A row carries two checksums: of its header (spec and number of decisions) and of its numbers. If only one matches, the
row is damaged. If neither matches, a process of an earlier release wrote the row: with each write, that release changes
both the header and the numbers, and leaves the old checksums. Such a row is damaged if no decisions can have produced
it (`sound`). A process that finds a damaged row logs it and *sets it aside*: it overwrites the hash with a text that
matches no spec, so that the row is kept but not read again. No other user is affected.

A range of users begins with its `first_user` and ends before that of the next range. Several workers may sum ranges at
once. In each round, a worker claims a range, and sums it again if the numbers of its users and decisions differ from
those of the stored sum. No change is missed: learning raises the number of decisions. Extending statistics to the
longest spec raises the number of users, since only statistics of that spec are summed. If a worker dies, the ranges
that it had claimed are summed in the next round. A sum never includes an erased user: 1. a worker reads a user's
statistics; 2. the user is erased, which deletes the sum and the claim (`app.stores.sql.users`); 3. the worker finds its
claim gone, and stores nothing. A range that begins with an erased user is joined to the range before it, so that no
erased user's id is kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from operator import eq
from typing import Any
from zlib import crc32

from app.bandit.model.inputs import NUMBER_BYTES, SPECS, Spec, packed
from app.bandit.model.sufficient_statistics import Prior, SufficientStatistics, can_be_pooled, pooled_mean, sound
from app.bandit.ports import StateGrowth
from app.errors import SpecMismatch
from app.features.ids import AFTER_ALL_IDS, user_hash
from app.stores.sql.database import SERVICE, Connection, Database, SqlRepository, reads, writes
from app.stores.sql.decision_rows import array
from app.stores.sql.rollout import begin_evaluation
from app.stores.sql.samples import ASIDE, SELECT_ASIDE_COUNT
from app.telemetry import logger

PAGE = 256
RANGE_USERS = 2_048  # a range with more than twice as many is cut
AHEAD_MS = 60_000
log = logger("stores.states")

_STATE = "spec_hash, evidence, decisions, header_crc32, evidence_crc32"
SELECT_STATE = f"SELECT {_STATE} FROM bandit_states WHERE user_id = ?"
UPSERT_STATE = f"""
INSERT INTO bandit_states (user_id, {_STATE}, updated_at_ms) VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (user_id) DO UPDATE SET
    spec_hash = excluded.spec_hash, evidence = excluded.evidence, decisions = excluded.decisions,
    header_crc32 = excluded.header_crc32, evidence_crc32 = excluded.evidence_crc32,
    updated_at_ms = CASE
        WHEN bandit_states.updated_at_ms < excluded.updated_at_ms THEN excluded.updated_at_ms
        ELSE bandit_states.updated_at_ms + 1
    END
"""
SELECT_STATES = f"SELECT user_id, {_STATE} FROM bandit_states"
SELECT_STATES_AFTER = f"{SELECT_STATES} WHERE user_id > ? ORDER BY user_id LIMIT ?"
_IN_RANGE = "user_id >= :first AND user_id < :end"
SELECT_STATES_IN_RANGE = f"{SELECT_STATES} WHERE {_IN_RANGE} AND spec_hash = :spec ORDER BY user_id"
SELECT_NTH_USER = f"SELECT user_id FROM bandit_states WHERE {_IN_RANGE} ORDER BY user_id LIMIT 1 OFFSET :n"
SELECT_LEARNED = f"""
SELECT COUNT(*), CAST(COALESCE(SUM(decisions), 0) AS BIGINT) FROM bandit_states WHERE {_IN_RANGE} AND spec_hash = :spec
"""
# A claim from after `newest` was made by a clock that was ahead.
_DUE = "spec_hash = :spec AND claimed_at_ms NOT BETWEEN :round AND :newest"
# The range with the oldest claim comes first.
SELECT_DUE = f"SELECT first_user FROM pooled_ranges WHERE {_DUE} ORDER BY claimed_at_ms LIMIT 1"
UPDATE_CLAIM = f"""
UPDATE pooled_ranges SET claimed_at_ms = :now WHERE {_DUE} AND first_user = ({SELECT_DUE})
RETURNING first_user, users, decisions
"""
# The sum of the revisions that the newest prior has seen. No older prior has seen more.
_CHANGES_SEEN = "(SELECT changes FROM bandit_priors WHERE spec_hash = :spec ORDER BY version DESC LIMIT 1)"
# The range begins with the revisions that the newest prior has seen, so its first sum leads to a new prior.
INSERT_FIRST_RANGE = f"""
INSERT INTO pooled_ranges (spec_hash, first_user, claimed_at_ms, revision)
VALUES (:spec, '', 0, COALESCE({_CHANGES_SEEN}, 0)) ON CONFLICT DO NOTHING
"""
INSERT_RANGE = "INSERT INTO pooled_ranges (spec_hash, first_user, claimed_at_ms, revision) VALUES (:spec, :end, 0, 0)"
SELECT_END = "SELECT MIN(first_user) FROM pooled_ranges WHERE spec_hash = :spec AND first_user > :first"
UPDATE_SUM = """
UPDATE pooled_ranges SET users = :users, decisions = :decisions, evidence = :evidence, revision = revision + 1
WHERE spec_hash = :spec AND first_user = :first AND claimed_at_ms = :now
"""
UPDATE_NO_SUM = """
UPDATE pooled_ranges SET users = NULL, decisions = NULL, evidence = NULL WHERE spec_hash = :spec AND first_user = :first
"""
SELECT_SUMS = """
SELECT first_user, revision, users, decisions, evidence FROM pooled_ranges WHERE spec_hash = ? ORDER BY first_user
"""
_KNOWN = "spec_hash IN (SELECT value FROM json_each(?))"
UPDATE_ASIDE = f"UPDATE bandit_states SET spec_hash = '{ASIDE}' || spec_hash WHERE user_id = ? AND {_KNOWN}"
SELECT_COUNTS = f"SELECT spec_hash, COUNT(*) FROM bandit_states WHERE {_KNOWN} GROUP BY spec_hash"
SELECT_CHANGES_SEEN = f"SELECT {_CHANGES_SEEN}"
SELECT_NEWEST_VERSION = "SELECT COALESCE(MAX(version), 0) FROM bandit_priors WHERE spec_hash = :spec"
_PRIORS = "SELECT version, spec_hash, mu, users, decisions, created_at_ms FROM bandit_priors"
SELECT_PRIORS = f"{_PRIORS} ORDER BY version"
SELECT_PRIOR = f"{_PRIORS} WHERE spec_hash = ? AND version = ?"
INSERT_PRIOR = """
INSERT INTO bandit_priors (spec_hash, mu, users, decisions, changes, created_at_ms) VALUES (?, ?, ?, ?, ?, ?)
RETURNING version
"""


def read_statistics(connection: Connection, user_id: str) -> SufficientStatistics | None:
    """A user's statistics; None if there are none. Raises `SpecMismatch` if they are damaged, or if this release does
    not know their spec (list of model inputs)."""
    row = connection.execute(SELECT_STATE, (user_id,)).fetchone()
    return None if row is None else statistics_of(*row)


def write_statistics(connection: Connection, evidence: Mapping[str, SufficientStatistics], now_ms: int) -> None:
    """Replace the statistics of each user in `evidence`, a mapping by user id."""
    states = [(user_id, (item.spec.hash, item.pack(), item.decisions)) for user_id, item in evidence.items()]
    rows = [(user_id, *state, *_checksums(*state), now_ms) for user_id, state in states]
    connection.executemany(UPSERT_STATE, rows)


def set_aside(connection: Connection, user_id: str) -> bool:
    """If a user's statistics are damaged, log it and mark the row, so that no process reads it again. Return True if
    they cannot be used: they are damaged, were marked before, or belong to a spec that this release does not know."""
    try:
        read_statistics(connection, user_id)
    except SpecMismatch as error:
        if connection.execute(UPDATE_ASIDE, (user_id, json.dumps(list(SPECS)))).rowcount:
            log.warning("statistics_set_aside", user=user_hash(user_id), error=str(error))
        return True
    return False


def damaged(connection: Connection, *, whole: bool) -> int:
    """The number of users whose statistics were found damaged. `whole` also checks all statistics for new damage."""
    (count,) = connection.execute(SELECT_ASIDE_COUNT).fetchone()
    after = ""
    # Page by page: PostgreSQL sends all rows of a statement at once.
    while whole and (page := connection.execute(SELECT_STATES_AFTER, (after, PAGE)).fetchall()):
        after = page[-1][0]
        known = [row for row in page if row[1] in SPECS]
        count += sum(not (_intact(*row[1:]) and sound(SPECS[row[1]], *row[2:4])) for row in known)
    return int(count)


def prior_of(connection: Connection, spec: Spec, version: int) -> Prior:
    """The prior of a spec with this version; `Prior.none` for 0. Raises `SpecMismatch` if it is missing or damaged."""
    if version == 0:
        return Prior.none(spec)
    row = connection.execute(SELECT_PRIOR, (spec.hash, version)).fetchone()
    if row is None or (found := _prior(*row)) is None:
        raise SpecMismatch(f"there is no intact prior {version} of {spec.id} {spec.version}")
    return found


def priors(connection: Connection) -> Iterator[Prior | None]:
    """The priors of the specs that this release knows, oldest first; None for each damaged one."""
    return (_prior(*row) for row in connection.execute(SELECT_PRIORS) if row[1] in SPECS)


def _prior(version: int, spec_hash: str, mu: bytes, users: int, decisions: int, created_at_ms: int) -> Prior | None:
    spec = SPECS[spec_hash]
    if len(mu) != NUMBER_BYTES * spec.size or not can_be_pooled(array(mu), decisions):
        return None
    return Prior(version, spec, array(mu), users, decisions, created_at_ms)


class SqlStates(SqlRepository):
    """The statistics of all users, and the pooled priors. Implements `app.bandit.ports.StateRepository`."""

    def __init__(self, database: Database, spec: Spec) -> None:
        """`spec`: the list of model inputs to which users' statistics are extended (`Policies.longest`). A prior is
        estimated for this spec, from the statistics of users that have been extended to it."""
        super().__init__(database)
        self._spec = spec

    async def sum_range(self, round_ms: int, now_ms: int) -> bool:
        now_ms = max(now_ms, round_ms)  # the clock may have been set back since the round began
        due = {"spec": self._spec.hash, "round": round_ms, "newest": now_ms + AHEAD_MS, "now": now_ms}
        if await self._database.row(SELECT_DUE, due) is None:
            return await self._database.execute(INSERT_FIRST_RANGE, due) > 0
        if (claim := await self._claim(due)) is None:
            return True  # another worker was faster
        if (summed := await self._summed(claim)) is None:
            return True  # no user of the range has learned since the stored sum
        total, users, damaged = summed

        def work(connection: Connection) -> None:
            for user_id in damaged:
                set_aside(connection, user_id)
            found = {"users": users, "decisions": total.decisions, "evidence": total.pack()}
            connection.execute(UPDATE_SUM, {**claim, **found})

        await self._database.write(work, of=damaged)
        return True

    @writes(of=SERVICE)
    def pool(self, connection: Connection, now_ms: int) -> Prior | None:
        spec = self._spec
        (seen,) = connection.execute(SELECT_CHANGES_SEEN, {"spec": spec.hash}).fetchone()
        rows = connection.execute(SELECT_SUMS, (spec.hash,)).fetchall()
        revision = sum(row[1] for row in rows)
        if any(row[2] is None for row in rows) or revision <= (seen or 0):
            return None
        if damaged := [{"spec": spec.hash, "first": row[0]} for row in rows if not sound(spec, row[4], row[3])]:
            log.warning("sum_refused", sums=len(damaged), detail="these ranges are summed again")
            connection.executemany(UPDATE_NO_SUM, damaged)
            return None
        users = sum(row[2] for row in rows)
        if not users and seen is None:
            return None
        total = SufficientStatistics.none(spec).plus([row[4] for row in rows], sum(row[3] for row in rows))
        mu = pooled_mean(total)
        prior = (spec.hash, packed(mu), users, total.decisions, revision, now_ms)
        (version,) = connection.execute(INSERT_PRIOR, prior).fetchone()
        if seen is None:
            begin_evaluation(connection, spec.hash)
        return Prior(version, spec, mu, users, total.decisions, now_ms)

    async def prior_version(self) -> int:
        return int(await self._database.value(SELECT_NEWEST_VERSION, {"spec": self._spec.hash}))

    async def growth(self) -> StateGrowth:
        counts = dict(await self._database.rows(SELECT_COUNTS, (json.dumps(list(SPECS)),)))
        return StateGrowth(sum(counts.values()), sum(counts.get(spec.hash, 0) for spec in self._spec.shorter()))

    @writes(of=())
    def _claim(self, connection: Connection, due: Mapping[str, Any]) -> dict[str, Any] | None:
        """Claim a range of users that is still to be summed in this round; None if another worker was faster. A range
        that has become too large is cut in two. `due`: the parameters of `SELECT_DUE`. The result contains `due`, the
        bounds `first` and (exclusive) `end`, and the `users` and `decisions` of the stored sum (None without one)."""
        row = connection.execute(UPDATE_CLAIM, due).fetchone()
        if row is None:
            return None
        claim = {**due, **dict(zip(("first", "users", "decisions"), row, strict=True))}
        (end,) = connection.execute(SELECT_END, claim).fetchone()
        claim["end"] = end or AFTER_ALL_IDS
        if connection.execute(SELECT_NTH_USER, {**claim, "n": 2 * RANGE_USERS}).fetchone() is not None:
            (claim["end"],) = connection.execute(SELECT_NTH_USER, {**claim, "n": RANGE_USERS}).fetchone()
            connection.execute(UPDATE_NO_SUM, claim)
            connection.execute(INSERT_RANGE, claim)
            claim["users"] = claim["decisions"] = None
        return claim

    @reads
    def _summed(
        self, connection: Connection, claim: Mapping[str, Any]
    ) -> tuple[SufficientStatistics, int, list[str]] | None:
        """Sum the statistics in the range. Return the sum, the number of users in it, and the ids of users with damaged
        statistics; None if the range has not changed since the stored sum."""
        if connection.execute(SELECT_LEARNED, claim).fetchone() == (claim["users"], claim["decisions"]):
            return None
        total, users, damaged = SufficientStatistics.none(self._spec), 0, list[str]()
        cursor = connection.execute(SELECT_STATES_IN_RANGE, claim)
        while page := cursor.fetchmany(PAGE):
            intact: list[Any] = []
            for row in page:
                intact.append(row) if _intact(*row[1:]) else damaged.append(row[0])
            total = total.plus([row[2] for row in intact], sum(row[3] for row in intact))
            users += len(intact)
        return total, users, damaged


def statistics_of(spec_hash: str, evidence: bytes, decisions: int, *checksums: int | None) -> SufficientStatistics:
    """Decode a row of `SELECT_STATE`. Raises `SpecMismatch` as `read_statistics`."""
    spec = SPECS.get(spec_hash)
    if spec_hash.startswith(ASIDE):
        raise SpecMismatch("the user's statistics are damaged and were set aside")
    if spec is None:
        raise SpecMismatch(f"the user's statistics are of spec {spec_hash[:12]}, which this release does not know")
    if not _intact(spec_hash, evidence, decisions, *checksums):
        raise SpecMismatch(f"the user's statistics of {decisions} decisions under {spec.id} {spec.version} are damaged")
    return SufficientStatistics.unpack(spec, evidence, decisions)


def _intact(spec_hash: str, evidence: bytes, decisions: int, *checksums: int | None) -> bool:
    matching = sum(map(eq, _checksums(spec_hash, evidence, decisions), checksums))
    return matching == 2 or (matching == 0 and sound(SPECS[spec_hash], evidence, decisions))


def _checksums(spec_hash: str, evidence: bytes, decisions: int) -> tuple[int, int]:
    return crc32(f"{spec_hash} {decisions}".encode()), crc32(evidence)
