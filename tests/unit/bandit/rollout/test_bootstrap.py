"""Bootstrap intervals: levels that sum to alpha, looks when due, and intervals that miss at the stated rate."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.bandit.model.inputs import Array
from app.bandit.rollout import bootstrap_intervals
from app.bandit.rollout.aggregates import DecisionSums
from app.bandit.rollout.bootstrap_intervals import (
    ALPHA,
    Interval,
    binomial_tail,
    bootstrap,
    look_level,
    look_number,
    share_bound,
    standard_error,
)
from tests.support.decision_logs import logged_page, page_slice, simulate


@pytest.mark.parametrize(
    ("evaluated", "number"), [(0, 0), (3_999, 0), (4_000, 1), (7_999, 1), (8_000, 2), (16_000, 3), (400_000, 7)]
)
def test_looks_are_due_when_decisions_have_doubled(evaluated: int, number: int) -> None:
    assert look_number(evaluated) == number


def test_levels_of_looks_sum_to_alpha() -> None:
    assert look_level(1) == pytest.approx(0.025)
    for looks in (1, 2, 10, 1_000):
        assert math.fsum(look_level(number) for number in range(1, looks + 1)) == pytest.approx(
            0.05 * looks / (looks + 1)
        )


@given(st.integers(1, 60), st.floats(0.001, 0.999), st.data())
def test_binomial_tail_is_the_sum_of_its_terms(n: int, p: float, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, n + 1))
    exact = math.fsum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(count, n + 1))
    assert binomial_tail(count, n, p) == pytest.approx(exact, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize(
    ("count", "n", "level", "bound"),
    # From tables of Clopper and Pearson: 95 % intervals, two-sided.
    [
        (0, 10, 0.025, 0.0),
        (1, 10, 0.025, 0.0025),
        (5, 10, 0.025, 0.1871),
        (10, 10, 0.025, 0.6915),
    ],
)
def test_bound_of_a_share_is_that_of_clopper_and_pearson(count: int, n: int, level: float, bound: float) -> None:
    assert share_bound(count, n, level) == pytest.approx(bound, abs=1e-4)


def test_bound_of_a_share_is_computed_for_many_answers() -> None:
    assert 0.0115 < share_bound(600, 40_000) < 0.015
    assert share_bound(39_999, 40_000) > 0.999


def figure(parts: list[float], wholes: list[float], level: float = 0.05, seed: int = 1) -> Interval:
    columns = [np.array([column]).T for column in (parts, wholes)]
    (found,) = bootstrap(columns[0], columns[1], level, np.random.default_rng(seed))
    return found


def test_interval_is_students_when_users_are_normal() -> None:
    random = np.random.default_rng(5)
    parts = random.normal(3, 2, 400)
    found = figure(list(parts), [1.0] * 400)
    half = 1.966 * parts.std(ddof=1) / math.sqrt(400)
    assert found.value == pytest.approx(parts.mean())
    for width in (found.value - found.low, found.high - found.value):
        assert width == pytest.approx(half, rel=0.1)
    assert standard_error(parts, np.ones(400)) == pytest.approx(parts.std(ddof=1) / math.sqrt(400))


@pytest.mark.slow
def test_interval_is_that_of_a_plain_loop_over_replicates() -> None:
    random = np.random.default_rng(4)
    wholes = random.integers(1, 9, 25).astype(float)
    parts = wholes * random.random(25) + random.exponential(1, 25)
    value, draws = parts.sum() / wholes.sum(), np.random.default_rng(1)

    def error(part: Array, whole: Array) -> float:
        return math.sqrt(sum((a - part.sum() / whole.sum() * b) ** 2 for a, b in zip(part, whole, strict=True)))

    distances = []
    for _ in range(bootstrap_intervals.REPLICATES):
        drawn = draws.integers(0, 25, 25, dtype=np.uint32)
        part, whole = parts[drawn], wholes[drawn]
        distances.append((part.sum() / whole.sum() - value) * whole.sum() / error(part, whole))
    low, high = np.quantile(distances, [0.05, 0.95]) * error(parts, wholes) / wholes.sum()
    assert figure(list(parts), list(wholes), level=0.1) == pytest.approx((value, value - high, value - low))


def test_interval_depends_on_users_when_their_decisions_are_equal() -> None:
    """Ten equal decisions count as one; drawing decisions would give a third of the width."""
    rewards = [float(number % 2) for number in range(100)]
    once = figure(rewards, [1.0] * 100)
    tenfold = figure([10 * reward for reward in rewards], [10.0] * 100)
    assert tenfold == pytest.approx(once)
    assert once.high - once.low == pytest.approx(2 * 1.984 * 0.5025 / 10, rel=0.1)


def test_interval_is_a_point_without_variance() -> None:
    assert figure([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == Interval(2.0, 2.0, 2.0)


def test_interval_is_longer_on_the_side_of_rare_large_values() -> None:
    random = np.random.default_rng(6)
    found = figure(list(random.exponential(1, 60) ** 2), [1.0] * 60)
    assert found.high - found.value > 1.3 * (found.value - found.low)


def test_interval_widens_with_smaller_levels_beyond_the_replicates() -> None:
    random = np.random.default_rng(7)
    parts = list(random.normal(0, 1, 200))
    widths = [found.high - found.low for found in (figure(parts, [1.0] * 200, 0.05 / 3**k) for k in range(12))]
    assert all(wider > narrower for narrower, wider in itertools.pairwise(widths))
    assert widths[-1] == pytest.approx(2 * 5.2 / math.sqrt(200), rel=0.25)  # a normal's quantile at 1.4e-7


def test_interval_needs_two_users() -> None:
    with pytest.raises(ValueError, match="two users"):
        figure([1.0], [1.0])


def test_interval_is_the_same_in_other_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, wholes = [1.0, 2.0, 5.0, 3.0] * 10, [1.0, 2.0, 1.0, 4.0] * 10
    at_once = figure(parts, wholes)
    assert figure(parts, wholes) == at_once
    monkeypatch.setattr(bootstrap_intervals, "CHUNK", 320)
    assert figure(parts, wholes) == pytest.approx(at_once)


def test_memory_is_bounded_when_users_and_replicates_are_many() -> None:
    random = np.random.default_rng(8)
    parts = random.random((20_000, 6))
    tracemalloc.start()
    try:
        bootstrap(parts, np.ones_like(parts), 0.05, random, replicates=300)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40_000_000  # 300 replicates at once would be 48 MB of draws alone


@pytest.mark.slow
def test_interval_of_one_look_misses_as_often_as_its_level() -> None:
    random = np.random.default_rng(9)
    missed = {"ips": 0, "snips": 0, "dr": 0, "lift": 0}
    runs = 200
    for _ in range(runs):
        found = simulate(random, 120, 1_000, skill=0.5)
        sums = DecisionSums()
        sums.add(logged_page(random, found, model=0.5))
        estimates = sums.estimates(0.1, random, replicates=600)
        champion, challenger = found.values
        truths = {"ips": challenger, "snips": challenger, "dr": challenger, "lift": challenger - champion}
        for name, truth in truths.items():
            interval = getattr(estimates, name)
            missed[name] += not interval.low <= truth <= interval.high
    # 10 % of 200, give or take three standard errors
    assert all(8 <= count <= 33 for count in missed.values()), missed


@pytest.mark.slow
def test_false_improvement_is_claimed_in_at_most_alpha_of_roll_outs() -> None:
    random = np.random.default_rng(10)
    runs, alpha, claimed, uncorrected = 100, 0.4, 0, 0
    for _ in range(runs):
        found = simulate(random, 100, 2_000)
        page = logged_page(random, found, model=0.5)
        sums, looks, plain = DecisionSums(), [], []
        for number in range(1, 5):
            sums.add(page_slice(page, sums.n, 125 * 2**number))
            looks.append(sums.estimates(look_level(number) * alpha / ALPHA, random, replicates=400).lift.low)
            plain.append(sums.estimates(alpha, random, replicates=400).lift.low)
        claimed += max(looks) > 0
        uncorrected += max(plain) > 0
    assert claimed <= alpha * runs
    assert 0 < claimed < uncorrected  # the correction has an effect and is not too strict
