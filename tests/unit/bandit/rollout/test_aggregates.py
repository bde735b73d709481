"""Sums: the estimators' own figures from pages in any order, and the whole way from a log to the verdict."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from app.bandit.rollout.aggregates import Estimates, Page, Sums
from app.bandit.rollout.off_policy import dr, ess, ips, snips
from app.bandit.rollout.verdict import Guardrails, Limits, Verdict, verdict
from tests.support.decision_logs import logged, part, town

NO_RAILS = Guardrails()
NO_PAGE = Page([], *[np.empty(0)] * 9)


def summed(page: Page, step: int = 500) -> Sums:
    """The sums of a page, taken in pieces."""
    sums = Sums()
    for start in range(0, len(page.users), step):
        sums.add(part(page, start, start + step))
    return sums


def judged(found: Estimates) -> Verdict:
    """The verdict on the value alone."""
    return verdict(found, NO_RAILS, Limits(margin=0.02))


def test_figures_are_those_of_the_estimators() -> None:
    chance = np.random.default_rng(1)
    page = logged(chance, town(chance, 2_000, 3_000, skill=1.0), share=0.25, model=0.5)
    found = summed(page).estimates(0.05, chance, replicates=50)
    weights = page.pi_challenger / page.pi_b
    of_champion = dr(page.rewards, page.pi_champion, page.pi_b, page.q_logged, page.v_champion)
    of_challenger = dr(page.rewards, page.pi_challenger, page.pi_b, page.q_logged, page.v_challenger)
    assert (found.n, found.users) == (3_000, len(set(page.users)))
    assert found.ips.value == pytest.approx(ips(page.rewards, page.pi_challenger, page.pi_b))
    assert found.snips.value == pytest.approx(snips(page.rewards, page.pi_challenger, page.pi_b))
    assert found.dr.value == pytest.approx(of_challenger)
    assert found.champion.value == pytest.approx(of_champion)
    assert found.lift.value == pytest.approx(of_challenger - of_champion)
    assert found.ess == pytest.approx(ess(weights))
    assert found.mean_weight == pytest.approx(weights.mean())
    of_the_champion = page.pi_champion / page.pi_b
    assert found.champion_ess == pytest.approx(ess(of_the_champion))
    assert found.champion_mean_weight == pytest.approx(of_the_champion.mean())
    assert 0 < found.champion_mean_weight_error < found.mean_weight_error, "three quarters of its weights are 1"
    assert found.agreement == pytest.approx(page.agreed.mean())
    assert found.dismissed_challenger == pytest.approx(ips(page.dismissed, page.pi_challenger, page.pi_b))
    assert found.dismissed_champion == pytest.approx(ips(page.dismissed, page.pi_champion, page.pi_b))
    assert found.dismissed_more.value == pytest.approx(found.dismissed_challenger - found.dismissed_champion)


def test_sums_are_the_same_however_the_decisions_are_paged() -> None:
    chance = np.random.default_rng(2)
    page = logged(chance, town(chance, 1_500, 4_000))
    found = [summed(page, step).estimates(0.05, np.random.default_rng(3), replicates=50) for step in (4_000, 7)]
    for one, other in zip(*map(msgspec.structs.astuple, found), strict=True):
        assert one == pytest.approx(other)
    sums = Sums()
    sums.add(NO_PAGE)
    assert (sums.n, sums.users) == (0, 0)


def test_pairing_makes_the_lift_narrower_than_the_values_it_is_the_difference_of() -> None:
    chance = np.random.default_rng(4)
    page = logged(chance, town(chance, 500, 4_000, spread=0.3))
    found = summed(page).estimates(0.05, chance, replicates=300)
    assert found.lift.high - found.lift.low < 0.6 * (found.dr.high - found.dr.low)


def test_there_are_no_figures_when_one_policy_would_have_chosen_nothing_of_it() -> None:
    chance = np.random.default_rng(5)
    page = logged(chance, town(chance, 50, 100))
    for nothing in (page._replace(pi_challenger=np.zeros(100)), page._replace(pi_champion=np.zeros(100))):
        with pytest.raises(ValueError, match="no decision has a weight"):
            summed(nothing).estimates(0.05, chance)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.25, 1.0])
def test_truth_is_recovered_whoever_served(share: float) -> None:
    """Also where the reward model is only half right, and at every stage of a roll-out."""
    chance = np.random.default_rng(6)
    found = town(chance, 1_000, 20_000, skill=1.0)
    page = logged(chance, found, share=share, model=0.5)
    estimates = summed(page, 5_000).estimates(0.001, chance, replicates=300)
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
        ("as if it had always taken the best", lambda page: page._replace(pi_b=page.pi_champion**0.5)),
        ("without the share of chance", lambda page: page._replace(pi_b=(page.pi_b - 0.02) / 0.9 + 1e-3)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_logger_that_writes_down_wrong_probabilities_is_caught_by_the_mean_weight(what: str, logger: object) -> None:
    chance = np.random.default_rng(7)
    page = logged(chance, town(chance, 1_000, 16_000, skill=1.0))
    assert judged(summed(page).estimates(0.01, chance, replicates=100)).word == "promote"
    wrong = summed(logger(page)).estimates(0.01, chance, replicates=100)  # type: ignore[operator]  # a function
    found = judged(wrong)
    assert found.word == "hold", what
    assert "logged probabilities are wrong" in found.reason


def test_decisions_lost_by_what_was_chosen_are_caught_by_the_mean_weight() -> None:
    chance = np.random.default_rng(8)
    page = logged(chance, town(chance, 1_000, 16_000))
    kept = np.flatnonzero((page.pi_challenger > page.pi_b) | (chance.random(16_000) < 0.8))
    lost = Page([page.users[row] for row in kept], *(column[kept] for column in page[1:]))
    assert "decisions got lost" in judged(summed(lost).estimates(0.01, chance, replicates=100)).reason


def test_who_serves_everybody_has_weights_of_exactly_one_and_loses_no_decision() -> None:
    chance = np.random.default_rng(9)
    found = town(chance, 500, 4_000)
    shadow, everybody = (
        summed(logged(chance, found, share=share)).estimates(0.05, chance, replicates=50) for share in (0.0, 1.0)
    )
    assert (shadow.champion_mean_weight, shadow.champion_mean_weight_error, shadow.champion_ess) == (1, 0, 4_000)
    assert (everybody.mean_weight, everybody.mean_weight_error, everybody.ess) == (1, 0, 4_000)
    assert everybody.champion_ess < 4_000 > shadow.ess


def test_lift_is_not_believed_when_what_the_challenger_served_says_little_of_the_champion() -> None:
    """At 100 % it is the champion whose earnings are only estimated, from rare choices of great weight."""
    chance = np.random.default_rng(10)
    page = logged(chance, town(chance, 1_000, 16_000, skill=4.0, spread=2.5), share=1.0, model=0.5)
    estimates = summed(page).estimates(0.01, chance, replicates=100)
    assert estimates.ess == 16_000
    found = judged(estimates)
    assert found.word == "insufficient data"
    assert "16,000 decisions say as much of the champion as" in found.reason


def test_decisions_lost_while_the_challenger_serves_everybody_are_caught_by_the_champions_mean_weight() -> None:
    chance = np.random.default_rng(11)
    page = logged(chance, town(chance, 1_000, 16_000), share=1.0)
    kept = np.flatnonzero((page.pi_champion > page.pi_b) | (chance.random(16_000) < 0.8))
    lost = Page([page.users[row] for row in kept], *(column[kept] for column in page[1:]))
    estimates = summed(lost).estimates(0.01, chance, replicates=100)
    assert estimates.mean_weight == 1
    found = judged(estimates)
    assert found.word == "hold"
    assert "The champion's mean weight is" in found.reason
    assert "decisions got lost" in found.reason
