"""Decides the verdict on the challenger: one word, and a reason in whole sentences with the figures.

Invariant: the verdict is `promote` only if the whole interval of the lift lies above -margin and the figures are
credible. `app/bandit/README.md` lists the rules in the order in which `verdict` tests them. The first match decides.

With correct propensities the expected mean weight is 1. A different mean shows that propensities are wrong, or that
decisions about some candidates were lost more often than others. `verdict` tests the weights and effective sample sizes
of both policies, since the lift is the difference of two estimates.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from app.bandit.rollout.aggregates import FEWEST_USERS, Estimates, Experiment
from app.bandit.rollout.bootstrap_intervals import FIRST_LOOK, IntervalView

FEWEST_EFFECTIVE = 1_000
WEIGHT_ERRORS = 3.0
# Probability at which the numbers of users contradict the challenger's share; it is tested again as users arrive.
MISMATCH = 1e-4
# Allowed ratio of the challenger's answer time to the champion's, and share of answers that may take longer.
SLOWER = 1.5
SLOW_SHARE = 0.01
Word = Literal["insufficient data", "hold", "promote", "roll back"]


class DismissalsView(msgspec.Struct):
    """Dismissed tips under each policy, as shares of decisions; null if too few decisions were made. `more` is the
    challenger's share minus the champion's."""

    champion: float | None
    challenger: float | None
    more: IntervalView | None
    limit: float


class GuardrailView(msgspec.Struct):
    """A measurement that must not exceed its limit; the value is null if too few decisions were made."""

    value: float | None
    limit: float
    judged: Annotated[bool, Meta(description="False: only shown, since it is the champion's.")] = True

    @property
    def exceeded(self) -> bool:
        return self.judged and self.value is not None and self.value > self.limit


class GuardrailsView(msgspec.Struct):
    """The guardrails, measured on recent decisions. `broken` contains a sentence for each broken guardrail."""

    dismissals: DismissalsView
    p99_ms: GuardrailView
    slow_answers: Annotated[GuardrailView, Meta(description="Share that surely takes longer than allowed.")]
    no_profile: GuardrailView
    broken: list[str]


class Verdict(msgspec.Struct, frozen=True):
    """A verdict on the challenger. `improved`: the whole interval of its lift over the champion lies above 0."""

    word: Word
    reason: str
    improved: bool = False


def too_little(n: int, users: int | None = None, effective: float | None = None) -> Verdict | None:
    """The verdict `insufficient data` if `n` is below `FIRST_LOOK`, or if `users` or the effective users are below
    `FEWEST_USERS`; otherwise None. Numbers that are None are not checked."""
    if n < FIRST_LOOK:
        return Verdict("insufficient data", f"{_decisions(n)} can be evaluated; the first look is at {FIRST_LOOK:,}.")
    if users is not None and min(users, effective or users) < FEWEST_USERS:
        count = f"{users:,} user" + ("" if users == 1 else "s")
        if users >= FEWEST_USERS:
            count += f", who count as {effective:,.0f} because some made far more decisions than others"
        reason = f"The decisions are those of {count}; an interval over users needs {FEWEST_USERS}."
        return Verdict("insufficient data", reason)
    return None


def broken(guardrails: GuardrailsView, experiment: Experiment | None, margin: float) -> list[str]:
    """One sentence for each broken guardrail. `margin` is the tolerated loss in reward per decision."""
    found, dismissals, p99 = [], guardrails.dismissals, guardrails.p99_ms
    if (more := dismissals.more) is not None and more.low > dismissals.limit:
        found.append(
            f"The challenger's tips are dismissed more often, {dismissals.challenger:.1%} against "
            f"{dismissals.champion:.1%}: {more.value:.1%} more ({more.low:.1%} to {more.high:.1%}), where "
            f"{dismissals.limit:.1%} is allowed."
        )
    if guardrails.slow_answers.exceeded:
        found.append(
            f"One answer in a hundred takes over {p99.value:,.0f} ms; {p99.limit:,.0f} ms is allowed. "
            f"At least {guardrails.slow_answers.value:.1%} of the challenger's answers take longer."
        )
    if (missing := guardrails.no_profile).exceeded:
        found.append(
            f"{missing.value:.1%} of the decisions were made without a profile, where {missing.limit:.1%} "
            "is allowed; without profiles the challenger has no advantage."
        )
    lift = experiment.lift if experiment is not None else None
    if lift is not None and lift.high < -margin:
        found.append(
            f"The challenger's users earn {lift.value:+z.4f} a recent decision compared with the champion's "
            f"({lift.low:+z.4f} to {lift.high:+z.4f}), where a loss of {margin:g} is allowed."
        )
    return found


def effective_needed(n: int) -> float:
    """The effective sample size that both policies must reach for n decisions; below it, data are insufficient."""
    return max(FEWEST_EFFECTIVE, n / 10)


def verdict(
    figures: Estimates, margin: float, broken: Sequence[str] = (), experiment: Experiment | None = None
) -> Verdict:
    """Decide whether the challenger advances, waits or is rolled back, from the figures of one look, the sentences
    about broken guardrails, and the users of each policy."""
    if broken:
        return Verdict("roll back", " ".join(broken))
    few = too_little(figures.n, figures.users, figures.effective_users)
    return few or _not_credible(figures, experiment) or _on_lift(figures, margin)


def _not_credible(figures: Estimates, users: Experiment | None) -> Verdict | None:
    if users is not None and users.p < MISMATCH:
        share = users.challenger.users / (users.champion.users + users.challenger.users)
        reason = (
            f"The challenger serves {share:.1%} of the users with recent decisions instead of {users.share:.0%}, so "
            "the policies cannot be compared: a process ignores the roll-out, or decisions of one policy got lost."
        )
        return Verdict("hold", reason)
    for role, mean, error in (
        ("challenger", figures.mean_weight, figures.mean_weight_error),
        ("champion", figures.champion_mean_weight, figures.champion_mean_weight_error),
    ):
        if abs(mean - 1) > WEIGHT_ERRORS * error + 1e-9:
            reason = (
                f"The {role}'s mean weight is {mean:.3f} ± {error:.3f} instead of 1, so the figures are not credible: "
                "logged probabilities are wrong, or decisions got lost."
            )
            return Verdict("hold", reason)
    needed = effective_needed(figures.n)
    least, role = min((figures.ess, "challenger"), (figures.champion_ess, "champion"))
    if least < needed:
        reason = (
            f"The effective sample size of {_decisions(figures.n)} is {least:,.0f} for the {role}; "
            f"{needed:,.0f} is needed."
        )
        return Verdict("insufficient data", reason)
    return None


def _on_lift(figures: Estimates, margin: float) -> Verdict:
    lift = figures.lift
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
