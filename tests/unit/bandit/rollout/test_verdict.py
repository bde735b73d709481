"""The verdict: every rule, in its order, with its reason."""

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from app.bandit.rollout.aggregates import Arm, Estimates, Experiment
from app.bandit.rollout.bootstrap_intervals import Interval, IntervalView
from app.bandit.rollout.verdict import (
    SLOW_SHARE,
    SLOWER,
    DismissalsView,
    GuardrailsView,
    GuardrailView,
    Verdict,
    broken,
    too_little,
    verdict,
)
from app.settings.parsers import RolloutRails

RAILS, MARGIN = RolloutRails(dismissed=0.03, p99_ms=100, no_profile=0.5), 0.02
VALUE = Interval(0.4, 0.38, 0.42)
FIGURES = Estimates(
    n=8_000,
    users=900,
    agreement=0.7,
    ips=VALUE,
    snips=VALUE,
    dr=VALUE,
    champion=VALUE,
    lift=Interval(0.01, 0.002, 0.018),
    mean_weight=1.01,
    mean_weight_error=0.01,
    ess=3_000,
    champion_mean_weight=0.99,
    champion_mean_weight_error=0.01,
    champion_ess=4_000,
    dismissed_champion=0.2,
    dismissed_challenger=0.2,
    dismissed_more=Interval(0.0, -0.01, 0.01),
)


def experiment(value: float, high: float, p: float = 0.5) -> Experiment:
    """The users of each policy, with the challenger's lift and its upper bound."""
    arms = Arm(1_000, 9_000, None), Arm(100, 900, None)
    return Experiment(0.05, p, *arms, IntervalView(value, 2 * value - high, high))


def guardrails(
    *,
    dismissals: tuple[float, float, Interval] | None = (0.2, 0.21, Interval(0.01, -0.01, 0.03)),
    p99_ms: float | None = 12.0,
    p99_judged: bool = True,
    champion_p99_ms: float | None = None,
    slow: float | None = None,
    no_profile: float | None = 0.2,
) -> GuardrailsView:
    """Measurements, of which none is over its limit by default."""
    champion, challenger, more = dismissals or (None, None, None)
    return GuardrailsView(
        DismissalsView(champion, challenger, more and IntervalView(*more), RAILS.dismissed),
        GuardrailView(p99_ms, max(RAILS.p99_ms, SLOWER * (champion_p99_ms or 0)), p99_judged),
        GuardrailView(slow, SLOW_SHARE, p99_judged),
        GuardrailView(no_profile, RAILS.no_profile),
        [],
    )


def judged(**fields: Any) -> Verdict:
    """The verdict on a good challenger with some fields of estimates or guardrails replaced."""
    experiment = fields.pop("experiment", None)
    others = {name: fields.pop(name) for name in Estimates.__struct_fields__ if name in fields}
    sentences = broken(guardrails(**fields), experiment, MARGIN)
    return verdict(msgspec.structs.replace(FIGURES, **others), MARGIN, sentences, experiment)


RULES: list[tuple[dict[str, Any], str, str]] = [
    ({}, "promote", "That is an improvement."),
    ({"n": 3_999}, "insufficient data", "3,999 decisions can be evaluated; the first look is at 4,000."),
    ({"users": 99}, "insufficient data", "those of 99 users; an interval over users needs 100."),
    (
        {"n": 4_000, "users": 100, "ess": 1_000, "champion_ess": 1_000},
        "promote",
        "Over 4,000 decisions of 100 users",
    ),
    ({"effective_users": 99.0}, "insufficient data", "900 users, who count as 99 because some made far more"),
    ({"effective_users": 100.0}, "promote", "improvement"),
    ({"mean_weight": 1.0301}, "hold", "The challenger's mean weight is 1.030 ± 0.010 instead of 1"),
    ({"champion_mean_weight": 1.0301}, "hold", "The champion's mean weight is 1.030 ± 0.010 instead of 1"),
    ({"champion_mean_weight": 1.03}, "promote", "improvement"),
    ({"champion_mean_weight": 1.0, "champion_mean_weight_error": 0.0}, "promote", "improvement"),
    ({"mean_weight": 0.9699}, "hold", "not credible"),
    ({"mean_weight": 1.03}, "promote", "improvement"),
    ({"mean_weight": 1 + 1e-12, "mean_weight_error": 0.0}, "promote", "improvement"),
    ({"ess": 999}, "insufficient data", "size of 8,000 decisions is 999 for the challenger"),
    ({"n": 20_000, "ess": 1_999}, "insufficient data", "2,000 is needed"),
    ({"n": 20_000, "ess": 2_000}, "promote", "improvement"),
    ({"champion_ess": 999}, "insufficient data", "size of 8,000 decisions is 999 for the champion"),
    ({"n": 50_000, "ess": 50_000, "champion_ess": 4_999}, "insufficient data", "5,000 is needed"),
    ({"ess": 998, "champion_ess": 999}, "insufficient data", "998 for the challenger"),
    ({"ess": 999, "champion_ess": 998}, "insufficient data", "998 for the champion"),
    ({"lift": Interval(0.01, 0.0, 0.02)}, "promote", "an improvement is not shown"),
    ({"lift": Interval(-0.00001, -0.01, 0.00001)}, "promote", "earns +0.0000 a decision"),
    ({"lift": Interval(0.01, -0.00001, 0.02)}, "promote", "(+0.0000 to +0.0200)"),
    ({"lift": Interval(0.0, -0.0199, 0.02)}, "promote", "A loss of more than 0.02 is ruled out"),
    ({"lift": Interval(0.0, -0.02, 0.02)}, "hold", "A loss of more than 0.02 is not ruled out."),
    ({"lift": Interval(-0.03, -0.05, -0.02)}, "hold", "not ruled out"),
    ({"lift": Interval(-0.04, -0.06, -0.021)}, "roll back", "a loss of more than 0.02 for certain"),
    (
        {"dismissals": (0.2, 0.25, Interval(0.05, 0.031, 0.07))},
        "roll back",
        "5.0% more (3.1% to 7.0%), where 3.0% is allowed",
    ),
    ({"dismissals": (0.2, 0.25, Interval(0.05, 0.03, 0.07))}, "promote", "improvement"),
    ({"p99_ms": 250.0, "slow": 0.02}, "roll back", "One answer in a hundred takes over 250 ms; 100 ms is allowed."),
    ({"p99_ms": 250.0, "slow": 0.02}, "roll back", "At least 2.0% of the challenger's answers take longer."),
    ({"p99_ms": 250.0, "slow": 0.01}, "promote", "improvement"),
    ({"p99_ms": 250.0, "slow": 0.02, "p99_judged": False}, "promote", "improvement"),
    ({"p99_ms": 361.0, "champion_p99_ms": 240.0, "slow": 0.02}, "roll back", "361 ms; 360 ms is allowed."),
    ({"p99_ms": None, "no_profile": None, "dismissals": None}, "promote", "improvement"),
    ({"experiment": experiment(-0.05, -0.021)}, "roll back", "earn -0.0500 a recent decision compared with the"),
    ({"experiment": experiment(-0.05, -0.02)}, "promote", "improvement"),
    (
        {"experiment": experiment(0.0, 0.1, p=9e-5)},
        "hold",
        "9.1% of the users with recent decisions instead of 5%",
    ),
    ({"experiment": experiment(0.0, 0.1, p=1e-4)}, "promote", "improvement"),
    ({"no_profile": 0.61}, "roll back", "61.0% of the decisions were made without a profile"),
    # The first rule that applies decides.
    ({"n": 10, "p99_ms": 250.0, "slow": 0.02}, "roll back", "250 ms"),
    ({"n": 10, "mean_weight": 2.0}, "insufficient data", "10 decisions"),
    ({"n": 1}, "insufficient data", "1 decision can"),
    ({"mean_weight": 2.0, "p99_ms": 250.0, "slow": 0.02}, "roll back", "250 ms"),
    ({"mean_weight": 2.0, "ess": 10}, "hold", "not credible"),
    ({"champion_mean_weight": 2.0, "ess": 10}, "hold", "The champion's mean weight"),
    ({"mean_weight": 2.0, "lift": Interval(-0.4, -0.6, -0.2)}, "hold", "not credible"),
    ({"ess": 10, "lift": Interval(-0.4, -0.6, -0.2)}, "insufficient data", "needed"),
]


def test_verdict_follows_the_rules_in_their_order() -> None:
    for fields, word, reason in RULES:
        found = judged(**fields)
        assert (found.word, found.improved) == (
            word,
            word == "promote" and FIGURES.lift.low > 0 and "lift" not in fields,
        ), fields
        assert reason in found.reason
        assert found.reason.endswith(".")
        assert found.reason[0].isupper() or found.reason[0].isdigit()


def test_reason_names_every_guardrail_that_is_broken() -> None:
    bad: dict[str, Any] = {
        "dismissals": (0.2, 0.25, Interval(0.05, 0.04, 0.06)),
        "p99_ms": 101.0,
        "slow": 0.02,
        "no_profile": 0.9,
    }
    assert len(broken(guardrails(**bad), None, MARGIN)) == 3
    reason = judged(**bad).reason
    assert all(part in reason for part in ("dismissed more often", "101 ms", "90.0%"))
    assert broken(guardrails(), None, MARGIN) == []


def test_reason_has_the_singular_for_one_user() -> None:
    found = too_little(5_000, 1)
    assert found is not None
    assert "those of 1 user;" in found.reason
    assert too_little(4_000, 100) is None


bounds = st.tuples(*[st.floats(-1, 1)] * 3).map(sorted).map(lambda three: Interval(three[1], three[0], three[2]))
weights = st.tuples(st.floats(0, 10), st.floats(0, 1), st.floats(0, 10**7))  # their mean, its error, effective size


@given(
    n=st.integers(0, 10**7),
    users=st.integers(0, 10**6),
    lift=bounds,
    more=bounds,
    of_challenger=weights,
    of_champion=weights,
    slow=st.one_of(st.none(), st.floats(0, 0.1)),
)
def test_promote_is_given_if_and_only_if_every_condition_holds(
    n: int,
    users: int,
    lift: Interval,
    more: Interval,
    of_challenger: tuple[float, float, float],
    of_champion: tuple[float, float, float],
    slow: float | None,
) -> None:
    weight, error, ess = of_challenger
    champion_weight, champion_error, champion_ess = of_champion
    found = judged(
        n=n,
        users=users,
        lift=lift,
        dismissals=(0.2, 0.21, more),
        mean_weight=weight,
        mean_weight_error=error,
        ess=ess,
        champion_mean_weight=champion_weight,
        champion_mean_weight_error=champion_error,
        champion_ess=champion_ess,
        p99_ms=200.0,
        slow=slow,
    )
    gate = (
        n >= 4_000
        and users >= 100
        and abs(weight - 1) <= 3 * error + 1e-9
        and abs(champion_weight - 1) <= 3 * champion_error + 1e-9
        and min(ess, champion_ess) >= max(1_000, n / 10)
        and lift.low > -0.02
        and more.low <= 0.03
        and (slow is None or slow <= 0.01)
    )
    assert (found.word == "promote") == gate
    assert found.improved == (gate and lift.low > 0)
