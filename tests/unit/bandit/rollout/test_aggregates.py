"""DecisionSums: the figures of the estimators, from pages in any order; and from a simulated log to the verdict."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from app.bandit.model.inputs import Array
from app.bandit.rollout.aggregates import DecisionPage, DecisionSums, Estimates
from app.bandit.rollout.verdict import Verdict, verdict
from tests.bench.rollout_simulation import dismissing
from tests.support.decision_logs import logged_page, page_slice, simulate


def ips(rewards: Array, pi_e: Array, pi_b: Array) -> float:
    return float(np.mean(pi_e / pi_b * rewards))


def dr(rewards: Array, pi_e: Array, pi_b: Array, q_logged: Array, v_e: Array) -> float:
    return float(np.mean(v_e + pi_e / pi_b * (rewards - q_logged)))


def ess(weights: Array) -> float:
    return float(np.sum(weights) ** 2 / np.sum(weights**2))


def summed(page: DecisionPage, step: int = 500) -> DecisionSums:
    sums = DecisionSums()
    for start in range(0, len(page.users), step):
        sums.add(page_slice(page, start, start + step))
    return sums


def judged(found: Estimates) -> Verdict:
    return verdict(found, 0.02)


def kept(page: DecisionPage, rows: npt.NDArray[np.bool_]) -> DecisionPage:
    users = [user for user, stays in zip(page.users, rows, strict=True) if stays]
    return DecisionPage(users, *(column[rows] for column in page[1:]))


def test_figures_are_those_of_the_estimators() -> None:
    random = np.random.default_rng(1)
    page = logged_page(random, simulate(random, 2_000, 3_000, skill=1.0), share=0.25, model=0.5)
    found = summed(page).estimates(0.05, random, replicates=50)
    weights = page.pi_challenger / page.pi_b
    of_champion = dr(page.rewards, page.pi_champion, page.pi_b, page.q_logged, page.v_champion)
    of_challenger = dr(page.rewards, page.pi_challenger, page.pi_b, page.q_logged, page.v_challenger)
    assert (found.n, found.users) == (3_000, len(set(page.users)))
    assert found.ips.value == pytest.approx(ips(page.rewards, page.pi_challenger, page.pi_b))
    assert found.snips.value == pytest.approx(np.average(page.rewards, weights=weights))
    assert found.dr.value == pytest.approx(of_challenger)
    assert found.champion.value == pytest.approx(of_champion)
    assert found.lift.value == pytest.approx(of_challenger - of_champion)
    assert found.ess == pytest.approx(ess(weights))
    assert found.mean_weight == pytest.approx(weights.mean())
    weights_champion = page.pi_champion / page.pi_b
    assert found.champion_ess == pytest.approx(ess(weights_champion))
    assert found.champion_mean_weight == pytest.approx(weights_champion.mean())
    assert 0 < found.champion_mean_weight_error < found.mean_weight_error, "three quarters of its weights are 1"
    assert found.agreement == pytest.approx(page.agreed.mean())
    assert found.effective_users == pytest.approx(ess(np.unique(page.users, return_counts=True)[1].astype(float)))
    assert found.dismissed_champion == pytest.approx(ips(page.dismissed, page.pi_champion, page.pi_b))
    assert found.dismissed_more.value == pytest.approx(found.dismissed_challenger - found.dismissed_champion)


def test_pool_and_profile_add_up_to_the_lift() -> None:
    """On the decisions for which the third policy was computed."""
    random = np.random.default_rng(14)
    found = simulate(random, 500, 4_000, skill=1.0)
    page = logged_page(random, found, model=0.5)
    pool = (page.pi_champion + page.pi_challenger) / 2, (page.v_champion + page.v_challenger) / 2
    without = summed(page).estimates(0.05, random, replicates=50)
    assert (without.pool_decisions, without.lift_pool, without.lift_profile) == (0, None, None)
    whole = summed(page._replace(pi_pool=pool[0], v_pool=pool[1])).estimates(0.05, random, replicates=50)
    assert whole.pool_decisions == 4_000
    for part in (whole.lift_pool, whole.lift_profile):
        assert part is not None
        assert part.value == pytest.approx(whole.lift.value / 2)
        assert part.low < part.value < part.high
    late = np.arange(4_000) >= 1_000
    half = summed(page._replace(pi_pool=np.where(late, pool[0], np.nan), v_pool=np.where(late, pool[1], np.nan)))
    assert half.estimates(0.05, random, replicates=50).pool_decisions == 3_000
    alone = summed(kept(page, late)).estimates(0.05, random, replicates=50)
    assert half.estimates(0.05, random, replicates=50).lift_pool.value == pytest.approx(alone.lift.value / 2)  # type: ignore[union-attr]


@pytest.mark.slow
def test_excess_of_dismissals_is_closer_to_the_truth_than_the_plain_difference() -> None:
    errors, plain, misses = [], [], 0
    for seed in range(40):
        page = dismissing(np.random.default_rng(seed), 4_000, 400, 0.05, 0.05)
        *_, more = summed(page).dismissals()
        weights = (page.pi_challenger - page.pi_champion) / page.pi_b
        errors.append(more.value - 0.05)
        plain.append(float(np.mean(weights * page.dismissed)) - 0.05)
        misses += not more.low < 0.05 < more.high
    assert misses == 0
    assert np.square(errors).mean() < 0.8 * np.square(plain).mean()
    assert abs(np.mean(errors)) < 3 * np.std(errors) / np.sqrt(40)


def test_sums_do_not_depend_on_the_pages() -> None:
    random = np.random.default_rng(2)
    page = logged_page(random, simulate(random, 1_500, 4_000))
    found = [summed(page, step).estimates(0.05, np.random.default_rng(3), replicates=50) for step in (4_000, 7)]
    for one, other in zip(*map(msgspec.structs.astuple, found), strict=True):
        assert one == (None if other is None else pytest.approx(other))
    sums = DecisionSums()
    sums.add(DecisionPage([], *[np.empty(0)] * 11))
    assert (sums.n, sums.users) == (0, 0)


def test_lift_has_a_narrower_interval_than_the_values() -> None:
    random = np.random.default_rng(4)
    page = logged_page(random, simulate(random, 500, 4_000, spread=0.3))
    found = summed(page).estimates(0.05, random, replicates=300)
    assert found.lift.high - found.lift.low < 0.6 * (found.dr.high - found.dr.low)


def test_estimates_are_refused_when_every_weight_of_a_policy_is_zero() -> None:
    random = np.random.default_rng(5)
    page = logged_page(random, simulate(random, 50, 100))
    for nothing in (page._replace(pi_challenger=np.zeros(100)), page._replace(pi_champion=np.zeros(100))):
        with pytest.raises(ValueError, match="every weight of the"):
            summed(nothing).estimates(0.05, random)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.25, 1.0])
def test_true_values_are_recovered_at_every_share(share: float) -> None:
    """With a reward model that is half right, at every stage of a roll-out."""
    random = np.random.default_rng(6)
    found = simulate(random, 1_000, 20_000, skill=1.0)
    page = logged_page(random, found, share=share, model=0.5)
    estimates = summed(page, 5_000).estimates(0.001, random, replicates=300)
    champion, challenger = found.values
    for interval, truth in (
        (estimates.ips, challenger),
        (estimates.snips, challenger),
        (estimates.dr, challenger),
        (estimates.champion, champion),
        (estimates.lift, challenger - champion),
    ):
        assert interval.low < truth < interval.high
        assert interval.high - interval.low < 0.1
    assert challenger - champion > 0.02
    assert judged(estimates) == Verdict("promote", judged(estimates).reason, improved=True)


@pytest.mark.parametrize(
    ("what", "logger"),
    [
        ("as if it had always chosen the best", lambda page: page._replace(pi_b=page.pi_champion**0.5)),
        ("without exploration", lambda page: page._replace(pi_b=(page.pi_b - 0.02) / 0.9 + 1e-3)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_propensities_are_detected_by_the_mean_weight(what: str, logger: object) -> None:
    random = np.random.default_rng(7)
    page = logged_page(random, simulate(random, 1_000, 16_000, skill=1.0))
    assert judged(summed(page).estimates(0.01, random, replicates=100)).word == "promote"
    wrong = summed(logger(page)).estimates(0.01, random, replicates=100)  # type: ignore[operator]  # a function
    found = judged(wrong)
    assert found.word == "hold", what
    assert "logged probabilities are wrong" in found.reason


def test_decisions_lost_by_choice_are_detected_by_the_mean_weight() -> None:
    random = np.random.default_rng(8)
    page = logged_page(random, simulate(random, 1_000, 16_000))
    lost = kept(page, (page.pi_challenger > page.pi_b) | (random.random(16_000) < 0.8))
    assert "decisions got lost" in judged(summed(lost).estimates(0.01, random, replicates=100)).reason


def test_policy_that_serves_every_user_has_weights_of_one() -> None:
    random = np.random.default_rng(9)
    found = simulate(random, 500, 4_000)
    shadow, all_users = (
        summed(logged_page(random, found, share=share)).estimates(0.05, random, replicates=50) for share in (0.0, 1.0)
    )
    assert (shadow.champion_mean_weight, shadow.champion_mean_weight_error, shadow.champion_ess) == (1, 0, 4_000)
    assert (all_users.mean_weight, all_users.mean_weight_error, all_users.ess) == (1, 0, 4_000)
    assert all_users.champion_ess < 4_000 > shadow.ess


def test_lift_is_not_credible_when_the_champions_effective_size_is_small() -> None:
    """At 100 %, the champion's value is estimated from rare choices of large weight."""
    random = np.random.default_rng(10)
    page = logged_page(random, simulate(random, 1_000, 16_000, skill=4.0, spread=2.5), share=1.0, model=0.5)
    estimates = summed(page).estimates(0.01, random, replicates=100)
    assert estimates.ess == 16_000
    found = judged(estimates)
    assert found.word == "insufficient data"
    assert "16,000 decisions is" in found.reason


def test_decisions_lost_at_full_share_are_detected_by_the_champions_weight() -> None:
    random = np.random.default_rng(11)
    page = logged_page(random, simulate(random, 1_000, 16_000), share=1.0)
    lost = kept(page, (page.pi_champion > page.pi_b) | (random.random(16_000) < 0.8))
    estimates = summed(lost).estimates(0.01, random, replicates=100)
    assert estimates.mean_weight == 1
    found = judged(estimates)
    assert found.word == "hold"
    assert "The champion's mean weight is" in found.reason
    assert "decisions got lost" in found.reason
