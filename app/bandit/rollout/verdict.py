"""The verdict on the challenger: one word, and the reason for it in whole sentences with the figures.

Invariant: no word but `roll back` and `hold` is said where the figures cannot be believed, and `promote` only where the
lift's whole interval lies above -margin. Rules are tried in this order:

1. a guardrail is broken: `roll back`; it is the safe thing, so nothing else has to be known for it
2. there are fewer decisions than the first look needs, or fewer users than an interval needs: `insufficient data`
3. a policy's mean weight is further from 1 than 3 standard errors: `hold`. Under right propensities it is 1 on average,
   so these are wrong, or decisions got lost depending on what was chosen
4. a policy's effective sample size is below max(1000, n/10): `insufficient data`
5. the lift is below -margin for certain: `roll back`
6. it is above -margin for certain: `promote`, one step; an improvement may be claimed where it is above 0 for certain
7. else: `hold`

Both policies have to pass 3 and 4, for the lift is the difference of two estimates. Whoever served a decision has the
weight 1 there: in the shadow the champion passes as it is, at 100 % the challenger does.

Pure: it knows neither where figures come from nor what is done about a verdict.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from app.bandit.rollout.aggregates import Estimates
from app.bandit.rollout.bootstrap_intervals import FIRST_LOOK, Interval

FEWEST_USERS = 30
FEWEST_EFFECTIVE = 1_000
WEIGHT_ERRORS = 3.0
# Of the champion's time. The slowest of two hundred answers vary as much by chance.
SLOWER = 1.5
Word = Literal["insufficient data", "hold", "promote", "roll back"]


class Limits(msgspec.Struct, frozen=True):
    """What is tolerated. `margin` is a loss of reward a decision; `dismissed`, `no_profile` are shares of decisions."""

    margin: float = 0.02
    dismissed: float = 0.03
    p99_ms: float = 100.0
    no_profile: float = 0.5


class Guardrails(msgspec.Struct, frozen=True):
    """What must not break, whatever the reward, of late. None: there were too few decisions to say.

    `dismissed_more`: how much more often the challenger's choices are dismissed, as a share of all decisions.
    `p99_ms` is of the challenger's answers once it serves; then `champion_p99_ms` is of the champion's meanwhile. In
    the shadow it is of all answers, to be looked at and not judged: how long the challenger takes is not known.
    """

    dismissed_champion: float | None = None
    dismissed_challenger: float | None = None
    dismissed_more: Interval | None = None
    p99_ms: float | None = None
    no_profile: float | None = None
    champion_p99_ms: float | None = None
    p99_judged: bool = True


class Verdict(msgspec.Struct, frozen=True):
    """What to do, why, and whether an improvement may be claimed."""

    word: Word
    reason: str
    improved: bool = False


def too_little(n: int, users: int | None = None) -> Verdict | None:
    """`insufficient data`, where no look can be made of so few; None where one can."""
    if n < FIRST_LOOK:
        return Verdict("insufficient data", f"{_decisions(n)} can be evaluated; the first look is at {FIRST_LOOK:,}.")
    if users is not None and users < FEWEST_USERS:
        count = f"{users} user" + ("" if users == 1 else "s")
        reason = f"The decisions are those of {count}; an interval over users needs {FEWEST_USERS}."
        return Verdict("insufficient data", reason)
    return None


def broken(rails: Guardrails, limits: Limits) -> list[str]:
    """A sentence for each guardrail that does not hold."""
    found = []
    more, challenger, champion = rails.dismissed_more, rails.dismissed_challenger, rails.dismissed_champion
    if more is not None and challenger is not None and champion is not None and more.low > limits.dismissed:
        found.append(
            f"The challenger's tips are dismissed more often, {challenger:.1%} against {champion:.1%}: "
            f"{more.value:.1%} more ({more.low:.1%} to {more.high:.1%}), where {limits.dismissed:.1%} is allowed."
        )
    slowest = rails.p99_ms if rails.p99_judged else None
    if slowest is not None and slowest > (allowed := longest_allowed(rails, limits)):
        found.append(f"One answer in a hundred takes over {slowest:,.0f} ms; {allowed:,.0f} ms is allowed.")
    if rails.no_profile is not None and rails.no_profile > limits.no_profile:
        found.append(
            f"{rails.no_profile:.1%} of the decisions were made without a profile, where {limits.no_profile:.1%} is "
            "allowed; so the challenger does not get what it is there for."
        )
    return found


def longest_allowed(rails: Guardrails, limits: Limits) -> float:
    """How long 99 in 100 answers may take, in ms: more than the limit where the champion is as slow at the same time.

    A machine that is slow for all users is no fault of the challenger, and going back would not help.
    """
    return max(limits.p99_ms, SLOWER * (rails.champion_p99_ms or 0.0))


def effective_needed(n: int) -> float:
    """The effective sample size that so many decisions must have."""
    return max(FEWEST_EFFECTIVE, n / 10)


def verdict(figures: Estimates, rails: Guardrails, limits: Limits) -> Verdict:
    """The verdict on a look's figures, and on the guardrails as they are now."""
    if found := broken(rails, limits):
        return Verdict("roll back", " ".join(found))
    return too_little(figures.n, figures.users) or _unbelievable(figures) or _on_the_lift(figures, limits)


def _unbelievable(figures: Estimates) -> Verdict | None:
    for who, mean, error in (
        ("challenger", figures.mean_weight, figures.mean_weight_error),
        ("champion", figures.champion_mean_weight, figures.champion_mean_weight_error),
    ):
        if abs(mean - 1) > WEIGHT_ERRORS * error + 1e-9:
            reason = (
                f"The {who}'s mean weight is {mean:.3f} ± {error:.3f} where it should be 1, so the figures cannot be "
                "believed: logged probabilities are wrong, or decisions got lost."
            )
            return Verdict("hold", reason)
    needed = effective_needed(figures.n)
    least, who = min((figures.ess, "challenger"), (figures.champion_ess, "champion"))
    if least < needed:
        reason = (
            f"{_decisions(figures.n)} say as much of the {who} as {least:,.0f} of its own would; "
            f"{needed:,.0f} are needed."
        )
        return Verdict("insufficient data", reason)
    return None


def _on_the_lift(figures: Estimates, limits: Limits) -> Verdict:
    lift, margin = figures.lift, limits.margin
    figure = (
        f"Over {_decisions(figures.n)} of {figures.users:,} users the challenger earns {lift.value:+z.4f} a decision "
        f"compared with the champion ({lift.low:+z.4f} to {lift.high:+z.4f})."
    )
    if lift.high < -margin:
        return Verdict("roll back", f"{figure} That is a loss of more than {margin:g} for certain.")
    if lift.low > 0:
        return Verdict("promote", f"{figure} That is an improvement.", improved=True)
    if lift.low > -margin:
        reason = f"{figure} A loss of more than {margin:g} is ruled out; an improvement is not shown."
        return Verdict("promote", reason)
    return Verdict("hold", f"{figure} A loss of more than {margin:g} is not ruled out.")


def _decisions(count: int) -> str:
    return f"{count:,} decision" + ("" if count == 1 else "s")
