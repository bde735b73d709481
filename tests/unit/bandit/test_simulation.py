"""The gain of the pooled prior when rewards follow other formulas than v2 (`tests.bench.bandit_simulation`)."""

import numpy as np
import pytest

from app.bandit.model.inputs import SPEC_V1, SPEC_V2
from app.bandit.model.sufficient_statistics import SufficientStatistics, pooled_mean
from app.bandit.model.thompson_sampling import CHALLENGER
from tests.bench.bandit_simulation import (
    PARTS,
    SCENARIOS,
    V1,
    V2,
    Growth,
    Learners,
    Lift,
    Size,
    features,
    lift,
    run,
    shared,
    simulated_users,
)
from tests.support.score_requests import history_of, pool_of, request_of, variances


def test_vectorised_learning_is_the_policys() -> None:
    learners = Learners(V2, np.array([0, 0, 1]))
    statistics = [SufficientStatistics.none(SPEC_V2)] * 3
    for turn in range(30):
        users = np.array([0, 1, 2] if turn % 2 else [0, 2])
        phi, rewards = history_of(turn, len(users))
        learners.learn(users, phi, rewards)
        for user, row, reward in zip(users, phi, rewards, strict=True):
            statistics[user] = statistics[user].learned(row, float(reward))
    learners.refresh()
    pools = [pool_of(statistics[:2]), pool_of(statistics[2:])]
    asked = np.stack([request_of(user, 5) for user in range(3)])
    means, covariances = learners.scores(np.arange(3), asked)
    for user, known in enumerate(statistics):
        mu = pooled_mean(pools[user // 2])
        np.testing.assert_allclose(learners.mu[user // 2], mu, rtol=1e-9, atol=1e-12)
        ranking, _ = CHALLENGER.decide("d", known, mu, asked[user], explore=True)
        np.testing.assert_allclose(means[user], ranking.scores, rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(np.diag(covariances[user]), variances(CHALLENGER, known, asked[user]), rtol=1e-8)


@pytest.fixture(scope="module")
def lifts() -> dict[tuple[str, str], Lift]:
    size = Size(populations=10, users=120, rounds=50)
    at = simulated_users(size, seed=1)
    one, two = features(at, SPEC_V1), features(at, SPEC_V2)
    found = {}
    for name, rewards in SCENARIOS.items():
        expected = rewards(at)
        first, second = run(V1, at, one, expected, size.refresh), run(V2, at, two, expected, size.refresh)
        found.update({(name, label): lift(at, first, second, part) for label, part in PARTS.items()})
    return found


@pytest.mark.slow
def test_replay_earns_more_than_padding_when_users_began_under_v1() -> None:
    size, rounds = Size(populations=20, users=120, rounds=60), 40
    at = simulated_users(size, seed=1)
    at = at._replace(start=np.zeros_like(at.start))
    phi, expected = features(at, SPEC_V2), shared(at)
    stayed = run(V1, at, features(at, SPEC_V1), expected, size.refresh)
    padded, replayed = (run(V2, at, phi, expected, size.refresh, Growth(rounds, way)) for way in (False, True))
    for got in (padded, replayed):
        np.testing.assert_array_equal(got[:, :rounds], stayed[:, :rounds])
    gain = lift(at, padded, replayed, slice(rounds, None))
    assert gain.mean > 3 * gain.error


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["shared", "shared_linear", "main_only"])
def test_v2_earns_more_in_first_decisions_when_users_have_something_in_common(
    scenario: str, lifts: dict[tuple[str, str], Lift]
) -> None:
    found = lifts[scenario, "first 20"]
    assert found.mean > max(0.003, 3 * found.error)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_v2_loses_no_more_than_noise_in_any_scenario(scenario: str, lifts: dict[tuple[str, str], Lift]) -> None:
    for part in PARTS:
        found = lifts[scenario, part]
        assert found.mean >= -3 * found.error
        assert found.error < 0.005  # larger noise could hide a loss
