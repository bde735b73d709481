"""Means, confidence widths and draws, compared with an independent implementation: MABWiser, with λ = 1."""

from __future__ import annotations

import numpy as np
import pytest

from app.bandit.model.inputs import SPEC_V1, Array
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.bandit.model.thompson_sampling import CHAMPION, SCALE, noise, roots
from tests.support.score_requests import history_of, precision_of, request_of, taught, variances

pytestmark = pytest.mark.slow  # importing it takes seconds

PHI, REWARDS = history_of(11, 60, SPEC_V1)
ASKED = request_of(12, 20, SPEC_V1)
STATISTICS = taught(PHI, REWARDS, SufficientStatistics.none(SPEC_V1))
NO_PRIOR = np.zeros(SPEC_V1.size)


def expectations(policy: str, asked: Array = ASKED, **constants: float) -> Array:
    """MABWiser's expectations for each row. One arm, since candidates differ by their features."""
    from mabwiser.mab import MAB, LearningPolicy  # noqa: PLC0415

    bandit = MAB(["tip"], getattr(LearningPolicy, policy)(l2_lambda=1.0, **constants), seed=7)
    bandit.fit(["tip"] * len(REWARDS), REWARDS, PHI)
    return np.array([found["tip"] for found in bandit.predict_expectations(asked)])


def test_means_are_those_of_lin_greedy() -> None:
    ranking, _ = CHAMPION.decide("d", STATISTICS, NO_PRIOR, ASKED, explore=False)
    np.testing.assert_allclose(ranking.scores, expectations("LinGreedy", epsilon=0.0), rtol=1e-9, atol=1e-12)


def test_deviations_are_those_of_lin_ucb() -> None:
    ranking, _ = CHAMPION.decide("d", STATISTICS, NO_PRIOR, ASKED, explore=False)
    bounds = ranking.scores + 1.5 * np.sqrt(variances(CHAMPION, STATISTICS, ASKED))
    np.testing.assert_allclose(bounds, expectations("LinUCB", alpha=1.5), rtol=1e-9)


def test_draws_are_distributed_as_those_of_lin_ts() -> None:
    draws = 20_000
    _, theta = CHAMPION.decide("d", STATISTICS, NO_PRIOR, ASKED, explore=False)
    precision = precision_of(CHAMPION, STATISTICS)
    for row in ASKED[:4]:
        theirs = expectations("LinTS", np.tile(row, (draws, 1)), alpha=SCALE)
        one = row[None]
        ours = (one @ theta)[0] + SCALE * (roots(precision, one).T @ noise("d", SPEC_V1.size, draws))[0]
        deviation = SCALE * np.sqrt(variances(CHAMPION, STATISTICS, one)[0])
        assert ours.mean() == pytest.approx(theirs.mean(), abs=6 * deviation / np.sqrt(draws))
        assert ours.std() == pytest.approx(theirs.std(), rel=6 / np.sqrt(draws))
        assert deviation == pytest.approx(theirs.std(), rel=4 / np.sqrt(draws))
