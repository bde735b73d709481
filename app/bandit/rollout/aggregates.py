"""Sums evaluated decisions per user, and computes the off-policy estimates of both policies from these sums.

Decisions come in pages, in any order, and are not kept. Memory is one row of sums per user.

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
mean difference of the policies' doubly robust terms on the same decisions, so common noise cancels. If the reward model
always predicts 0, it is the difference of the two IPS estimates.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from app.bandit.model.inputs import Array
from app.bandit.numpy_on_demand import np
from app.bandit.rollout.bootstrap_intervals import REPLICATES, Interval, bootstrap, standard_error

(_N, _W_CHAMPION, _W, _IPS, _DR, _CHAMPION, _LIFT, _DISMISSED_CHAMPION, _DISMISSED, _MORE_DISMISSED) = range(10)
_COLUMNS = 10
_INITIAL_ROWS = 1024


class DecisionPage(NamedTuple):
    """A page of evaluated decisions, in columns of shape (n,) with one element per decision.

    `pi_b` is the probability with which the policy that served chose the candidate; `pi_champion` and `pi_challenger`
    are the probabilities of the same choice under each policy. `q_logged` is the predicted reward of the chosen
    candidate, `v_champion` and `v_challenger` are the predicted rewards v of the policies.
    `dismissed` is 1 if the tip was dismissed, `agreed` is 1 if both policies rank the same candidate first, else 0.
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


class Estimates(msgspec.Struct, frozen=True):
    """Off-policy estimates of both policies, from `n` decisions of `users` users.

    `ips`, `snips` and `dr` estimate the challenger's reward per decision by the three methods of this module.
    `champion` is the champion's reward by `dr`, and `lift` the challenger's minus the champion's. `mean_weight` and
    `ess` (effective sample size) describe the challenger's importance weights, `champion_…` the champion's; errors are
    standard errors. `agreement` is the share of decisions in which both rank the same candidate first. The dismissal
    figures are shares of decisions, too; `dismissed_more` is the challenger's share minus the champion's.
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


class DecisionSums:
    def __init__(self) -> None:
        self._places: dict[str, int] = {}
        self._rows = np.zeros((_INITIAL_ROWS, _COLUMNS))
        self._squares = self._squares_champion = 0.0
        self._agreed = 0.0

    @property
    def n(self) -> int:
        """The number of decisions added."""
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
        columns = [
            np.ones_like(challenger),
            champion,
            challenger,
            challenger * page.rewards,
            dr_challenger,
            dr_champion,
            dr_challenger - dr_champion,
            champion * page.dismissed,
            challenger * page.dismissed,
            (challenger - champion) * page.dismissed,
        ]
        self._rows[here] += np.stack([np.bincount(row, column) for column in columns], axis=1)
        self._squares += float(challenger @ challenger)
        self._squares_champion += float(champion @ champion)
        self._agreed += float(page.agreed.sum())

    def estimates(self, level: float, generator: np.random.Generator, replicates: int = REPLICATES) -> Estimates:
        """Compute the estimates, with bootstrap intervals that each miss the true value with probability `level`.

        Raises:
            ValueError: there are fewer than two users, or every weight of a policy is 0.
        """
        rows = self._rows[: self.users]
        n, weight, weight_champion = rows[:, _N], rows[:, _W], rows[:, _W_CHAMPION]
        total, total_champion = float(weight.sum()), float(weight_champion.sum())
        if total == 0 or total_champion == 0:
            role = "champion" if total else "challenger"
            raise ValueError(f"every weight of the {role} is 0: it would have made none of these choices")
        parts = rows[:, [_IPS, _IPS, _DR, _CHAMPION, _LIFT, _MORE_DISMISSED]]
        wholes = np.stack([n, weight, n, n, n, n], axis=1)
        ips, snips, dr, champion, lift, more = bootstrap(parts, wholes, level, generator, replicates)
        count = float(n.sum())
        return Estimates(
            n=int(count),
            users=self.users,
            agreement=self._agreed / count,
            ips=ips,
            snips=snips,
            dr=dr,
            champion=champion,
            lift=lift,
            mean_weight=total / count,
            mean_weight_error=standard_error(weight, n),
            ess=total**2 / self._squares,
            champion_mean_weight=total_champion / count,
            champion_mean_weight_error=standard_error(weight_champion, n),
            champion_ess=total_champion**2 / self._squares_champion,
            dismissed_champion=float(rows[:, _DISMISSED_CHAMPION].sum()) / count,
            dismissed_challenger=float(rows[:, _DISMISSED].sum()) / count,
            dismissed_more=more,
        )
