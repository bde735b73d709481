"""Every user's learned evidence, and the priors pooled from it.

Invariant: rows of a spec that this release does not know are never read, added to or overwritten. A damaged row is set
aside: it stays as it is, but under the name of no spec, so that it is never read again. The reader that finds the
damage sets the row aside in a write transaction and logs it; no other user is affected.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence

from app.bandit.model.inputs import packed
from app.bandit.model.pooled_prior import Pool, Prior
from app.bandit.model.specs import SPECS, Spec
from app.bandit.model.sufficient_statistics import SufficientStatistics, sound
from app.errors import SpecMismatch
from app.features.ids import user_hash
from app.stores.sqlite.database import Database
from app.stores.sqlite.priors import SELECT_NEWEST_VERSION
from app.stores.sqlite.rollout import begin_evaluation
from app.telemetry import logger

PAGE = 256
# Before the hash of its spec, the mark of what was set aside.
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
UPDATE_ASIDE = "UPDATE bandit_states SET spec_hash = ? WHERE user_id = ?"
SELECT_TO_GROW = """
SELECT user_id, spec_hash, evidence, decisions FROM bandit_states
WHERE spec_hash IN (SELECT value FROM json_each(?)) LIMIT ?
"""
SELECT_COUNTS = "SELECT spec_hash, COUNT(*) FROM bandit_states GROUP BY spec_hash"
# A search of the index by spec: it holds no more than there are.
SELECT_ASIDE_COUNT = f"SELECT COUNT(*) FROM bandit_states WHERE spec_hash >= '{ASIDE}' AND spec_hash < '{ASIDE[:-1]}!'"
SELECT_CHANGES = "SELECT changes FROM bandit_ledger"
UPDATE_CHANGES = "UPDATE bandit_ledger SET changes = changes + 1"
SELECT_CHANGES_SEEN = "SELECT MAX(changes) FROM bandit_priors WHERE spec_hash = ?"
INSERT_PRIOR = """
INSERT INTO bandit_priors (spec_hash, mu, users, decisions, changes, created_at_ms) VALUES (?, ?, ?, ?, ?, ?)
"""


def read_statistics(connection: sqlite3.Connection, user_id: str) -> SufficientStatistics | None:
    """A user's, None where there is none; raises `SpecMismatch` where this release does not know its spec."""
    row = connection.execute(SELECT_STATE, (user_id,)).fetchone()
    return None if row is None else _evidence(*row)


def write_statistics(connection: sqlite3.Connection, evidence: Mapping[str, SufficientStatistics], now_ms: int) -> None:
    """Each user's, in the place of what was there."""
    rows = [(user_id, item.spec_hash, item.pack(), item.decisions, now_ms) for user_id, item in evidence.items()]
    connection.executemany(UPSERT_STATE, rows)


def set_aside(connection: sqlite3.Connection, user_id: str) -> bool:
    """Set a user's evidence aside where it is damaged; whether there is any that cannot be read."""
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


def damaged(connection: sqlite3.Connection, *, whole: bool) -> int:
    """Users whose evidence was set aside; `whole` reads those of every user and counts new damage, too."""
    (count,) = connection.execute(SELECT_ASIDE_COUNT).fetchone()
    cursor = connection.execute(SELECT_STATES)
    while whole and (page := cursor.fetchmany(PAGE)):
        for spec_hash in SPECS:
            states = [(evidence, decisions) for _, own, evidence, decisions in page if own == spec_hash]
            count += sound(SPECS[spec_hash], *zip(*states, strict=True)).count(False) if states else 0
    return int(count)


def grow_statistics(connection: sqlite3.Connection, user_id: str, spec: Spec, now_ms: int) -> None:
    """Bring a user's to a longer spec; where there is none that is shorter and can be read, nothing is done."""
    row = connection.execute(SELECT_STATE, (user_id,)).fetchone()
    if row is None or row[0] == spec.hash or (own := SPECS.get(row[0])) is None or not own.prefix_of(spec):
        return
    try:
        grown = _evidence(*row).grown(own, spec)
    except SpecMismatch:
        return  # the next decision reports it; one user's damage must not fail the decisions of others
    write_statistics(connection, {user_id: grown}, now_ms)


class SqliteStates:
    """Implements `app.bandit.ports.StateRepository`."""

    def __init__(self, database: Database, spec: Spec) -> None:
        """`spec`: the longest, to which evidence grows and under which it is pooled."""
        self._database = database
        self._spec = spec
        shorter = [item.hash for item in SPECS.values() if item != spec and item.prefix_of(spec)]
        self._shorter = json.dumps(shorter)
        self._pooled_specs = {spec.hash, *shorter}

    async def pooled(self, now_ms: int) -> tuple[Prior, int] | None:
        """One snapshot, on one reader; what was found damaged there is set aside after it."""
        damaged: list[str] = []

        def work(connection: sqlite3.Connection) -> tuple[Prior, int] | None:
            connection.execute("BEGIN")
            try:
                return self._pooled(connection, now_ms, damaged)
            finally:
                connection.execute("ROLLBACK")

        found = await self._database.read(work)
        if damaged:
            await self._database.write(lambda connection: [set_aside(connection, user_id) for user_id in damaged])
        return found

    async def add_prior(self, prior: Prior, changes: int) -> bool:
        """The version is the row's number."""

        def work(connection: sqlite3.Connection) -> bool:
            (seen,) = connection.execute(SELECT_CHANGES_SEEN, (self._spec.hash,)).fetchone()
            if seen is not None and seen >= changes:
                return False
            row = (prior.spec_hash, packed(prior.mu), prior.users, prior.decisions, changes, prior.created_at_ms)
            connection.execute(INSERT_PRIOR, row)
            if seen is None:
                begin_evaluation(connection)
            return True

        return await self._database.write(work)

    async def grow(self, limit: int, now_ms: int) -> int:
        """A page, in one transaction."""

        def work(connection: sqlite3.Connection) -> int:
            rows = connection.execute(SELECT_TO_GROW, (self._shorter, limit)).fetchall()
            grown: dict[str, SufficientStatistics] = {}
            for user_id, spec_hash, evidence, decisions in rows:
                try:
                    grown[user_id] = _evidence(spec_hash, evidence, decisions).grown(SPECS[spec_hash], self._spec)
                except SpecMismatch:
                    set_aside(connection, user_id)
            write_statistics(connection, grown, now_ms)
            return len(rows)

        return await self._database.write(work)

    async def prior_version(self) -> int:
        """By the table's end."""
        row = await self._database.read(lambda c: c.execute(SELECT_NEWEST_VERSION, (self._spec.hash,)).fetchone())
        return 0 if row is None else int(row[0])

    async def counts(self) -> Mapping[str, int]:
        """By an index alone."""
        return dict(await self._database.read(lambda connection: connection.execute(SELECT_COUNTS).fetchall()))

    def _pooled(self, connection: sqlite3.Connection, now_ms: int, damaged: list[str]) -> tuple[Prior, int] | None:
        (changes,) = connection.execute(SELECT_CHANGES).fetchone()
        (seen,) = connection.execute(SELECT_CHANGES_SEEN, (self._spec.hash,)).fetchone()
        if changes == (seen or 0):
            return None
        pool = Pool(self._spec)
        cursor = connection.execute(SELECT_STATES)
        while page := cursor.fetchmany(PAGE):
            by_spec: dict[str, list[tuple[str, bytes, int]]] = {}
            for user_id, spec_hash, evidence, decisions in page:
                by_spec.setdefault(spec_hash, []).append((user_id, evidence, decisions))
            for spec_hash in by_spec.keys() & self._pooled_specs:
                damaged += _add(pool, spec_hash, by_spec[spec_hash])
        return pool.prior(0, now_ms), changes


def _add(pool: Pool, spec_hash: str, states: Sequence[tuple[str, bytes, int]]) -> list[str]:
    """Add what is sound to the pool; the users whose evidence is not."""
    users, blobs, decisions = zip(*states, strict=True)
    fits = sound(SPECS[spec_hash], blobs, decisions)
    learned = sum(count for count, well in zip(decisions, fits, strict=True) if well)
    pool.add(spec_hash, [packed for packed, well in zip(blobs, fits, strict=True) if well], learned)
    return [user_id for user_id, well in zip(users, fits, strict=True) if not well]


def _evidence(spec_hash: str, evidence: bytes, decisions: int) -> SufficientStatistics:
    spec = SPECS.get(spec_hash)
    if spec_hash.startswith(ASIDE):
        raise SpecMismatch("the user's evidence is damaged, and was set aside")
    if spec is None:
        raise SpecMismatch(f"the user's evidence is of spec {spec_hash[:12]}, which this release does not know")
    return SufficientStatistics.unpack(spec, evidence, decisions)
