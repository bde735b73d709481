"""Stores each user's sufficient statistics, and the priors pooled from the statistics of all users.

Each row belongs to a spec, a list of model inputs, and holds the spec's hash. Invariants: rows of a spec that this
release does not know are never read, added to or overwritten. Damaged statistics and damaged priors are never used.

A process that finds a row of damaged statistics logs it and *sets it aside*: it overwrites the hash with a text that
matches no spec, so that the row is kept but not read again. No other user is affected. A damaged prior is logged once
by each process, and the newest intact prior is used instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from app.bandit.model.inputs import NUMBER_BYTES, packed
from app.bandit.model.pooled_prior import Pool, Prior, can_be_pooled
from app.bandit.model.specs import SPECS, Spec
from app.bandit.model.sufficient_statistics import SufficientStatistics, sound
from app.errors import SpecMismatch
from app.features.ids import user_hash
from app.stores.sql.database import SERVICE, Connection, Database
from app.stores.sql.decision_rows import array
from app.stores.sql.rollout import begin_evaluation
from app.telemetry import logger

PAGE = 256
# Put before the spec's hash in rows that are set aside.
ASIDE = "unreadable "
log = logger("stores.states")

SELECT_STATE = "SELECT spec_hash, evidence, decisions FROM bandit_states WHERE user_id = ?"
UPSERT_STATE = """
INSERT INTO bandit_states (user_id, spec_hash, evidence, decisions, updated_at_ms) VALUES (?, ?, ?, ?, ?)
ON CONFLICT (user_id) DO UPDATE SET
    spec_hash = excluded.spec_hash, evidence = excluded.evidence, decisions = excluded.decisions,
    updated_at_ms = excluded.updated_at_ms
"""
SELECT_STATES = "SELECT user_id, spec_hash, evidence, decisions FROM bandit_states"
SELECT_STATES_AFTER = f"{SELECT_STATES} WHERE user_id > ? ORDER BY user_id LIMIT {PAGE}"
UPDATE_ASIDE = "UPDATE bandit_states SET spec_hash = ? WHERE user_id = ?"
SELECT_TO_GROW = "SELECT user_id FROM bandit_states WHERE spec_hash IN (SELECT value FROM json_each(?)) LIMIT ?"
SELECT_GROWING = """
SELECT user_id, spec_hash, evidence, decisions FROM bandit_states
WHERE user_id IN (SELECT value FROM json_each(?)) AND spec_hash IN (SELECT value FROM json_each(?))
"""
SELECT_COUNTS = "SELECT spec_hash, COUNT(*) FROM bandit_states GROUP BY spec_hash"
# A range of the index by spec, so that only rows set aside are read.
SELECT_ASIDE_COUNT = f"SELECT COUNT(*) FROM bandit_states WHERE spec_hash >= '{ASIDE}' AND spec_hash < '{ASIDE[:-1]}!'"
SELECT_CHANGES = "SELECT changes FROM bandit_ledger"
UPDATE_CHANGES = "UPDATE bandit_ledger SET changes = changes + 1"
SELECT_CHANGES_SEEN = "SELECT MAX(changes) FROM bandit_priors WHERE spec_hash = ?"
SELECT_NEWEST_VERSION = "SELECT version FROM bandit_priors WHERE spec_hash = ? ORDER BY version DESC LIMIT 1"
SELECT_PRIOR_BELOW = """
SELECT version, mu, users, decisions, created_at_ms FROM bandit_priors
WHERE spec_hash = ? AND version < ? ORDER BY version DESC LIMIT 1
"""
SELECT_PRIORS = "SELECT mu, decisions FROM bandit_priors WHERE spec_hash = ?"
INSERT_PRIOR = """
INSERT INTO bandit_priors (spec_hash, mu, users, decisions, changes, created_at_ms) VALUES (?, ?, ?, ?, ?, ?)
"""


def read_statistics(connection: Connection, user_id: str) -> SufficientStatistics | None:
    """A user's statistics; None if there are none. Raises `SpecMismatch` if they are damaged or of an unknown spec."""
    row = connection.execute(SELECT_STATE, (user_id,)).fetchone()
    return None if row is None else _evidence(*row)


def write_statistics(connection: Connection, evidence: Mapping[str, SufficientStatistics], now_ms: int) -> None:
    """Replace the statistics of each user in `evidence`, a mapping by user id."""
    rows = [(user_id, item.spec_hash, item.pack(), item.decisions, now_ms) for user_id, item in evidence.items()]
    connection.executemany(UPSERT_STATE, rows)


def set_aside(connection: Connection, user_id: str) -> bool:
    """Set a user's statistics aside, as the module describes, if they are damaged. Return True if they cannot be used,
    because they are damaged, were set aside before, or belong to an unknown spec."""
    row = connection.execute(SELECT_STATE, (user_id,)).fetchone()
    if row is None:
        return False
    try:
        _evidence(*row)
    except SpecMismatch as error:
        if row[0] in SPECS:
            connection.execute(UPDATE_ASIDE, (ASIDE + row[0], user_id))
            log.warning("statistics_set_aside", user=user_hash(user_id), error=str(error))
        return True
    return False


def damaged(connection: Connection, *, whole: bool) -> int:
    """The number of users whose statistics were found damaged. `whole` also checks all statistics for new damage."""
    (count,) = connection.execute(SELECT_ASIDE_COUNT).fetchone()
    after = ""
    # Page by page: PostgreSQL sends all rows of a statement at once.
    while whole and (page := connection.execute(SELECT_STATES_AFTER, (after,)).fetchall()):
        after = page[-1][0]
        for spec_hash in SPECS:
            states = [(evidence, decisions) for _, own, evidence, decisions in page if own == spec_hash]
            count += sound(SPECS[spec_hash], *zip(*states, strict=True)).count(False) if states else 0
    return int(count)


def grow_statistics(connection: Connection, user_id: str, spec: Spec, now_ms: int) -> None:
    """Extend a user's statistics to `spec`, if they are intact and `spec` begins with the inputs of their spec."""
    row = connection.execute(SELECT_STATE, (user_id,)).fetchone()
    if row is None or row[0] == spec.hash or (own := SPECS.get(row[0])) is None or not own.prefix_of(spec):
        return
    try:
        grown = _evidence(*row).grown(own, spec)
    except SpecMismatch:
        return  # the next decision reports it; one user's damage must not fail the decisions of others
    write_statistics(connection, {user_id: grown}, now_ms)


def newest_prior(connection: Connection, spec: Spec, known: Prior, refused: set[int]) -> Prior:
    """The newest intact prior of a spec; `known` if none is newer. Adds the versions of damaged priors to `refused`."""
    if not spec.pooled:
        return known  # it has no priors; a search would go through those of all other specs
    row = connection.execute(SELECT_NEWEST_VERSION, (spec.hash,)).fetchone()
    if row is None or row[0] == known.version or row[0] in refused:
        return known
    version = row[0] + 1
    while (row := connection.execute(SELECT_PRIOR_BELOW, (spec.hash, version)).fetchone()) is not None:
        version, mu, users, decisions, created_at_ms = row
        if version == known.version:
            break
        if _is_prior(spec, mu, decisions):
            return Prior(version, spec.hash, array(mu), users, decisions, created_at_ms)
        if version not in refused:
            refused.add(version)
            log.warning("prior_refused", version=version)
    return known


def damaged_priors(connection: Connection) -> int:
    """The number of damaged priors of the specs that this release knows."""
    return sum(
        not _is_prior(spec, mu, decisions)
        for spec in SPECS.values()
        for mu, decisions in connection.execute(SELECT_PRIORS, (spec.hash,))
    )


def _is_prior(spec: Spec, mu: bytes, decisions: int) -> bool:
    return len(mu) == NUMBER_BYTES * spec.size and can_be_pooled(array(mu), decisions)


class SqlStates:
    """The statistics of all users, and the pooled priors. Implements `app.bandit.ports.StateRepository`."""

    def __init__(self, database: Database, spec: Spec) -> None:
        """`spec`: the longest list of model inputs. Users' statistics are extended to it, and its priors are pooled."""
        self._database = database
        self._spec = spec
        shorter = [item.hash for item in SPECS.values() if item != spec and item.prefix_of(spec)]
        self._shorter = json.dumps(shorter)
        self._pooled_specs = {spec.hash, *shorter}

    async def pooled(self, now_ms: int) -> tuple[Prior, int] | None:
        """Pool a prior from one snapshot of all users' statistics; None if nothing has changed since the newest prior.

        The second value counts the changes of statistics that the prior includes. Damaged statistics are left out, and
        set aside afterwards.
        """
        damaged: list[str] = []

        found = await self._database.read(lambda connection: self._pooled(connection, now_ms, damaged), snapshot=True)
        if damaged:
            await self._database.write(
                lambda connection: [set_aside(connection, user_id) for user_id in damaged], of=damaged
            )
        return found

    async def add_prior(self, prior: Prior, changes: int) -> bool:
        def work(connection: Connection) -> bool:
            (seen,) = connection.execute(SELECT_CHANGES_SEEN, (self._spec.hash,)).fetchone()
            if seen is not None and seen >= changes:
                return False
            row = (prior.spec_hash, packed(prior.mu), prior.users, prior.decisions, changes, prior.created_at_ms)
            connection.execute(INSERT_PRIOR, row)
            if seen is None:
                begin_evaluation(connection)
            return True

        return await self._database.write(work, of=SERVICE)

    async def grow(self, limit: int, now_ms: int) -> int:
        users = [user_id for (user_id,) in await self._database.rows(SELECT_TO_GROW, (self._shorter, limit))]

        def work(connection: Connection) -> int:
            rows = connection.execute(SELECT_GROWING, (json.dumps(users), self._shorter)).fetchall()
            grown: dict[str, SufficientStatistics] = {}
            for user_id, spec_hash, evidence, decisions in rows:
                try:
                    grown[user_id] = _evidence(spec_hash, evidence, decisions).grown(SPECS[spec_hash], self._spec)
                except SpecMismatch:
                    set_aside(connection, user_id)
            write_statistics(connection, grown, now_ms)
            return len(rows)

        return await self._database.write(work, of=users) if users else 0

    async def prior_version(self) -> int:
        row = await self._database.row(SELECT_NEWEST_VERSION, (self._spec.hash,))
        return 0 if row is None else int(row[0])

    async def counts(self) -> Mapping[str, int]:
        return dict(await self._database.rows(SELECT_COUNTS))

    def _pooled(self, connection: Connection, now_ms: int, damaged: list[str]) -> tuple[Prior, int] | None:
        (changes,) = connection.execute(SELECT_CHANGES).fetchone()
        (seen,) = connection.execute(SELECT_CHANGES_SEEN, (self._spec.hash,)).fetchone()
        if changes == (seen or 0):
            return None
        pool = Pool(self._spec)
        # In the same order on both engines, because sums of floats depend on it.
        cursor = connection.execute(f"{SELECT_STATES} ORDER BY user_id")
        while page := cursor.fetchmany(PAGE):
            by_spec: dict[str, list[tuple[str, bytes, int]]] = {}
            for user_id, spec_hash, evidence, decisions in page:
                by_spec.setdefault(spec_hash, []).append((user_id, evidence, decisions))
            for spec_hash in by_spec.keys() & self._pooled_specs:
                damaged += _add(pool, spec_hash, by_spec[spec_hash])
        return pool.prior(0, now_ms), changes


def _add(pool: Pool, spec_hash: str, states: Sequence[tuple[str, bytes, int]]) -> list[str]:
    """Add the intact statistics of users to the pool. Return the ids of users with damaged statistics. `states`: user
    id, packed statistics and number of learned decisions of each user."""
    users, blobs, decisions = zip(*states, strict=True)
    fits = sound(SPECS[spec_hash], blobs, decisions)
    learned = sum(count for count, well in zip(decisions, fits, strict=True) if well)
    pool.add(spec_hash, [packed for packed, well in zip(blobs, fits, strict=True) if well], learned)
    return [user_id for user_id, well in zip(users, fits, strict=True) if not well]


def _evidence(spec_hash: str, evidence: bytes, decisions: int) -> SufficientStatistics:
    spec = SPECS.get(spec_hash)
    if spec_hash.startswith(ASIDE):
        raise SpecMismatch("the user's statistics are damaged and were set aside")
    if spec is None:
        raise SpecMismatch(f"the user's statistics are of spec {spec_hash[:12]}, which this release does not know")
    return SufficientStatistics.unpack(spec, evidence, decisions)
