"""Linear Thompson sampling: correct means, exact propensities, and a champion that growth does not change."""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from app.bandit.model import thompson_sampling
from app.bandit.model.definitions import NEW_PRECISION
from app.bandit.model.inputs import SPEC_V1, SPEC_V2, Array, Input, Profile, Spec
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.bandit.model.thompson_sampling import (
    ACTION,
    CHALLENGER,
    CHAMPION,
    DRAWS,
    EPSILON,
    NEW,
    SCALE,
    Policy,
    fill_normal,
    noise,
    propensities,
    roots,
    sample,
    uniform,
)
from app.errors import SpecMismatch
from tests.support.score_requests import (
    MORNING,
    PROFILE,
    history_of,
    precision_of,
    profiles,
    request_of,
    same_bits,
    seeds,
    taught,
    tip,
    variances,
)

OLD: Final = SPEC_V1.size
PLAIN_COLUMNS: Final = Spec(
    "plain",
    1,
    (
        *SPEC_V1.inputs,
        Input("profile_present", shared="profile_present"),
        *(Input(term, shared=term) for term in ("completion", "dismissal", "dwell", "volume", "hour_distance_cos")),
    ),
)


class Decided(NamedTuple):
    scores: Array
    pi: Array
    theta: Array


def decided(
    policy: Policy, decision_id: str, statistics: SufficientStatistics, mu: Array | None, phi: Array
) -> Decided:
    """The result of a decision that explores. Without `mu`, the mean of the prior is 0."""
    mean = np.zeros(policy.spec.size) if mu is None else mu
    ranking, theta = policy.decide(decision_id, statistics, mean, phi, explore=True)
    return Decided(*ranking, theta)


def same(one: Decided, other: Decided) -> bool:
    return all(map(same_bits, one, other))


def mean_of(seed: int) -> Array:
    return np.random.default_rng(seed).normal(0, 0.3, SPEC_V2.size)


@given(seeds, st.integers(0, 5), st.integers(0, 5), st.integers(1, 24))
def test_champion_answers_bit_for_bit_as_without_growth(seed: int, before: int, after: int, count: int) -> None:
    phi, rewards = history_of(seed, before + after)
    asked = request_of(seed, count)
    never = taught(phi[:before, :OLD], rewards[:before], SufficientStatistics.none(SPEC_V1))
    grown = never.grown(SPEC_V2)
    first = decided(CHAMPION, "d", never, None, np.ascontiguousarray(asked[:, :OLD]))
    assert same(decided(CHAMPION, "d", grown, mean_of(seed), asked), first)

    never = taught(phi[before:, :OLD], rewards[before:], never)
    grown = taught(phi[before:], rewards[before:], grown)
    later = decided(CHAMPION, "e", never, None, np.ascontiguousarray(asked[:, :OLD]))
    assert same(decided(CHAMPION, "e", grown, mean_of(seed), asked), later)


@given(seeds, st.integers(0, 20), st.booleans())
def test_challenger_at_growth_has_the_mean_without_a_profile_and_the_derived_variance(
    seed: int, decisions: int, pooled: bool
) -> None:
    phi, rewards = history_of(seed, decisions)
    grown = taught(phi[:, :OLD], rewards, SufficientStatistics.none(SPEC_V1)).grown(SPEC_V2)
    mu = mean_of(seed)
    mu[OLD:] = 0
    asked = request_of(seed)
    without = asked.copy()
    without[:, OLD:] = 0
    scored = decided(CHALLENGER, "d", grown, mu if pooled else None, asked)
    blind = decided(CHALLENGER, "d", grown, mu if pooled else None, without)
    np.testing.assert_allclose(scored.scores, blind.scores, rtol=1e-12, atol=2e-12)

    x, z = asked[:, :OLD], asked[:, OLD:]
    s = phi[:, :OLD].T @ phi[:, :OLD]
    expected = np.einsum("kd,de,ke->k", x, np.linalg.inv(np.eye(OLD) + s), x) + (z**2).sum(axis=1) / NEW_PRECISION
    found = variances(CHALLENGER, grown, asked)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert (np.sqrt(found) <= 1.1 * np.sqrt(variances(CHALLENGER, grown, without))).all()


@given(seeds, st.integers(0, 10))
def test_challenger_at_growth_is_the_champion_without_prior_and_profile(seed: int, decisions: int) -> None:
    phi, rewards = history_of(seed, decisions)
    grown = taught(phi[:, :OLD], rewards, SufficientStatistics.none(SPEC_V1)).grown(SPEC_V2)
    asked = request_of(seed, known=False)
    champion = decided(CHAMPION, "d", grown, None, asked)
    challenger = decided(CHALLENGER, "d", grown, None, asked)
    np.testing.assert_allclose(challenger.scores, champion.scores, rtol=1e-9, atol=2e-12)
    champions = variances(CHAMPION, grown, asked)
    np.testing.assert_allclose(variances(CHALLENGER, grown, asked), champions, rtol=1e-9)
    np.testing.assert_allclose(challenger.pi, champion.pi, rtol=1e-12)


def test_new_inputs_have_their_own_stream() -> None:
    short, long = noise("d", OLD), noise("d", SPEC_V2.size)
    assert short.shape == (OLD, DRAWS)
    assert same_bits(long[:OLD], short)
    new = np.empty((SPEC_V2.size - OLD, DRAWS))
    fill_normal(new, "d", NEW)
    assert same_bits(long[OLD:], new)
    assert not same_bits(noise("e", OLD), short)


@given(seeds, st.integers(0, 40), st.sampled_from([CHAMPION, CHALLENGER]))
def test_means_are_those_of_ridge_regression(seed: int, decisions: int, policy: Policy) -> None:
    phi, rewards = history_of(seed, decisions, policy.spec)
    mu = mean_of(seed) if policy is CHALLENGER else np.zeros(policy.spec.size)
    root = np.sqrt(policy.spec.precisions)
    rows = np.vstack([phi, np.diag(root)])
    weights = np.linalg.lstsq(rows, np.concatenate([rewards, root * mu]))[0]
    asked = request_of(seed, spec=policy.spec)
    statistics = taught(phi, rewards, SufficientStatistics.none(policy.spec))
    scored = decided(policy, "d", statistics, mu, asked)
    np.testing.assert_allclose(scored.theta, weights, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(scored.scores, asked @ weights, rtol=1e-8, atol=1e-10)
    covariance = np.linalg.inv(rows.T @ rows)
    expected = np.einsum("kd,de,ke->k", asked, covariance, asked)
    np.testing.assert_allclose(variances(policy, statistics, asked), expected, rtol=1e-8)


@given(seeds, st.sampled_from([CHAMPION, CHALLENGER]))
@settings(max_examples=20)
def test_propensities_are_the_shares_of_draws_that_each_candidate_wins(seed: int, policy: Policy) -> None:
    statistics = taught(*history_of(seed, 10, policy.spec), SufficientStatistics.none(policy.spec))
    mu = mean_of(seed) if policy is CHALLENGER else None
    asked = request_of(seed, 7, policy.spec)
    scored = decided(policy, "d", statistics, mu, asked)
    root = np.linalg.cholesky(precision_of(policy, statistics))
    wins = np.zeros(7)
    for normals in noise("d", policy.spec.size).T:
        theta = scored.theta + SCALE * np.linalg.solve(root.T, normals)
        wins[np.argmax(asked @ theta)] += 1
    # Two candidates may be the same.
    assume(len(np.unique(asked, axis=0)) == 7)
    np.testing.assert_allclose(scored.pi, (1 - EPSILON) * wins / DRAWS + EPSILON / 7, rtol=1e-12)


def test_drawn_weights_have_the_posterior_distribution() -> None:
    statistics = taught(*history_of(3, 15))
    precision = precision_of(CHALLENGER, statistics)
    draws = 20_000
    drawn = SCALE * roots(precision, np.eye(SPEC_V2.size)).T @ noise("d", SPEC_V2.size, draws)
    wanted = SCALE**2 * np.linalg.inv(precision)
    deviations = np.sqrt(np.diag(wanted))
    assert (np.abs(drawn.mean(axis=1)) < 4.5 * deviations / np.sqrt(draws)).all()
    off = (np.cov(drawn) - wanted) / np.outer(deviations, deviations)
    assert np.abs(off).max() < 6 / np.sqrt(draws)


drawn_scores = st.tuples(st.integers(1, 12), st.integers(1, 40), seeds, st.booleans()).map(
    lambda drawn: (
        np.random.default_rng(drawn[2]).integers(0, 3, drawn[:2]).astype(float)
        if drawn[3]
        else np.random.default_rng(drawn[2]).normal(size=drawn[:2])
    )
)


@given(drawn_scores)
def test_propensities_are_a_distribution_with_a_lower_bound(drawn: Array) -> None:
    count = len(drawn)
    pi = propensities(drawn)
    assert pi.shape == (count,)
    assert pi.sum() == pytest.approx(1, abs=1e-12)
    assert (pi >= EPSILON / count).all()
    assert (1 / pi <= count / EPSILON).all()


@given(drawn_scores, seeds)
def test_propensities_are_permuted_with_their_candidates(drawn: Array, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(drawn))
    np.testing.assert_allclose(propensities(drawn[order]), propensities(drawn)[order], rtol=1e-12)


def test_candidates_that_tie_share_their_probability() -> None:
    drawn = np.array([[1.0, 0.0, 2.0, 5.0], [1.0, 0.0, 2.0, 1.0], [0.0, 1.0, 2.0, 1.0]])
    expected = 0.9 * np.array([1 / 2 + 1 / 3 + 1, 1 / 2 + 1 / 3, 1 + 1 / 3]) / 4 + 0.1 / 3
    np.testing.assert_allclose(propensities(drawn), expected, rtol=1e-12)


@given(seeds, st.integers(1, 20), st.integers(0, 10), st.sampled_from([CHAMPION, CHALLENGER]))
def test_order_of_candidates_does_not_matter_even_if_some_are_equal(
    seed: int, count: int, decisions: int, policy: Policy
) -> None:
    statistics = taught(*history_of(seed, decisions))
    asked = request_of(seed, count)
    asked = np.vstack([asked, asked[: count // 2]])
    order = np.random.default_rng(seed).permutation(len(asked))
    one = decided(policy, "d", statistics, mean_of(seed), asked)
    other = decided(policy, "d", statistics, mean_of(seed), asked[order])
    for name in ("scores", "pi"):
        np.testing.assert_allclose(getattr(other, name), getattr(one, name)[order], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(one.pi[: count // 2], one.pi[count:], rtol=1e-9)


def test_actions_have_the_frequency_of_pi() -> None:
    pi = np.array([0.005, 0.5, 0.095, 0.3, 0.1])
    taken = np.bincount([sample(pi, f"d-{n}") for n in range(20_000)], minlength=5)
    assert ((taken - 20_000 * pi) ** 2 / (20_000 * pi)).sum() < 18.5  # chi-square, 4 degrees of freedom, 0.1 %


@pytest.mark.slow
def test_actions_have_the_frequency_of_pi_when_pi_comes_from_the_same_id() -> None:
    statistics = taught(*history_of(1, 8))
    asked = request_of(2, 5)
    gaps, weights = [], []
    for number in range(1500):
        decision_id = f"d-{number}"
        served = decided(CHAMPION, decision_id, statistics, None, asked)
        shadow = decided(CHALLENGER, decision_id, statistics, mean_of(1), asked)
        action = sample(served.pi, decision_id)
        gaps.append(np.eye(5)[action] - served.pi)
        weights.append(shadow.pi[action] / served.pi[action])
    error = np.std(gaps, axis=0) / np.sqrt(len(gaps))
    assert (np.abs(np.mean(gaps, axis=0)) < 4 * error).all()
    # So the mean importance weight is 1, whatever the other policy is.
    assert np.std(weights) > 0.05
    assert np.mean(weights) == pytest.approx(1, abs=4 * np.std(weights) / np.sqrt(len(weights)))


def test_action_has_its_own_stream() -> None:
    tenths = [int(10 * uniform(f"d-{n}", ACTION)) for n in range(50)]
    assert [sample(np.full(10, 0.1), f"d-{n}") for n in range(50)] == tenths


def test_last_candidate_is_sampled_when_pi_sums_to_less_than_the_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thompson_sampling, "uniform", lambda *_: 1 - 2**-53)
    assert sample(np.array([0.5, 0.5 - 2**-52]), "d") == 1


def test_first_of_the_best_is_chosen_without_exploration() -> None:
    statistics, mu = SufficientStatistics.none(SPEC_V2), np.eye(SPEC_V2.size)[0]
    for means, expected in (([0.1, 0.3, 0.3, 0.2], 1), ([0.1, 0.3 - 1e-15, 0.3, 0.2], 1), ([-2.0], 0)):
        phi = np.outer(means, mu)
        ranking, _ = CHALLENGER.decide("d", statistics, mu, phi, explore=False)
        assert ranking.scores.tolist() == pytest.approx(means)
        assert ranking.pi.tolist() == np.eye(len(means))[expected].tolist()


@given(seeds, profiles, profiles)
def test_profile_cannot_change_the_ranking_without_interactions(seed: int, one: Profile, other: Profile) -> None:
    """A column that is equal for all candidates adds the same to each score. So v2 has interactions."""
    policy = Policy("plain", PLAIN_COLUMNS)
    statistics = taught(*history_of(seed, 12, PLAIN_COLUMNS), SufficientStatistics.none(PLAIN_COLUMNS))
    random = np.random.default_rng(seed)
    tips = [tip("", bool(n % 2), float(random.exponential(9)), float(random.integers(5))) for n in range(6)]
    means = [
        decided(policy, "d", statistics, None, PLAIN_COLUMNS.phi(tips, MORNING, profile)).scores
        for profile in (one, other)
    ]
    np.testing.assert_allclose(means[0] - means[0][0], means[1] - means[1][0], atol=1e-9)


def test_profile_changes_the_ranking_with_a_pooled_prior() -> None:
    mu = np.zeros(SPEC_V2.size)
    mu[SPEC_V2.names.index("completion_x_priority")] = 1.0
    tips = [
        tip("easy", is_overdue=False, task_age_days=2.0, priority=1.0),
        tip("urgent", is_overdue=False, task_age_days=2.0, priority=4.0),
    ]
    statistics = SufficientStatistics.none(SPEC_V2)
    keen = decided(CHALLENGER, "d", statistics, mu, SPEC_V2.phi(tips, MORNING, PROFILE))
    weary = decided(
        CHALLENGER, "d", statistics, mu, SPEC_V2.phi(tips, MORNING, {**PROFILE, "completion_rate_30d": 0.0})
    )
    assert [int(np.argmax(scored.scores)) for scored in (keen, weary)] == [1, 0]
    for profile in (PROFILE, None):
        champion = decided(CHAMPION, "d", statistics, mu, SPEC_V2.phi(tips, MORNING, profile))
        assert champion.scores[0] == champion.scores[1] == 0


def test_many_decisions_outweigh_the_prior() -> None:
    weights = np.linspace(0.2, 0.4, SPEC_V2.size)
    numbers = np.concatenate([1e9 * np.eye(SPEC_V2.size)[np.tril_indices(SPEC_V2.size)], 1e9 * weights])
    statistics = SufficientStatistics(SPEC_V2, numbers, 10**9)
    found = decided(CHALLENGER, "d", statistics, np.full(SPEC_V2.size, 9.0), np.eye(SPEC_V2.size))
    np.testing.assert_allclose(found.theta, weights, atol=1e-3)
    np.testing.assert_allclose(variances(CHALLENGER, statistics, np.eye(SPEC_V2.size)), 1e-9, rtol=1e-3)


@pytest.mark.parametrize(
    ("policy", "statistics"),
    [
        (CHALLENGER, SufficientStatistics.none(SPEC_V1)),
        (CHAMPION, SufficientStatistics.none(msgspec.structs.replace(SPEC_V1, inputs=SPEC_V1.inputs[::-1]))),
    ],
)
def test_statistics_are_refused_when_the_policy_cannot_read_them(
    policy: Policy, statistics: SufficientStatistics
) -> None:
    with pytest.raises(SpecMismatch, match="cannot read statistics"):
        decided(policy, "d", statistics, None, request_of(1))


def test_vectors_and_means_of_a_shorter_spec_are_refused() -> None:
    statistics = SufficientStatistics.none(SPEC_V2)
    for mu, phi in ((None, request_of(1, spec=SPEC_V1)), (np.zeros(6), request_of(1))):
        with pytest.raises(ValueError, match="25"):
            decided(CHALLENGER, "d", statistics, mu, phi)
