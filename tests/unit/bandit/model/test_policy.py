"""Linear Thompson sampling: right means, exact propensities, and a champion that growth does not touch."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from app.bandit.model import random_streams
from app.bandit.model.inputs import Array, Candidate, Profile
from app.bandit.model.policy import (
    CHALLENGER,
    CHAMPION,
    DRAWS,
    EPSILON,
    SCALE,
    Policy,
    Posterior,
    Scored,
    contributions,
    noise,
    propensities,
    sample,
)
from app.bandit.model.ranking import chosen, ranking_of
from app.bandit.model.specs import NEW_PRECISION, SPEC_V1, SPEC_V2, Input, Spec
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.errors import SpecMismatch
from tests.support.score_requests import (
    KEEN,
    MORNING,
    history_of,
    profiles,
    request_of,
    same_bits,
    seeds,
    taught,
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


def same(one: Scored, other: Scored) -> bool:
    """To the last bit."""
    return all(same_bits(getattr(one, name), getattr(other, name)) for name in ("means", "pi", "theta"))


def mean_of(seed: int) -> Array:
    return np.random.default_rng(seed).normal(0, 0.3, SPEC_V2.size)


@given(seeds, st.integers(0, 5), st.integers(0, 5), st.integers(1, 24))
def test_champion_answers_bit_for_bit_as_a_v1_that_never_grew(seed: int, before: int, after: int, count: int) -> None:
    phi, rewards = history_of(seed, before + after)
    asked = request_of(seed, count)
    never = taught(phi[:before, :OLD], rewards[:before], SufficientStatistics.none(SPEC_V1))
    grown = never.grown(SPEC_V1, SPEC_V2)
    first = CHAMPION.decide("d", never, None, np.ascontiguousarray(asked[:, :OLD]))
    assert same(CHAMPION.decide("d", grown, mean_of(seed), asked), first)

    never = taught(phi[before:, :OLD], rewards[before:], never)
    grown = taught(phi[before:], rewards[before:], grown)
    later = CHAMPION.decide("e", never, None, np.ascontiguousarray(asked[:, :OLD]))
    assert same(CHAMPION.decide("e", grown, mean_of(seed), asked), later)


@given(seeds, st.integers(0, 20), st.booleans())
def test_challengers_mean_at_growth_does_not_depend_on_the_profile_and_its_variance_is_the_formulas(
    seed: int, decisions: int, pooled: bool
) -> None:
    phi, rewards = history_of(seed, decisions)
    grown = taught(phi[:, :OLD], rewards, SufficientStatistics.none(SPEC_V1)).grown(SPEC_V1, SPEC_V2)
    mu = mean_of(seed)
    mu[OLD:] = 0
    asked = request_of(seed)
    without = asked.copy()
    without[:, OLD:] = 0
    scored = CHALLENGER.decide("d", grown, mu if pooled else None, asked)
    blind = CHALLENGER.decide("d", grown, mu if pooled else None, without)
    np.testing.assert_allclose(scored.means, blind.means, rtol=1e-12, atol=1e-12)

    x, z = asked[:, :OLD], asked[:, OLD:]
    s = phi[:, :OLD].T @ phi[:, :OLD]
    expected = np.einsum("kd,de,ke->k", x, np.linalg.inv(np.eye(OLD) + s), x) + (z**2).sum(axis=1) / NEW_PRECISION
    found = variances(CHALLENGER, grown, mu, asked)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert (np.sqrt(found) <= 1.1 * np.sqrt(variances(CHALLENGER, grown, mu, without))).all()


@given(seeds, st.integers(0, 10))
def test_challenger_without_prior_and_profile_draws_at_growth_as_the_champion_does(seed: int, decisions: int) -> None:
    phi, rewards = history_of(seed, decisions)
    grown = taught(phi[:, :OLD], rewards, SufficientStatistics.none(SPEC_V1)).grown(SPEC_V1, SPEC_V2)
    asked = request_of(seed, known=False)
    champion = CHAMPION.decide("d", grown, None, asked)
    challenger = CHALLENGER.decide("d", grown, None, asked)
    np.testing.assert_allclose(challenger.means, champion.means, rtol=1e-9, atol=1e-12)
    champions = variances(CHAMPION, grown, None, asked)
    np.testing.assert_allclose(variances(CHALLENGER, grown, None, asked), champions, rtol=1e-9)
    np.testing.assert_allclose(challenger.pi, champion.pi, rtol=1e-12)


def test_new_dimensions_are_drawn_from_a_stream_of_their_own() -> None:
    short, long = noise("d", OLD), noise("d", SPEC_V2.size)
    assert short.shape == (OLD, DRAWS)
    assert same_bits(long[:OLD], short)
    new = np.empty((SPEC_V2.size - OLD, DRAWS))
    random_streams.fill_normal(new, "d", random_streams.NEW)
    assert same_bits(long[OLD:], new)
    assert not same_bits(noise("e", OLD), short)


@given(seeds, st.integers(0, 40), st.sampled_from([CHAMPION, CHALLENGER]))
def test_means_are_those_of_closed_form_ridge_regression(seed: int, decisions: int, policy: Policy) -> None:
    phi, rewards = history_of(seed, decisions, policy.spec)
    mu = mean_of(seed) if policy is CHALLENGER else np.zeros(policy.spec.size)
    root = np.sqrt(policy.spec.precisions)
    rows = np.vstack([phi, np.diag(root)])
    weights = np.linalg.lstsq(rows, np.concatenate([rewards, root * mu]))[0]
    asked = request_of(seed, spec=policy.spec)
    evidence = taught(phi, rewards, SufficientStatistics.none(policy.spec))
    scored = policy.decide("d", evidence, mu, asked)
    np.testing.assert_allclose(scored.theta, weights, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(scored.means, asked @ weights, rtol=1e-8, atol=1e-10)
    covariance = np.linalg.inv(rows.T @ rows)
    expected = np.einsum("kd,de,ke->k", asked, covariance, asked)
    np.testing.assert_allclose(variances(policy, evidence, mu, asked), expected, rtol=1e-8)


@given(seeds, st.sampled_from([CHAMPION, CHALLENGER]))
@settings(max_examples=20)
def test_propensities_are_exact_when_every_draw_is_taken_by_itself(seed: int, policy: Policy) -> None:
    evidence = taught(*history_of(seed, 10, policy.spec), SufficientStatistics.none(policy.spec))
    mu = mean_of(seed) if policy is CHALLENGER else None
    asked = request_of(seed, 7, policy.spec)
    scored = policy.decide("d", evidence, mu, asked)
    root = np.linalg.cholesky(evidence.s + np.diag(policy.spec.precisions))
    wins = np.zeros(7)
    for normals in noise("d", policy.spec.size).T:
        theta = scored.theta + SCALE * np.linalg.solve(root.T, normals)
        wins[np.argmax(asked @ theta)] += 1
    # Two candidates may be the same.
    assume(len(np.unique(asked, axis=0)) == 7)
    np.testing.assert_allclose(scored.pi, (1 - EPSILON) * wins / DRAWS + EPSILON / 7, rtol=1e-12)


def test_drawn_weights_are_distributed_as_the_posterior_is() -> None:
    evidence = taught(*history_of(3, 15), SufficientStatistics.none(SPEC_V2))
    posterior = CHALLENGER.posterior(evidence, mean_of(3))
    every = np.eye(SPEC_V2.size)
    draws = 20_000
    drawn = SCALE * posterior.roots(every).T @ noise("d", SPEC_V2.size, draws)
    wanted = SCALE**2 * np.linalg.inv(evidence.s + np.diag(SPEC_V2.precisions))
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
def test_propensities_are_a_distribution_with_a_floor(drawn: Array) -> None:
    count = len(drawn)
    pi = propensities(drawn)
    assert pi.shape == (count,)
    assert pi.sum() == pytest.approx(1, abs=1e-12)
    assert (pi >= EPSILON / count).all()
    assert (1 / pi <= count / EPSILON).all()


@given(drawn_scores, seeds)
def test_propensities_move_with_their_candidates(drawn: Array, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(drawn))
    np.testing.assert_allclose(propensities(drawn[order]), propensities(drawn)[order], rtol=1e-12)


def test_candidates_that_tie_share_their_probability() -> None:
    drawn = np.array([[1.0, 0.0, 2.0, 5.0], [1.0, 0.0, 2.0, 1.0], [0.0, 1.0, 2.0, 1.0]])
    expected = 0.9 * np.array([1 / 2 + 1 / 3 + 1, 1 / 2 + 1 / 3, 1 + 1 / 3]) / 4 + 0.1 / 3
    np.testing.assert_allclose(propensities(drawn), expected, rtol=1e-12)


@given(seeds, st.integers(1, 20), st.integers(0, 10), st.sampled_from([CHAMPION, CHALLENGER]))
def test_the_order_of_candidates_does_not_matter_even_where_some_are_the_same(
    seed: int, count: int, decisions: int, policy: Policy
) -> None:
    evidence = taught(*history_of(seed, decisions), SufficientStatistics.none(SPEC_V2))
    asked = request_of(seed, count)
    asked = np.vstack([asked, asked[: count // 2]])
    order = np.random.default_rng(seed).permutation(len(asked))
    one = policy.decide("d", evidence, mean_of(seed), asked)
    other = policy.decide("d", evidence, mean_of(seed), asked[order])
    for name in ("means", "pi"):
        np.testing.assert_allclose(getattr(other, name), getattr(one, name)[order], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(one.pi[: count // 2], one.pi[count:], rtol=1e-9)


def test_actions_are_taken_as_often_as_pi_says() -> None:
    pi = np.array([0.005, 0.5, 0.095, 0.3, 0.1])
    taken = np.bincount([sample(pi, f"d-{n}") for n in range(20_000)], minlength=5)
    assert ((taken - 20_000 * pi) ** 2 / (20_000 * pi)).sum() < 18.5  # chi-square, 4 degrees of freedom, 0.1 %


def test_actions_are_taken_as_often_as_pi_says_when_pi_is_drawn_from_the_same_id() -> None:
    evidence = taught(*history_of(1, 8), SufficientStatistics.none(SPEC_V2))
    asked = request_of(2, 5)
    gaps, weights = [], []
    for number in range(1500):
        decision_id = f"d-{number}"
        served = CHAMPION.decide(decision_id, evidence, None, asked)
        shadow = CHALLENGER.decide(decision_id, evidence, mean_of(1), asked)
        action = sample(served.pi, decision_id)
        gaps.append(np.eye(5)[action] - served.pi)
        weights.append(shadow.pi[action] / served.pi[action])
    error = np.std(gaps, axis=0) / np.sqrt(len(gaps))
    assert (np.abs(np.mean(gaps, axis=0)) < 4 * error).all()
    # And so an importance weight is 1 on average, whatever the other policy is.
    assert np.std(weights) > 0.05
    assert np.mean(weights) == pytest.approx(1, abs=4 * np.std(weights) / np.sqrt(len(weights)))


def test_action_is_drawn_from_a_stream_of_its_own() -> None:
    tenths = [int(10 * random_streams.uniform(f"d-{n}", random_streams.ACTION)) for n in range(50)]
    assert [sample(np.full(10, 0.1), f"d-{n}") for n in range(50)] == tenths


def test_last_candidate_is_taken_when_rounding_left_a_gap_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_streams, "uniform", lambda *_: 1 - 2**-53)
    assert sample(np.array([0.5, 0.5 - 2**-52]), "d") == 1


def test_first_of_the_best_is_taken_when_exploring_is_not_wanted() -> None:
    for means, expected in (([0.1, 0.3, 0.3, 0.2], 1), ([0.1, 0.3 - 1e-15, 0.3, 0.2], 1), ([-2.0], 0)):
        pi = np.full(len(means), 1 / len(means))
        assert chosen(ranking_of(np.array(means), pi, explore=False), "d", explore=False) == expected


@given(seeds, profiles, profiles)
def test_profile_cannot_change_the_ranking_when_it_enters_as_plain_columns(
    seed: int, one: Profile, other: Profile
) -> None:
    """A column that is equal for all candidates adds the same to each: that is why v2 has interactions."""
    policy = Policy("plain", PLAIN_COLUMNS)
    evidence = taught(*history_of(seed, 12, PLAIN_COLUMNS), SufficientStatistics.none(PLAIN_COLUMNS))
    random = np.random.default_rng(seed)
    tips = [Candidate("", bool(n % 2), float(random.exponential(9)), float(random.integers(5))) for n in range(6)]
    means = [
        policy.decide("d", evidence, None, PLAIN_COLUMNS.phi(tips, MORNING, profile)).means for profile in (one, other)
    ]
    np.testing.assert_allclose(means[0] - means[0][0], means[1] - means[1][0], atol=1e-9)


def test_profile_changes_the_ranking_when_all_users_taught_what_it_is_worth() -> None:
    mu = np.zeros(SPEC_V2.size)
    mu[SPEC_V2.names.index("completion_x_priority")] = 1.0
    tips = [
        Candidate("easy", is_overdue=False, task_age_days=2.0, priority=1.0),
        Candidate("urgent", is_overdue=False, task_age_days=2.0, priority=4.0),
    ]
    evidence = SufficientStatistics.none(SPEC_V2)
    keen = CHALLENGER.decide("d", evidence, mu, SPEC_V2.phi(tips, MORNING, KEEN))
    weary = CHALLENGER.decide("d", evidence, mu, SPEC_V2.phi(tips, MORNING, {**KEEN, "completion_rate_30d": 0.0}))
    assert [int(np.argmax(scored.means)) for scored in (keen, weary)] == [1, 0]
    for profile in (KEEN, None):
        champion = CHAMPION.decide("d", evidence, mu, SPEC_V2.phi(tips, MORNING, profile))
        assert champion.means[0] == champion.means[1] == 0


@given(seeds, st.integers(0, 10), st.sampled_from([CHAMPION, CHALLENGER]))
def test_contributions_of_the_inputs_sum_to_the_scores(seed: int, decisions: int, policy: Policy) -> None:
    asked = request_of(seed)
    scored = policy.decide(
        "d", taught(*history_of(seed, decisions), SufficientStatistics.none(SPEC_V2)), mean_of(seed), asked
    )
    parts = contributions(scored.theta, asked)
    assert parts.shape == (len(asked), policy.spec.size)
    np.testing.assert_allclose(parts.sum(axis=1), scored.means, rtol=1e-9, atol=1e-12)


def test_no_prior_is_a_prior_of_zeros() -> None:
    evidence = taught(*history_of(1, 5), SufficientStatistics.none(SPEC_V2))
    asked = request_of(1)
    zeros = CHALLENGER.decide("d", evidence, np.zeros(SPEC_V2.size), asked)
    assert same(CHALLENGER.decide("d", evidence, None, asked), zeros)


def test_a_firm_history_outweighs_the_prior() -> None:
    posterior = Posterior(1e9 * np.eye(2), 1e9 * np.array([0.2, 0.4]), np.ones(2), np.array([9.0, 9.0]))
    np.testing.assert_allclose(posterior.theta, [0.2, 0.4], atol=1e-7)
    np.testing.assert_allclose((posterior.roots(np.eye(2)) ** 2).sum(axis=0), 1e-9, rtol=1e-6)


@pytest.mark.parametrize(
    ("policy", "evidence"),
    [
        (CHALLENGER, SufficientStatistics.none(SPEC_V1)),
        (CHAMPION, SufficientStatistics.none(replace(SPEC_V1, version=9))),
        (CHAMPION, SufficientStatistics.none(PLAIN_COLUMNS)),
    ],
)
def test_evidence_is_refused_when_the_policy_cannot_read_it(policy: Policy, evidence: SufficientStatistics) -> None:
    with pytest.raises(SpecMismatch, match="cannot read evidence"):
        policy.decide("d", evidence, None, request_of(1))


def test_vectors_and_means_are_refused_when_they_are_not_of_the_policys_spec() -> None:
    evidence = SufficientStatistics.none(SPEC_V2)
    with pytest.raises(SpecMismatch, match="25 inputs, the vectors 6"):
        CHALLENGER.decide("d", evidence, None, request_of(1, spec=SPEC_V1))
    with pytest.raises(SpecMismatch, match="25 inputs, the prior's mean 6"):
        CHALLENGER.decide("d", evidence, np.zeros(6), request_of(1))
