"""The off-policy estimators: equal to other implementations, unbiased, and with clear errors for invalid arrays."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.bandit.rollout.off_policy import Floats, dr, ess, ips, snips

unit = st.floats(0, 1)
propensities = st.floats(0.01, 1)
Logged = list[tuple[float, float, float, float, float]]
# reward, pi_e, pi_b, q_logged, v_e
logged = st.lists(st.tuples(unit, unit, propensities, unit, unit), min_size=1, max_size=40)
weighted = logged.filter(lambda rows: any(row[1] > 0.001 for row in rows))


def columns(rows: Logged) -> list[Floats]:
    return list(np.array(rows).T)


def near(value: float) -> object:
    return pytest.approx(value, rel=1e-9, abs=1e-9)


def test_estimates_are_those_computed_by_hand() -> None:
    rewards, pi_e, pi_b = [1.0, 0.0, 0.3], [0.8, 0.1, 0.5], [0.4, 0.2, 1.0]
    # weights 2, 0.5, 0.5
    assert ips(rewards, pi_e, pi_b) == near((2 + 0 + 0.15) / 3)
    assert snips(rewards, pi_e, pi_b) == near(2.15 / 3)
    assert ess([2.0, 0.5, 0.5]) == near(9 / 4.5)
    q_logged, v_e = [0.6, 0.2, 0.3], [0.5, 0.1, 0.4]
    assert dr(rewards, pi_e, pi_b, q_logged, v_e) == near((0.5 + 0.8 + 0.1 - 0.1 + 0.4 + 0.0) / 3)


def test_results_are_floats_for_any_kind_of_numbers() -> None:
    whole = np.array([1, 0, 1])
    found = [ips(whole, whole, [1, 1, 1]), snips(whole, whole, [1, 1, 1]), ess(whole), dr(*[[1, 1]] * 5)]
    assert [type(figure) for figure in found] == [float] * 4
    assert found == [near(2 / 3), 1.0, 2.0, 1.0]


@given(weighted)
def test_estimates_agree_with_other_implementations(rows: Logged) -> None:
    """With exact sums in a loop; SNIPS with weights that are normalised first, as in the Open Bandit Pipeline."""
    n = len(rows)
    weights = [e / b for _, e, b, _, _ in rows]
    mean_weight = math.fsum(weights) / n
    r, e, b, q, v = columns(rows)
    assert ips(r, e, b) == near(math.fsum(row[0] * weight / n for row, weight in zip(rows, weights, strict=True)))
    normalised = [row[0] * (weight / mean_weight) for row, weight in zip(rows, weights, strict=True)]
    assert snips(r, e, b) == near(math.fsum(normalised) / n)
    # Kish wrote n / (1 + the squared coefficient of variation).
    spread = math.fsum((weight - mean_weight) ** 2 for weight in weights) / n
    assert ess(weights) == near(n / (1 + spread / mean_weight**2))
    direct = math.fsum(row[4] for row in rows) / n
    correction = math.fsum(weight * row[0] - weight * row[3] for row, weight in zip(rows, weights, strict=True)) / n
    assert dr(r, e, b, q, v) == near(direct + correction)


@given(logged)
def test_value_of_the_logging_policy_is_the_mean_reward(rows: Logged) -> None:
    r, _, b, _, _ = columns(rows)
    assert ips(r, b, b) == near(float(r.mean()))
    assert snips(r, b, b) == near(float(r.mean()))
    assert ess(b / b) == near(len(rows))


@given(logged)
def test_doubly_robust_is_the_model_when_it_is_right_and_ips_without_one(rows: Logged) -> None:
    r, e, b, _, v = columns(rows)
    assert dr(r, e, b, r, v) == near(float(v.mean()))
    assert dr(r, e, b, np.zeros_like(r), np.zeros_like(r)) == near(ips(r, e, b))


@given(weighted, st.floats(-10, 10))
def test_only_snips_moves_with_shifted_rewards(rows: Logged, shift: float) -> None:
    r, e, b, _, _ = columns(rows)
    assert snips(r + shift, e, b) == pytest.approx(snips(r, e, b) + shift, abs=1e-6)
    assert ips(r + shift, e, b) == pytest.approx(ips(r, e, b) + shift * float((e / b).mean()), abs=1e-6)
    assert r.min() - 1e-9 <= snips(r, e, b) <= r.max() + 1e-9


@given(weighted, st.floats(0.1, 10))
def test_estimates_scale_with_rewards_and_weights(rows: Logged, factor: float) -> None:
    r, e, b, q, v = columns(rows)
    assert ips(factor * r, e, b) == near(factor * ips(r, e, b))
    assert dr(factor * r, e, b, factor * q, factor * v) == near(factor * dr(r, e, b, q, v))
    assert snips(r, factor * e, b) == near(snips(r, e, b))
    assert ess(factor * e / b) == near(ess(e / b))


@given(weighted, st.randoms(use_true_random=False))
def test_order_of_decisions_does_not_matter(rows: Logged, random: object) -> None:
    mixed = list(rows)
    random.shuffle(mixed)  # type: ignore[attr-defined]  # a Random
    for estimate, places in ((ips, 3), (snips, 3), (dr, 5)):
        assert estimate(*columns(mixed)[:places]) == near(estimate(*columns(rows)[:places]))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_effective_sample_size_is_at_most_the_sample_size(weights: list[float]) -> None:
    assert 0 <= ess(weights) <= len(weights) * (1 + 1e-9)


def test_effective_sample_size_ignores_decisions_without_weight() -> None:
    assert ess([0.0, 0.0]) == 0.0
    assert ess([0.0, 3.0, 0.0, 3.0]) == near(2)
    assert ess([1e-200, 1e-200, 1e200]) == near(1)


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
        e, b, q = ([table[step[0]] for step in log] for table in (pi_e, pi_b, model))
        total += probability
        means["ips"] += probability * ips(rewards, e, b)
        means["dr"] += probability * dr(rewards, e, b, q, [expected] * 2)
    assert total == near(1)
    assert means == {"ips": near(value), "dr": near(value)}


def test_snips_is_refused_when_every_weight_is_zero() -> None:
    with pytest.raises(ValueError, match="every weight is 0"):
        snips([1.0, 0.0], [0.0, 0.0], [0.5, 0.5])
    assert ips([1.0, 0.0], [0.0, 0.0], [0.5, 0.5]) == 0.0


@pytest.mark.parametrize("estimate", [ips, snips], ids=["ips", "snips"])
@pytest.mark.parametrize(
    ("given_columns", "why"),
    [
        (([], [], []), "rewards is empty"),
        (([1.0], [0.5, 0.5], [0.5]), "pi_e has 2 rows, rewards has 1"),
        (([1.0], [0.5], [0.5, 0.5]), "pi_b has 2 rows, rewards has 1"),
        (([1.0], [0.5], [0.0]), "pi_b must be above 0"),
        (([1.0], [0.5], [-0.1]), "pi_b must be above 0"),
        (([1.0], [-0.5], [0.1]), "pi_e must not be negative"),
        (([1.0, math.nan], [0.5] * 2, [0.5] * 2), r"rewards\[1\] is nan"),
        (([1.0], [math.nan], [0.5]), r"pi_e\[0\] is nan"),
        (([1.0], [0.5], [math.inf]), r"pi_b\[0\] is inf"),
        (([[1.0]], [0.5], [0.5]), "rewards must have one dimension, has 2"),
        ((1.0, [0.5], [0.5]), "rewards must have one dimension, has 0"),
        ((["much"], [0.5], [0.5]), "rewards must be numbers"),
        (([1.0], [1.0], [1e-320]), r"pi_b\[0\] is .*overflows"),
    ],
)
def test_invalid_arrays_are_refused_with_a_reason(
    estimate: Callable[..., float], given_columns: tuple[object, ...], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        estimate(*given_columns)


@pytest.mark.parametrize(
    ("estimate", "given_columns", "why"),
    [
        (dr, ([1.0], [0.5], [0.5], [0.1], [0.1, 0.2]), "v_e has 2 rows"),
        (dr, ([1.0], [0.5], [0.5], [math.nan], [0.1]), r"q_logged\[0\] is nan"),
        (ess, ([],), "weights is empty"),
        (ess, ([1.0, -1.0],), "weights must not be negative"),
    ],
)
def test_invalid_arrays_of_dr_and_ess_are_refused(
    estimate: Callable[..., float], given_columns: tuple[object, ...], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        estimate(*given_columns)
