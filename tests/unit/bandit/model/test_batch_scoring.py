"""Batch scoring gives what each decision would be by itself."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from app.bandit.decisions import Ranking
from app.bandit.model.policies import Policies
from app.bandit.model.specs import SPEC_V2
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.bandit.model.thompson_sampling import CHALLENGER, CHAMPION, Policy, ScoringCase, answered_ranking, best, choose
from app.bandit.shadow.scores import Unshadowed, shadows_of
from app.stores.sql.decision_rows import array
from tests.support.score_requests import request_factors, request_of


def case(seed: int, candidates: int) -> ScoringCase:
    """A user with up to six learned decisions, and a request."""
    random = np.random.default_rng(seed)
    statistics = SufficientStatistics.none(SPEC_V2)
    for number in range(seed % 7):
        statistics = statistics.learned(request_of(seed + number, 3)[0], float(random.random()))
    mu = random.normal(0, 0.1, SPEC_V2.size)
    return ScoringCase(f"decision-{seed}", statistics, mu, request_of(seed, candidates))


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 10_000), min_size=1, max_size=9),
    st.integers(1, 25),
    st.sampled_from([CHAMPION, CHALLENGER]),
)
def test_batch_results_are_those_of_each_decision(seeds: list[int], candidates: int, policy: Policy) -> None:
    cases = [case(seed, candidates) for seed in seeds]
    for item, found in zip(cases, policy.decide_batch(cases), strict=True):
        expected = policy.decide(*item)
        np.testing.assert_allclose(found.scores, expected.means, atol=1e-12)
        np.testing.assert_allclose(found.pi, expected.pi, atol=1e-12)


def decided(seed: int, candidates: int, *, challenger: bool, explore: bool) -> Unshadowed:
    made = case(seed, candidates)
    policy = CHALLENGER if challenger else CHAMPION
    scored = policy.decide(*made)
    ranking = answered_ranking(scored.means, scored.pi, explore)
    return Unshadowed(
        made.decision_id,
        "challenger" if challenger else "champion",
        explore,
        choose(ranking, made.decision_id, explore),
        seed,
        ranking,
        made.statistics,
        made.mu,
        request_factors(seed, candidates),
    )


def test_shadows_of_different_decisions_are_computed_together() -> None:
    group = [decided(seed, 1 + seed % 3, challenger=seed % 2 == 0, explore=seed % 5 > 0) for seed in range(40)]
    shadows = {shadow.decision_id: shadow for shadow in shadows_of(group, Policies.of(shadow=True))}
    assert len(shadows) == len(group)
    for item in group:
        shadow = shadows[item.decision_id]
        champion = Ranking(array(shadow.champion_scores), array(shadow.champion_pi))
        challenger = Ranking(array(shadow.challenger_scores), array(shadow.challenger_pi))
        own, other = (champion, challenger) if item.role == "champion" else (challenger, champion)
        assert all(map(np.array_equal, own, item.own))
        policy = CHALLENGER if item.role == "champion" else CHAMPION
        phi = SPEC_V2.phi_from(*item.factors)
        scored = policy.decide(item.decision_id, item.statistics, item.mu, phi)
        expected = answered_ranking(scored.means, scored.pi, item.explore)
        np.testing.assert_allclose(other.scores, expected.scores, atol=1e-11)
        np.testing.assert_allclose(other.pi, expected.pi, atol=1e-12)
        assert abs(other.pi.sum() - 1) < 1e-12
        q = np.clip(phi @ item.mu, 0, 1)
        np.testing.assert_allclose(shadow.q_logged, q[item.chosen])
        np.testing.assert_allclose(shadow.v_champion, champion.pi @ q)
        np.testing.assert_allclose(shadow.v_challenger, challenger.pi @ q)
        assert (shadow.champion_p, shadow.challenger_p) == (champion.pi[item.chosen], challenger.pi[item.chosen])
        assert shadow.agree == (best(champion.scores) == best(challenger.scores))
        assert shadow.elapsed_us == item.elapsed_us
