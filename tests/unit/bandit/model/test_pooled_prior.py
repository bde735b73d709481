"""The prior pooled from the statistics of all users."""

import numpy as np
import pytest

from app.bandit.model.inputs import SPEC_V1, SPEC_V2, Spec
from app.bandit.model.sufficient_statistics import SHRINKAGE, Prior, SufficientStatistics, can_be_pooled, pooled_mean
from tests.support.score_requests import MORNING, history_of, pool_of, taught, tip


def test_prior_is_all_zeros_when_nothing_is_pooled() -> None:
    first = Prior.none(SPEC_V2)
    assert (first.version, first.users, first.decisions) == (0, 0, 0)
    assert first.mu.tolist() == pooled_mean(SufficientStatistics.none(SPEC_V2)).tolist() == [0.0] * SPEC_V2.size


def test_mean_is_the_ridge_regression_over_all_decisions() -> None:
    histories = [history_of(seed, 12) for seed in range(5)]
    pool = pool_of(taught(phi, rewards) for phi, rewards in histories)
    rows = np.vstack([*(phi for phi, _ in histories), np.sqrt(SHRINKAGE) * np.eye(SPEC_V2.size)])
    wanted = np.concatenate([*(rewards for _, rewards in histories), np.zeros(SPEC_V2.size)])
    np.testing.assert_allclose(pooled_mean(pool), np.linalg.lstsq(rows, wanted)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("decisions", [1, 9, 10, 11, 400])
def test_prior_is_refused_when_no_decisions_can_teach_it(decisions: int) -> None:
    """All alike, with the greatest reward: at 10, which is Λ₀'s diagonal, they reach the bound."""
    phi = np.zeros((decisions, SPEC_V2.size))
    phi[:, 0] = 1
    mean = pooled_mean(pool_of([taught(phi, np.ones(decisions))]))
    assert can_be_pooled(mean, decisions)
    assert can_be_pooled(mean * 1.001, decisions) is (decisions != 10)
    for wrong in (np.nan, np.inf, -np.inf, 1e300, decisions):
        assert not can_be_pooled(np.array([0.0, wrong]), decisions)


def test_pool_is_the_same_when_users_are_added_in_groups() -> None:
    each = [taught(*history_of(seed, 6)) for seed in range(7)]
    one, groups = pool_of(each), SufficientStatistics.none(SPEC_V2)
    groups = groups.plus([statistics.pack() for statistics in each[:4]], 24)
    groups = groups.plus([statistics.pack() for statistics in each[4:]], 18)
    np.testing.assert_allclose(pooled_mean(one), pooled_mean(groups), rtol=1e-10)
    assert one.decisions == groups.decisions == 42


@pytest.mark.parametrize(("pool", "other"), [(SPEC_V2, SPEC_V1), (SPEC_V1, SPEC_V2)])
def test_statistics_are_refused_when_the_pool_is_of_another_spec(pool: Spec, other: Spec) -> None:
    with pytest.raises(ValueError, match="reshape"):
        SufficientStatistics.none(pool).plus([SufficientStatistics.none(other).pack()], 0)


def test_pool_finds_the_effect_of_a_profile_feature_when_no_user_could() -> None:
    """Each user's profile is constant, so one user cannot tell its effect from a preference of their own."""
    random = np.random.default_rng(5)
    place = SPEC_V2.names.index("completion_x_priority")
    users = []
    for _ in range(300):
        completes, own = float(random.random()), random.normal(0, 0.1)
        profile = {"completion_rate_30d": completes, "tip_volume_30d": 50}
        tips = [tip("", False, 3.0, float(p)) for p in random.integers(0, 5, 20)]
        phi = SPEC_V2.phi(tips, MORNING, profile)
        expected = 0.4 + phi[:, place] / 2 + own * phi[:, 3]
        users.append(taught(phi, (random.random(20) < expected).astype(float)))
    mean = pooled_mean(pool_of(users))
    assert mean[place] == pytest.approx(0.5, abs=0.15)
    assert np.abs(np.delete(mean, [0, place])).max() < 0.15
