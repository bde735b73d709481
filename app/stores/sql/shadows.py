"""Stores the *shadow* of each decision: how champion and challenger rank its candidates, given the user's statistics
from which the decision was made.

Invariant: while an unsettled decision has no shadow, the user's statistics are those from which it was made.

1. A decision is stored only if the user's statistics have not changed since they were read for it.
2. A transaction that changes a user's statistics first stores the missing shadows of the user's decisions.

Both transactions lock the user. Usually a worker has already stored the shadow, within seconds after the decision.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any

from app.bandit.decisions import shadow_of
from app.bandit.model.inputs import Array
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.bandit.model.thompson_sampling import Policies
from app.errors import SpecMismatch
from app.features.ids import user_hash
from app.stores.sql.database import Connection, named_rows
from app.stores.sql.decision_rows import decision_of
from app.stores.sql.logged_profiles import DAMAGE
from app.stores.sql.sufficient_statistics import prior_of, read_statistics
from app.telemetry import logger

log = logger("stores.shadows")

# Without decisions of another spec, which are not evaluated for the challenger of this release.
_MISSING = "SELECT * FROM tip_scores WHERE champion_p IS NULL AND state IN ('open', 'served') AND spec_hash = :spec"
SELECT_OF_USER = f"{_MISSING} AND user_id = :user AND state_version = :version"
# A decision that a process of an earlier release has made or learned from may have another version; see the invariant.
SELECT_PAGE = f"""
{_MISSING} AND (user_id, number) > (:user, :number) AND state_version = COALESCE(
    (SELECT decisions FROM bandit_states WHERE bandit_states.user_id = tip_scores.user_id), 0
)
ORDER BY user_id, number LIMIT :limit
"""
UPDATE_SHADOW = """
UPDATE tip_scores SET champion_scores = :champion_scores, champion_pi = :champion_pi,
    challenger_scores = :challenger_scores, challenger_pi = :challenger_pi, champion_p = :champion_p,
    challenger_p = :challenger_p, agree = :agree, q_logged = :q_logged, v_champion = :v_champion,
    v_challenger = :v_challenger
WHERE user_id = :user_id AND number = :number AND champion_p IS NULL
"""
# A table of its own: processes of an earlier release select all columns of `tip_scores`, with prepared statements.
INSERT_POOL = """
INSERT INTO pool_shadows (number, pool_p, v_pool) SELECT :number, :pool_p, :v_pool
WHERE EXISTS (SELECT 1 FROM tip_scores WHERE user_id = :user_id AND number = :number) ON CONFLICT DO NOTHING
"""


def add_user_shadows(
    connection: Connection, policies: Policies, user_id: str, statistics: SufficientStatistics | None
) -> None:
    """Store the missing shadows (rankings by champion and challenger) of a user's decisions. Call it before the user's
    `statistics` change, in a transaction that has locked the user."""
    if policies.challenger is None:
        return
    version = 0 if statistics is None else statistics.decisions
    rows = named_rows(connection, SELECT_OF_USER, {"spec": policies.longest.hash, "user": user_id, "version": version})
    shadows = list(_shadows(connection, policies, rows, statistics))
    if len(shadows) < len(rows):
        log.warning("shadows_lost", user=user_hash(user_id), decisions=len(rows) - len(shadows))
    store_shadows(connection, shadows)


def store_shadows(connection: Connection, shadows: Sequence[Mapping[str, object]]) -> None:
    connection.executemany(UPDATE_SHADOW, shadows)
    connection.executemany(INSERT_POOL, shadows)


def missing_shadows(
    connection: Connection, policies: Policies, after: tuple[str, int], limit: int
) -> tuple[tuple[str, int] | None, list[dict[str, object]]]:
    """Compute the missing shadows of up to `limit` decisions after the decision `after`, given as user id and decision
    number. Return the user id and number of the last decision computed (None if no more follow), and the shadows as
    parameters of `store_shadows`."""
    if policies.challenger is None:
        return None, []
    values = {"user": after[0], "number": after[1], "spec": policies.longest.hash, "limit": limit}
    rows = named_rows(connection, SELECT_PAGE, values)
    shadows: list[dict[str, object]] = []
    for user_id, own in groupby(rows, key=lambda row: str(row["user_id"])):
        with suppress(SpecMismatch):  # the statistics are damaged
            shadows += _shadows(connection, policies, list(own), read_statistics(connection, user_id))
    return (rows[-1]["user_id"], rows[-1]["number"]) if len(rows) == limit else None, shadows


def _shadows(
    connection: Connection, policies: Policies, rows: list[dict[str, Any]], statistics: SufficientStatistics | None
) -> Iterator[dict[str, object]]:
    """The shadows of decisions made from these statistics, as parameters of `store_shadows`. `rows`: the decisions, as
    rows of `tip_scores`; damaged ones are skipped."""
    means: dict[int, Array] = {}
    for row in rows:
        version = row["prior_version"]
        try:
            if version not in means:
                means[version] = prior_of(connection, policies.longest, version).mu
            shadow = shadow_of(decision_of(row), statistics, means[version], policies)
        except (SpecMismatch, *DAMAGE):
            continue
        yield {**shadow, "user_id": row["user_id"], "number": row["number"]}
