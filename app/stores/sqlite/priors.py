"""Reading the pooled priors.

Invariant: one that is damaged decides nothing. It stays as it is, whoever finds it says so once, and everything goes on
with the newest that is sound.
"""

from __future__ import annotations

import sqlite3

from app.bandit.model.pooled_prior import Prior, can_be_pooled
from app.bandit.model.specs import SPECS, Spec
from app.stores.sqlite.decision_rows import NUMBER_BYTES, array
from app.telemetry import logger

log = logger("stores.priors")

SELECT_NEWEST_VERSION = "SELECT version FROM bandit_priors WHERE spec_hash = ? ORDER BY version DESC LIMIT 1"
SELECT_PRIOR_BELOW = """
SELECT version, mu, users, decisions, created_at_ms FROM bandit_priors
WHERE spec_hash = ? AND version < ? ORDER BY version DESC LIMIT 1
"""
SELECT_PRIORS = "SELECT mu, decisions FROM bandit_priors WHERE spec_hash = ?"


def newest_prior(connection: sqlite3.Connection, spec: Spec, known: Prior, refused: set[int]) -> Prior:
    """The newest that is sound, which may be the one that is known already; those that are not are `refused` now."""
    if not spec.pooled:
        return known  # there is none; to look for it would be to go through all those of other specs
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


def damaged_priors(connection: sqlite3.Connection) -> int:
    """Pooled priors that are not sound, of the specs that this release knows."""
    return sum(
        not _is_prior(spec, mu, decisions)
        for spec in SPECS.values()
        for mu, decisions in connection.execute(SELECT_PRIORS, (spec.hash,))
    )


def _is_prior(spec: Spec, mu: bytes, decisions: int) -> bool:
    return len(mu) == NUMBER_BYTES * spec.size and can_be_pooled(array(mu), decisions)
