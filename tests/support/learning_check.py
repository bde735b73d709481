"""Checks that each decision was learned once: the statistics of each user equal the sum over the learned decisions; and
that each learned decision has a shadow, computed from the statistics before the user's later rewards."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import msgspec
import numpy as np

from app.bandit.decisions import Decision
from app.bandit.model.inputs import SPEC_V2, SPECS, Array, Candidate, Context, Spec
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.bandit.model.thompson_sampling import CHALLENGER, CHAMPION, OTHER, best
from app.stores.sql.database import Connection, named_rows
from app.stores.sql.decision_rows import decision_of

# In the order in which each user's decisions were learned, except for those that workers learned at the same time: each
# takes the time before it waits for the user's lock.
SELECT_DECISIONS = """
SELECT tip_scores.*, (SELECT MIN(seq) FROM decision_events WHERE decision_events.user_id = tip_scores.user_id
    AND decision_events.number = tip_scores.number AND outcome = 'learned') AS learned_by
FROM tip_scores ORDER BY settled_at_ms, learned_by
"""
NEAR = 3
SELECT_LEARNED = "SELECT user_id, phi, reward, request, chosen FROM tip_scores WHERE state = 'learned'"
SELECT_STATES = "SELECT user_id, spec_hash, evidence, decisions FROM bandit_states"


def learning_faults(learned: Iterable[tuple[Any, ...]], states: Iterable[tuple[Any, ...]]) -> list[str]:
    """One line for each user whose statistics are wrong, given the rows of both statements. A decision that was logged
    with fewer inputs than its user's statistics have is learned with all of them."""
    decisions: dict[str, list[tuple[Any, float, str, int]]] = {}
    for user_id, phi, *others in learned:
        decisions.setdefault(user_id, []).append((np.frombuffer(phi), *others))
    faults: list[str] = []
    for user_id, spec_hash, blob, count in states:
        own = decisions.pop(user_id, [])
        evidence = SufficientStatistics.unpack(SPECS[spec_hash], blob, count)
        stored = evidence.leading(evidence.spec.size)
        s, y = map(np.zeros_like, stored)
        for logged, reward, request, chosen in own:
            phi = np.concatenate([logged, _full(request, chosen, SPECS[spec_hash])[len(logged) :]])
            s += np.outer(phi, phi)
            y += reward * phi
        if count != len(own):
            faults.append(f"{user_id}: statistics of {count} decisions, but {len(own)} are learned")
        elif not all(np.allclose(one, other, atol=1e-9) for one, other in zip(stored, (s, y), strict=True)):
            faults.append(f"{user_id}: the statistics are not the sum over {count} decisions")
    faults += [
        f"{user_id}: {len(own)} decisions are learned, but there are no statistics"
        for user_id, own in decisions.items()
    ]
    return faults


def _full(request: str, chosen: int, spec: Spec) -> Array:
    """The input vector (D,) of the chosen candidate, from the request as stored."""
    stored = json.loads(request)
    candidates = msgspec.convert(stored["candidates"], list[Candidate])
    context = msgspec.convert({**stored["context"], "at": stored["at"]}, Context)
    return np.asarray(spec.phi(candidates, context, stored["profile"])[chosen], np.float64)


def shadow_faults(connection: Connection) -> list[str]:
    """One line for each learned decision without a shadow, and for each wrong shadow. The log is replayed: the
    statistics that a decision was made from are the sum over the user's first `state_version` learned decisions. The
    last and next `NEAR` of them may have been learned in another order."""
    rows = named_rows(connection, SELECT_DECISIONS, ())
    priors = {
        row["version"]: np.frombuffer(row["mu"]) for row in named_rows(connection, "SELECT * FROM bandit_priors", ())
    }
    learned: dict[str, list[tuple[Any, float]]] = {row["user_id"]: [] for row in rows}
    for row in rows:
        if row["state"] == "learned":
            learned[row["user_id"]].append((np.frombuffer(row["phi"]), row["reward"]))
    faults = []
    for row in rows:
        if row["champion_p"] is None:
            faults += [f"{row['decision_id']}: learned without a shadow"] if row["state"] == "learned" else []
            continue
        decision, mu = decision_of(row), priors.get(row["prior_version"], np.zeros(SPEC_V2.size))
        possible = _possible_statistics(learned[decision.user_id], decision.state_version)
        if not any(_is_shadow(row, decision, statistics, mu) for statistics in possible):
            faults.append(f"{decision.id}: the shadow is not that of its statistics")
    return faults


def _possible_statistics(learned: Sequence[tuple[Any, float]], version: int) -> Iterator[SufficientStatistics]:
    begin = max(0, version - NEAR)
    for chosen in combinations(learned[begin : version + NEAR], version - begin):
        statistics = SufficientStatistics.none(SPEC_V2)
        for phi, reward in (*learned[:begin], *chosen):
            statistics = statistics.learned(phi, reward)
        yield statistics


def _is_shadow(row: Mapping[str, Any], decision: Decision, statistics: SufficientStatistics, mu: Array) -> bool:
    """Whether the stored rankings and terms of the estimates are those of a decision made from these statistics."""
    phi = SPEC_V2.phi(decision.candidates, decision.context, decision.profile)
    terms = [float(np.clip(phi @ mu, 0, 1)[decision.chosen])]
    expected = []
    rankings = {decision.role: decision.ranking, OTHER[decision.role]: decision.shadow}
    for policy, ranking in ((CHAMPION, rankings["champion"]), (CHALLENGER, rankings["challenger"])):
        expected.append(policy.decide(decision.id, statistics, mu, phi, decision.explore)[0])
        terms += [expected[-1].pi[decision.chosen], float(expected[-1].pi @ np.clip(phi @ mu, 0, 1))]
        if ranking is None or not np.allclose(ranking, expected[-1], rtol=0, atol=1e-9):
            return False
    stored = [row[name] for name in ("q_logged", "champion_p", "v_champion", "challenger_p", "v_challenger")]
    agree = best(expected[0].scores) == best(expected[1].scores)
    return np.allclose(stored, terms, rtol=0, atol=1e-9) and row["agree"] == agree
