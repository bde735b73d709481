"""The prior that all users together teach."""

from __future__ import annotations

import numpy as np
import pytest

from app.bandit.model.inputs import Candidate
from app.bandit.model.pooled_prior import SHRINKAGE, Pool, Prior, can_be_pooled
from app.bandit.model.specs import SPEC_V1, SPEC_V2, Spec
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.errors import SpecMismatch
from tests.support.score_requests import MORNING, history_of, taught

OLD = SPEC_V1.size


def test_prior_is_all_zeros_when_nothing_is_pooled() -> None:
    first = Prior.none(SPEC_V2)
    assert (first.version, first.users, first.decisions) == (0, 0, 0)
    assert first.mu.tolist() == Pool(SPEC_V2).mean().tolist() == [0.0] * SPEC_V2.size


def test_mean_is_the_ridge_regression_over_everybodys_decisions() -> None:
    histories = [history_of(seed, 12) for seed in range(5)]
    pool = Pool(SPEC_V2)
    for phi, rewards in histories:
        pool.add(taught(phi, rewards, SufficientStatistics.none(SPEC_V2)))
    rows = np.vstack([*(phi for phi, _ in histories), np.sqrt(SHRINKAGE) * np.eye(SPEC_V2.size)])
    wanted = np.concatenate([*(rewards for _, rewards in histories), np.zeros(SPEC_V2.size)])
    np.testing.assert_allclose(pool.mean(), np.linalg.lstsq(rows, wanted)[0], rtol=1e-9, atol=1e-12)
    prior = pool.prior(3, now_ms=77)
    assert (prior.version, prior.spec_hash, prior.users, prior.decisions, prior.created_at_ms) == (
        3,
        SPEC_V2.hash,
        5,
        60,
        77,
    )
    assert prior.mu.tolist() == pool.mean().tolist()


@pytest.mark.parametrize("decisions", [1, 9, 10, 11, 400])
def test_no_decisions_teach_more_than_what_can_be_pooled(decisions: int) -> None:
    """All alike, with the greatest reward: at 10, which is Λ₀'s diagonal, they reach the bound."""
    phi = np.zeros((decisions, SPEC_V2.size))
    phi[:, 0] = 1
    pool = Pool(SPEC_V2)
    pool.add(taught(phi, np.ones(decisions), SufficientStatistics.none(SPEC_V2)))
    assert can_be_pooled(pool.mean(), decisions)
    assert can_be_pooled(pool.mean() * 1.001, decisions) is (decisions != 10)
    for wrong in (np.nan, np.inf, -np.inf, 1e300, decisions):
        assert not can_be_pooled(np.array([0.0, wrong]), decisions)


def test_evidence_that_has_not_grown_counts_as_grown() -> None:
    phi, rewards = history_of(1, 10)
    short = taught(phi[:, :OLD], rewards, SufficientStatistics.none(SPEC_V1))
    long = taught(*history_of(2, 10), SufficientStatistics.none(SPEC_V2))
    one, other = Pool(SPEC_V2), Pool(SPEC_V2)
    one.add(short)
    one.add(long)
    other.add(short.grown(SPEC_V1, SPEC_V2))
    other.add(long)
    assert one.mean().tolist() == other.mean().tolist()


@pytest.mark.parametrize("spec", [SPEC_V1, SPEC_V2])
def test_evidence_as_stored_counts_as_when_it_comes_one_by_one(spec: Spec) -> None:
    each = [taught(*history_of(seed, 6, spec), SufficientStatistics.none(spec)) for seed in range(7)]
    one, all_at_once = Pool(SPEC_V2), Pool(SPEC_V2)
    for evidence in each:
        one.add(evidence)
    all_at_once.add_packed(spec.hash, [evidence.pack() for evidence in each[:4]], 24)
    all_at_once.add_packed(spec.hash, [evidence.pack() for evidence in each[4:]], 18)
    np.testing.assert_allclose(one.mean(), all_at_once.mean(), rtol=1e-10)
    assert (one.users, one.decisions) == (all_at_once.users, all_at_once.decisions) == (7, 42)


def test_evidence_is_refused_when_the_pool_cannot_be_of_its_spec() -> None:
    strange = Spec("others", 1, SPEC_V1.inputs)
    with pytest.raises(SpecMismatch, match="does not belong to this pool"):
        Pool(SPEC_V2).add(SufficientStatistics.none(strange))
    with pytest.raises(SpecMismatch, match="does not belong to this pool"):
        Pool(SPEC_V2).add_packed(strange.hash, [], 0)
    with pytest.raises(SpecMismatch, match="does not belong to this pool"):
        Pool(SPEC_V1).add(SufficientStatistics.none(SPEC_V2))
    with pytest.raises(SpecMismatch, match="does not belong to this pool"):
        Pool(SPEC_V1).add_packed(SPEC_V2.hash, [], 0)


def test_pool_finds_what_a_profile_is_worth_when_no_user_could() -> None:
    """Each user's profile stays the same, so alone they cannot tell its effect from their own liking."""
    random = np.random.default_rng(5)
    pool = Pool(SPEC_V2)
    place = SPEC_V2.names.index("completion_x_priority")
    for _ in range(300):
        completes, own = float(random.random()), random.normal(0, 0.1)
        profile = {"completion_rate_30d": completes, "tip_volume_30d": 50}
        tips = [Candidate("", False, 3.0, float(p)) for p in random.integers(0, 5, 20)]
        phi = SPEC_V2.phi(tips, MORNING, profile)
        expected = 0.4 + phi[:, place] / 2 + own * phi[:, 3]
        rewards = (random.random(20) < expected).astype(float)
        pool.add(taught(phi, rewards, SufficientStatistics.none(SPEC_V2)))
    mean = pool.mean()
    assert mean[place] == pytest.approx(0.5, abs=0.15)
    assert np.abs(np.delete(mean, [0, place])).max() < 0.15
