"""Sums evaluated decisions per user, and computes the off-policy estimates of both policies from these sums.

A decision with reward r has the importance weight w = π(chosen) / π_b(chosen) for each policy π, where π_b is the
policy that served. The estimates of a policy's reward per decision, over n decisions:

- IPS, inverse propensity scoring: (1/n) Σ w r. Unbiased, but may lie outside the range of the rewards. D. G. Horvitz,
  D. J. Thompson: A generalization of sampling without replacement, JASA 47, 1952.
- SNIPS, self-normalised: Σ w r / Σ w. Within the range of the rewards; the bias vanishes as n grows. A. Swaminathan,
  T. Joachims: The self-normalized estimator for counterfactual learning, NIPS 2015.
- DR, doubly robust: (1/n) Σ (v + w (r - q(chosen))), with the reward q(a) that a model predicts for candidate a, and
  v = Σₐ π(a) q(a). Unbiased whatever the model predicts, since the propensities are exact; the better the model, the
  smaller the variance. M. Dudík, J. Langford, L. Li: Doubly robust policy evaluation and learning, ICML 2011.

The effective sample size is (Σ w)² / Σ w² (L. Kish: Survey Sampling, 1965). The lift, challenger minus champion, is the
mean difference of the policies' doubly robust terms on the same decisions, so common noise cancels.

The excess of dismissals is the difference of the two IPS estimates of the share of dismissed tips, with two *control
variates*: Δw and Δw q(chosen) - Δv (Δ: challenger minus champion), whose expected values are 0 since the propensities
are exact. Least squares over users finds their coefficients a and b. The result is the doubly robust estimate whose
model of a dismissal is a + b q. J. M. Hammersley, D. C. Handscomb: Monte Carlo methods, 1964.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from app.bandit.model.inputs import Array
from app.bandit.numpy_on_demand import np
from app.bandit.rollout.bootstrap_intervals import (
    REPLICATES,
    Interval,
    IntervalView,
    binomial_tail,
    bootstrap,
    guarded,
    standard_error,
)

_COLUMNS = 13
(_N, _W_CHAMPION, _W, _IPS_CHAMPION, _IPS, _CHAMPION, _DR, _LIFT, _DISMISSED_CHAMPION, _DISMISSED) = range(10)
(_N_POOL, _POOL, _PROFILE) = range(10, _COLUMNS)
FEWEST_USERS = 100  # for an interval over users


class DecisionPage(NamedTuple):
    """A page of evaluated decisions, in columns of shape (n,) with one element per decision.

    `pi_b` is π(chosen) of the policy that served; `pi_champion` and `pi_challenger` are π(chosen) of these policies.
    `q_logged` is q(chosen), the predicted reward of the chosen candidate. `v_champion` and `v_challenger` are
    v = Σₐ π(a) q(a), the predicted reward of each policy. `dismissed` is 1 if the tip was dismissed, else 0. `agreed`
    is 1 if both policies rank the same candidate first, else 0. `pi_pool` and `v_pool` are π(chosen) and v of a third
    policy, the champion with the pooled prior; NaN if they were not computed.
    """

    users: list[str]
    rewards: Array
    pi_b: Array
    pi_champion: Array
    pi_challenger: Array
    q_logged: Array
    v_champion: Array
    v_challenger: Array
    dismissed: Array
    agreed: Array
    pi_pool: Array
    v_pool: Array


class Estimates(msgspec.Struct, frozen=True):
    """Off-policy estimates of both policies, from `n` decisions of `users` users.

    `ips`, `snips` and `dr` estimate the challenger's reward per decision. `champion` is the champion's reward by `dr`,
    and `lift` the challenger's minus the champion's. `mean_weight`, its standard error and `ess` (effective sample
    size) describe the challenger's importance weights, `champion_…` the champion's. `agreement` is the share of
    decisions in which both rank the same candidate first. `dismissed_…` are estimated shares of dismissed tips.
    `effective_users` is (Σ nᵤ)² / Σ nᵤ², if user u made nᵤ decisions: the number of equally active users that would be
    as informative.

    A third policy, the champion with the pooled prior, splits the lift. `lift_pool` is its reward minus the champion's,
    and `lift_profile` is the challenger's reward minus that of the third policy. Both are estimated from the
    `pool_decisions` decisions for which the third policy was computed. They are None if `pool_decisions` is 0.
    """

    n: int
    users: int
    agreement: float
    ips: Interval
    snips: Interval
    dr: Interval
    champion: Interval
    lift: Interval
    mean_weight: float
    mean_weight_error: float
    ess: float
    champion_mean_weight: float
    champion_mean_weight_error: float
    champion_ess: float
    dismissed_champion: float
    dismissed_challenger: float
    dismissed_more: Interval
    effective_users: float | None = None  # missing in looks of earlier releases, like those below
    pool_decisions: int = 0
    lift_pool: Interval | None = None
    lift_profile: Interval | None = None


class Arm(msgspec.Struct):
    """The users that one policy has served recently, and the number of their decisions. `reward` is their mean reward
    per decision; null for fewer than two users."""

    users: int
    decisions: int
    reward: IntervalView | None


class Experiment(msgspec.Struct):
    """The randomised experiment: each policy serves its own group of users. It covers recent decisions since the stage
    began. `share` is the share of users that the challenger should serve. `p` is the two-sided binomial p-value of the
    numbers of users under that share: if it is tiny, decisions of one group were probably lost. `lift` is the
    challenger's mean reward minus the champion's; null if a policy serves fewer than 100 users."""

    share: float
    p: float
    champion: Arm
    challenger: Arm
    lift: IntervalView | None

    @classmethod
    def of(cls, page: DecisionPage, by_challenger: Array, share: float) -> Experiment:
        """Compare the users of both policies. For each decision of the page, `by_challenger` is 1 if the challenger
        served it, 0 if the champion did, NaN to leave it out."""
        arms, lift = [], None
        for served, column in ((0, _IPS_CHAMPION), (1, _IPS)):  # a policy's own decisions have a weight of 1
            sums, own = DecisionSums(), np.flatnonzero(by_challenger == served)
            sums.add(DecisionPage([page.users[place] for place in own], *(column[own] for column in page[1:])))
            arms.append(Arm(sums.users, sums.n, sums.guarded(column) if sums.users > 1 else None))
        one, two = arms
        if min(one.users, two.users) >= FEWEST_USERS and one.reward is not None and two.reward is not None:
            value = two.reward.value - one.reward.value
            half = math.hypot(one.reward.high - one.reward.value, two.reward.high - two.reward.value)
            lift = IntervalView(value, value - half, value + half)
        users = one.users + two.users
        fewer, more = 1 - binomial_tail(two.users + 1, users, share), binomial_tail(two.users, users, share)
        return cls(share, min(1.0, 2 * min(fewer, more)), one, two, lift)


class DecisionSums:
    """Sums up pages of decisions, in any order. Only one row of sums per user is kept in memory."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}
        self._rows = np.zeros((1024, _COLUMNS))
        self._squares = self._squares_champion = 0.0
        self._agreed = 0.0

    @property
    def n(self) -> int:
        return int(self._rows[:, _N].sum())

    @property
    def users(self) -> int:
        return len(self._places)

    def add(self, page: DecisionPage) -> None:
        if not page.users:
            return
        places = np.array([self._places.setdefault(user, len(self._places)) for user in page.users])
        here, row = np.unique(places, return_inverse=True)
        while len(self._places) > len(self._rows):
            self._rows = np.vstack([self._rows, np.zeros_like(self._rows)])
        champion, challenger = page.pi_champion / page.pi_b, page.pi_challenger / page.pi_b
        residual = page.rewards - page.q_logged
        dr_champion = page.v_champion + champion * residual
        dr_challenger = page.v_challenger + challenger * residual
        dr_pool = page.v_pool + page.pi_pool / page.pi_b * residual
        columns = [
            np.ones_like(challenger),
            champion,
            challenger,
            champion * page.rewards,
            challenger * page.rewards,
            dr_champion,
            dr_challenger,
            dr_challenger - dr_champion,
            champion * page.dismissed,
            challenger * page.dismissed,
            np.isfinite(dr_pool),
            np.nan_to_num(dr_pool - dr_champion),
            np.nan_to_num(dr_challenger - dr_pool),
        ]
        self._rows[here] += np.stack([np.bincount(row, column) for column in columns], axis=1)
        self._squares += float(challenger @ challenger)
        self._squares_champion += float(champion @ champion)
        self._agreed += float(page.agreed.sum())

    def estimates(self, level: float, generator: np.random.Generator, replicates: int = REPLICATES) -> Estimates:
        """Compute the estimates, with bootstrap intervals that each miss the true value with probability `level`.
        Raises `ValueError` if there are fewer than two users, or every weight of a policy is 0."""
        rows = self._rows[: self.users]
        n, weight, weight_champion = rows[:, _N], rows[:, _W], rows[:, _W_CHAMPION]
        total, total_champion = float(weight.sum()), float(weight_champion.sum())
        if total == 0 or total_champion == 0:
            role = "champion" if total else "challenger"
            raise ValueError(f"every weight of the {role} is 0: it would have made none of these choices")
        ratios = {
            "ips": (_IPS, _N),
            "snips": (_IPS, _W),
            "dr": (_DR, _N),
            "champion": (_CHAMPION, _N),
            "lift": (_LIFT, _N),
        }
        if pooled := int(rows[:, _N_POOL].sum()):
            ratios |= {"lift_pool": (_POOL, _N_POOL), "lift_profile": (_PROFILE, _N_POOL)}
        parts, wholes = (rows[:, list(columns)] for columns in zip(*ratios.values(), strict=True))
        intervals = bootstrap(parts, wholes, level, generator, replicates)
        count = float(n.sum())
        dismissed_champion, dismissed_challenger, dismissed_more = self.dismissals()
        return Estimates(
            n=int(count),
            users=self.users,
            agreement=self._agreed / count,
            **dict(zip(ratios, intervals, strict=True)),
            mean_weight=total / count,
            mean_weight_error=standard_error(weight, n),
            ess=total**2 / self._squares,
            champion_mean_weight=total_champion / count,
            champion_mean_weight_error=standard_error(weight_champion, n),
            champion_ess=total_champion**2 / self._squares_champion,
            dismissed_champion=dismissed_champion,
            dismissed_challenger=dismissed_challenger,
            dismissed_more=dismissed_more,
            effective_users=count**2 / float(n @ n),
            pool_decisions=pooled,
        )

    def guarded(self, column: int) -> IntervalView:
        """The mean per decision of one column of the sums, with the confidence bounds that guardrails use."""
        rows = self._rows[: self.users]
        return IntervalView(*guarded(rows[:, column], rows[:, _N]))

    def dismissals(self) -> tuple[float, float, Interval]:
        """The champion's and the challenger's share of dismissed tips. The third item is the challenger's share minus
        the champion's, with the confidence bounds that guardrails use."""
        rows = self._rows[: self.users]
        n, delta = rows[:, _N], rows[:, _W] - rows[:, _W_CHAMPION]
        dismissed = rows[:, _DISMISSED] - rows[:, _DISMISSED_CHAMPION]
        controls = np.stack([delta, rows[:, _IPS] - rows[:, _IPS_CHAMPION] - rows[:, _LIFT]], axis=1)
        # The residuals about the means, since their variance over users is that of the estimate.
        columns = np.column_stack([controls, dismissed])
        columns -= n[:, None] * columns.sum(axis=0) / n.sum()
        coefficients = np.linalg.lstsq(columns[:, :2], columns[:, 2], rcond=None)[0]
        more = guarded(dismissed - controls @ coefficients, n)
        champion = float(rows[:, _DISMISSED_CHAMPION].sum() / n.sum())
        return champion, champion + more.value, more
