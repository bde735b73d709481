"""Every user's learned evidence, and the priors pooled from it.

Invariant: what is of a spec that this release does not know is never read, added to or overwritten.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping

from app.bandit.evidence import Evidence
from app.bandit.pooling import Pool, Prior
from app.bandit.specs import SPECS, Spec
from app.errors import SpecMismatch
from app.stores.sqlite.database import Database
from app.stores.sqlite.decision_rows import array, blob

PAGE = 256

SELECT_STATE = "SELECT spec_hash, evidence, decisions FROM bandit_states WHERE user_id = ?"
UPSERT_STATE = """
INSERT INTO bandit_states (user_id, spec_hash, evidence, decisions, updated_at_ms) VALUES (?, ?, ?, ?, ?)
ON CONFLICT (user_id) DO UPDATE SET
    spec_hash = excluded.spec_hash, evidence = excluded.evidence, decisions = excluded.decisions,
    updated_at_ms = excluded.updated_at_ms
"""
SELECT_STATES = "SELECT spec_hash, evidence, decisions FROM bandit_states"
SELECT_TO_GROW = """
SELECT user_id, spec_hash, evidence, decisions FROM bandit_states
WHERE spec_hash IN (SELECT value FROM json_each(?)) LIMIT ?
"""
SELECT_COUNTS = "SELECT spec_hash, COUNT(*) FROM bandit_states GROUP BY spec_hash"
SELECT_CHANGES = "SELECT changes FROM bandit_ledger"
UPDATE_CHANGES = "UPDATE bandit_ledger SET changes = changes + 1"
SELECT_NEWEST_PRIOR = """
SELECT version, spec_hash, mu, users, decisions, created_at_ms FROM bandit_priors
WHERE spec_hash = ? ORDER BY version DESC LIMIT 1
"""
SELECT_NEWEST_VERSION = "SELECT version FROM bandit_priors WHERE spec_hash = ? ORDER BY version DESC LIMIT 1"
SELECT_CHANGES_SEEN = "SELECT MAX(changes) FROM bandit_priors WHERE spec_hash = ?"
INSERT_PRIOR = """
INSERT INTO bandit_priors (spec_hash, mu, users, decisions, changes, created_at_ms) VALUES (?, ?, ?, ?, ?, ?)
"""


def read_evidence(connection: sqlite3.Connection, user_id: str) -> Evidence | None:
    """A user's, None where there is none; raises `SpecMismatch` where this release does not know its spec."""
    row = connection.execute(SELECT_STATE, (user_id,)).fetchone()
    return None if row is None else _evidence(*row)


def write_evidence(connection: sqlite3.Connection, evidence: Mapping[str, Evidence], now_ms: int) -> None:
    """Each user's, in the place of what was there."""
    rows = [(user_id, item.spec_hash, item.pack(), item.decisions, now_ms) for user_id, item in evidence.items()]
    connection.executemany(UPSERT_STATE, rows)


def grow_evidence(connection: sqlite3.Connection, user_id: str, spec: Spec, now_ms: int) -> None:
    """Bring a user's to a longer spec; where there is none that is shorter and can be read, nothing is done."""
    row = connection.execute(SELECT_STATE, (user_id,)).fetchone()
    if row is None or row[0] == spec.hash or (own := SPECS.get(row[0])) is None or not own.prefix_of(spec):
        return
    try:
        grown = _evidence(*row).grown(own, spec)
    except SpecMismatch:
        return  # whoever decides by it is told; one user's must not fail the decisions of others
    write_evidence(connection, {user_id: grown}, now_ms)


def newest_prior(connection: sqlite3.Connection, spec: Spec, known: Prior) -> Prior:
    """The newest, which may be the one that is known already."""
    if not spec.pooled:
        return known  # there is none; to look for it would be to go through all those of other specs
    row = connection.execute(SELECT_NEWEST_VERSION, (spec.hash,)).fetchone()
    if row is None or row[0] == known.version:
        return known
    version, spec_hash, mu, users, decisions, created_at_ms = connection.execute(
        SELECT_NEWEST_PRIOR, (spec.hash,)
    ).fetchone()
    return Prior(version, spec_hash, array(mu), users, decisions, created_at_ms)


class SqliteStates:
    """Implements `app.bandit.ports.StateBook`."""

    def __init__(self, database: Database, spec: Spec) -> None:
        """`spec`: the longest, to which evidence grows and under which it is pooled."""
        self._database = database
        self._spec = spec
        shorter = [item.hash for item in SPECS.values() if item != spec and item.prefix_of(spec)]
        self._shorter = json.dumps(shorter)
        self._pooled_specs = {spec.hash, *shorter}

    async def pooled(self, now_ms: int) -> tuple[Prior, int] | None:
        """One snapshot, on one reader."""

        def work(connection: sqlite3.Connection) -> tuple[Prior, int] | None:
            connection.execute("BEGIN")
            try:
                return self._pooled(connection, now_ms)
            finally:
                connection.execute("ROLLBACK")

        return await self._database.read(work)

    async def add_prior(self, prior: Prior, changes: int) -> bool:
        """The version is the row's number."""

        def work(connection: sqlite3.Connection) -> bool:
            (seen,) = connection.execute(SELECT_CHANGES_SEEN, (self._spec.hash,)).fetchone()
            if seen is not None and seen >= changes:
                return False
            row = (prior.spec_hash, blob(prior.mu), prior.users, prior.decisions, changes, prior.created_at_ms)
            connection.execute(INSERT_PRIOR, row)
            return True

        return await self._database.write(work)

    async def grow(self, limit: int, now_ms: int) -> int:
        """A page, in one transaction."""

        def work(connection: sqlite3.Connection) -> int:
            rows = connection.execute(SELECT_TO_GROW, (self._shorter, limit)).fetchall()
            grown = {
                user_id: _evidence(spec_hash, evidence, decisions).grown(SPECS[spec_hash], self._spec)
                for user_id, spec_hash, evidence, decisions in rows
            }
            write_evidence(connection, grown, now_ms)
            return len(rows)

        return await self._database.write(work)

    async def prior_version(self) -> int:
        """By the table's end."""
        row = await self._database.read(lambda c: c.execute(SELECT_NEWEST_VERSION, (self._spec.hash,)).fetchone())
        return 0 if row is None else int(row[0])

    async def counts(self) -> Mapping[str, int]:
        """By an index alone."""
        return dict(await self._database.read(lambda connection: connection.execute(SELECT_COUNTS).fetchall()))

    def _pooled(self, connection: sqlite3.Connection, now_ms: int) -> tuple[Prior, int] | None:
        (changes,) = connection.execute(SELECT_CHANGES).fetchone()
        (seen,) = connection.execute(SELECT_CHANGES_SEEN, (self._spec.hash,)).fetchone()
        if changes == (seen or 0):
            return None
        pool = Pool(self._spec)
        cursor = connection.execute(SELECT_STATES)
        while page := cursor.fetchmany(PAGE):
            by_spec: dict[str, list[tuple[bytes, int]]] = {}
            for spec_hash, evidence, decisions in page:
                by_spec.setdefault(spec_hash, []).append((evidence, decisions))
            for spec_hash in by_spec.keys() & self._pooled_specs:
                blobs, learned = zip(*by_spec[spec_hash], strict=True)
                pool.add_packed(spec_hash, blobs, sum(learned))
        return pool.prior(0, now_ms), changes


def _evidence(spec_hash: str, evidence: bytes, decisions: int) -> Evidence:
    spec = SPECS.get(spec_hash)
    if spec is None:
        raise SpecMismatch(f"the user's evidence is of spec {spec_hash[:12]}, which this release does not know")
    return Evidence.unpack(spec, evidence, decisions)
