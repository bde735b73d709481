"""The off-policy estimates of DecisionSums: equal to other implementations, and unbiased."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.bandit.model.inputs import Array
from app.bandit.rollout.aggregates import DecisionPage, DecisionSums, Estimates

unit = st.floats(0, 1)
propensities = st.floats(0.01, 1)
Logged = list[tuple[float, float, float, float, float]]
# reward, pi_e, pi_b, q_logged, v_e
logged = st.lists(st.tuples(unit, unit, propensities, unit, unit), min_size=2, max_size=40)
weighted = logged.filter(lambda rows: any(row[1] > 0.001 for row in rows))


def columns(rows: Logged) -> list[Array]:
    return list(np.array(rows).T)


def estimates(r: Array, e: Array, b: Array, q: Array | None = None, v: Array | None = None) -> Estimates:
    """The challenger's estimates from one decision of each user: rewards, pi_e, pi_b, q_logged and v_e."""
    none = np.zeros_like(r)
    model, value = none if q is None else q, none if v is None else v
    sums = DecisionSums()
    users = [f"u{place}" for place in range(len(r))]
    sums.add(DecisionPage(users, r, b, b, e, model, none, value, none, none, none, none))
    return sums.estimates(0.05, np.random.default_rng(1), replicates=2)


def near(value: float) -> object:
    return pytest.approx(value, rel=1e-9, abs=1e-9)


def test_estimates_are_those_computed_by_hand() -> None:
    rewards, pi_e, pi_b = np.array([1.0, 0.0, 0.3]), np.array([0.8, 0.1, 0.5]), np.array([0.4, 0.2, 1.0])
    # weights 2, 0.5, 0.5
    found = estimates(rewards, pi_e, pi_b, np.array([0.6, 0.2, 0.3]), np.array([0.5, 0.1, 0.4]))
    assert found.ips.value == near((2 + 0 + 0.15) / 3)
    assert found.snips.value == near(2.15 / 3)
    assert found.ess == near(9 / 4.5)
    assert found.dr.value == near((0.5 + 0.8 + 0.1 - 0.1 + 0.4 + 0.0) / 3)


@given(weighted)
def test_estimates_agree_with_other_implementations(rows: Logged) -> None:
    """With exact sums in a loop; SNIPS with weights that are normalised first, as in the Open Bandit Pipeline."""
    n = len(rows)
    weights = [e / b for _, e, b, _, _ in rows]
    mean_weight = math.fsum(weights) / n
    found = estimates(*columns(rows))
    assert found.ips.value == near(math.fsum(row[0] * weight / n for row, weight in zip(rows, weights, strict=True)))
    normalised = [row[0] * (weight / mean_weight) for row, weight in zip(rows, weights, strict=True)]
    assert found.snips.value == near(math.fsum(normalised) / n)
    # Kish wrote n / (1 + the squared coefficient of variation).
    spread = math.fsum((weight - mean_weight) ** 2 for weight in weights) / n
    assert found.ess == near(n / (1 + spread / mean_weight**2))
    direct = math.fsum(row[4] for row in rows) / n
    correction = math.fsum(weight * row[0] - weight * row[3] for row, weight in zip(rows, weights, strict=True)) / n
    assert found.dr.value == near(direct + correction)


@given(logged)
def test_value_of_the_logging_policy_is_the_mean_reward(rows: Logged) -> None:
    r, _, b, _, _ = columns(rows)
    found = estimates(r, b, b)
    assert found.ips.value == near(float(r.mean()))
    assert found.snips.value == near(float(r.mean()))
    assert found.ess == near(len(rows))


@given(weighted)
def test_doubly_robust_is_the_model_when_it_is_right_and_ips_without_one(rows: Logged) -> None:
    r, e, b, _, v = columns(rows)
    assert estimates(r, e, b, r, v).dr.value == near(float(v.mean()))
    without = estimates(r, e, b)
    assert without.dr.value == near(without.ips.value)


@given(weighted, st.floats(-10, 10))
def test_only_snips_moves_with_shifted_rewards(rows: Logged, shift: float) -> None:
    r, e, b, _, _ = columns(rows)
    found, shifted = estimates(r, e, b), estimates(r + shift, e, b)
    assert shifted.snips.value == pytest.approx(found.snips.value + shift, abs=1e-6)
    assert shifted.ips.value == pytest.approx(found.ips.value + shift * found.mean_weight, abs=1e-6)
    assert r.min() - 1e-9 <= found.snips.value <= r.max() + 1e-9


@given(weighted, st.floats(0.1, 10))
def test_estimates_scale_with_rewards_and_weights(rows: Logged, factor: float) -> None:
    r, e, b, q, v = columns(rows)
    found, scaled = estimates(r, e, b, q, v), estimates(factor * r, e, b, factor * q, factor * v)
    assert scaled.ips.value == near(factor * found.ips.value)
    assert scaled.dr.value == near(factor * found.dr.value)
    heavier = estimates(r, factor * e, b)
    assert heavier.snips.value == near(found.snips.value)
    assert heavier.ess == near(found.ess)


@given(weighted, st.randoms(use_true_random=False))
def test_order_of_decisions_does_not_matter(rows: Logged, random: object) -> None:
    mixed = list(rows)
    random.shuffle(mixed)  # type: ignore[attr-defined]  # a Random
    found, other = estimates(*columns(rows)), estimates(*columns(mixed))
    assert [other.ips.value, other.snips.value, other.dr.value, other.ess] == [
        near(value) for value in (found.ips.value, found.snips.value, found.dr.value, found.ess)
    ]


@given(weighted)
def test_effective_sample_size_is_at_most_the_sample_size(rows: Logged) -> None:
    assert 0 < estimates(*columns(rows)).ess <= len(rows) * (1 + 1e-9)


def test_effective_sample_size_ignores_decisions_without_weight() -> None:
    one = np.ones(4)
    assert estimates(one, np.array([0.0, 0.3, 0.0, 0.3]), one).ess == near(2)


@pytest.mark.parametrize("model", [[0.0, 0.0, 0.0], [0.2, 0.5, 0.8], [1.0, 0.0, 0.4]], ids=["none", "right", "wrong"])
def test_estimates_are_unbiased_over_every_possible_log(model: list[float]) -> None:
    """Two decisions with three candidates and rewards of 0 or 1: all 36 logs, each with its probability."""
    pi_b, pi_e, truth = [0.2, 0.5, 0.3], [0.7, 0.1, 0.2], [0.2, 0.5, 0.8]
    value = math.fsum(p * mean for p, mean in zip(pi_e, truth, strict=True))
    expected = math.fsum(p * mean for p, mean in zip(pi_e, model, strict=True))
    steps = [
        (action, reward, pi_b[action] * (truth[action] if reward else 1 - truth[action]))
        for action in range(3)
        for reward in (0.0, 1.0)
    ]
    means, total = {"ips": 0.0, "dr": 0.0}, 0.0
    for log in itertools.product(steps, repeat=2):
        probability = math.prod(step[2] for step in log)
        rewards = [step[1] for step in log]
        e, b, q = (np.array([table[step[0]] for step in log]) for table in (pi_e, pi_b, model))
        found = estimates(np.array(rewards), e, b, q, np.array([expected] * 2))
        total += probability
        means["ips"] += probability * found.ips.value
        means["dr"] += probability * found.dr.value
    assert total == near(1)
    assert means == {"ips": near(value), "dr": near(value)}
