"""Decisions summed up per user: all that the figures of a look need, however many decisions there are.

Decisions come in pages, in any order. Kept are a row of sums for each user and a few totals; no decision.

Both policies are weighted against the one that served, on the same decisions: w = pi(chosen) / pi_b(chosen). The lift
is the difference of the two doubly-robust terms, decision by decision, so what both have in common cancels. It is
unbiased whatever the reward model says, since the propensities are exact. Without a reward model (all terms 0) it is
the difference of the two IPS terms.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import numpy as np

from app.bandit.rollout.bootstrap_intervals import REPLICATES, Interval, bootstrap, standard_error
from app.bandit.rollout.off_policy import Floats

(_N, _W_CHAMPION, _W, _IPS, _DR, _CHAMPION, _LIFT, _DISMISSED_CHAMPION, _DISMISSED, _MORE_DISMISSED) = range(10)
_COLUMNS = 10
_GROWTH = 1024


class Page(NamedTuple):
    """Evaluated decisions, one a row.

    `pi_b`, `pi_champion` and `pi_challenger` are probabilities of the chosen candidate: when it was chosen, and under
    both policies. `q_logged` is the reward that was expected of it, `v_champion` and `v_challenger` what was expected
    of the policies (see `evaluation.dr`). `dismissed` and `agreed` are 0 or 1: both policies put the same candidate
    first, or not.
    """

    users: list[str]
    rewards: Floats
    pi_b: Floats
    pi_champion: Floats
    pi_challenger: Floats
    q_logged: Floats
    v_champion: Floats
    v_challenger: Floats
    dismissed: Floats
    agreed: Floats


class Estimates(msgspec.Struct, frozen=True):
    """What a look found. Values are rewards a decision; `mean_weight` and `ess` are of the challenger's weights.

    The champion's stand beside them, for the lift rests on both: while one policy serves every user its own weights are
    exactly 1, and only the other's say how much the decisions are worth.
    `dismissed_more` is how much more often the challenger's choices are dismissed, as a share of all decisions.
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


class Sums:
    """The sums so far."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}
        self._rows = np.zeros((_GROWTH, _COLUMNS))
        self._squares = self._squares_champion = 0.0
        self._agreed = 0.0

    @property
    def n(self) -> int:
        """How many decisions."""
        return int(self._rows[:, _N].sum())

    @property
    def users(self) -> int:
        """Of how many users."""
        return len(self._places)

    def add(self, page: Page) -> None:
        """Count these decisions in."""
        if not page.users:
            return
        places = np.array([self._places.setdefault(user, len(self._places)) for user in page.users])
        here, row = np.unique(places, return_inverse=True)
        while len(self._places) > len(self._rows):
            self._rows = np.vstack([self._rows, np.zeros_like(self._rows)])
        champion, challenger = page.pi_champion / page.pi_b, page.pi_challenger / page.pi_b
        surprise = page.rewards - page.q_logged
        of_champion = page.v_champion + champion * surprise
        of_challenger = page.v_challenger + challenger * surprise
        columns = [
            np.ones_like(challenger),
            champion,
            challenger,
            challenger * page.rewards,
            of_challenger,
            of_champion,
            of_challenger - of_champion,
            champion * page.dismissed,
            challenger * page.dismissed,
            (challenger - champion) * page.dismissed,
        ]
        self._rows[here] += np.stack([np.bincount(row, column) for column in columns], axis=1)
        self._squares += float(challenger @ challenger)
        self._squares_champion += float(champion @ champion)
        self._agreed += float(page.agreed.sum())

    def estimates(self, level: float, chance: np.random.Generator, replicates: int = REPLICATES) -> Estimates:
        """The figures, with intervals of that level (see `intervals.bootstrap`).

        Raises:
            ValueError: there are fewer than two users, or every weight of a policy is 0.
        """
        rows = self._rows[: self.users]
        n, weight, of_champion = rows[:, _N], rows[:, _W], rows[:, _W_CHAMPION]
        total, total_champion = float(weight.sum()), float(of_champion.sum())
        if total == 0 or total_champion == 0:
            who = "champion" if total else "challenger"
            raise ValueError(f"no decision has a weight: the {who} would have made none of these choices")
        wanted = [_IPS, _IPS, _DR, _CHAMPION, _LIFT, _MORE_DISMISSED]
        wholes = np.stack([n, weight, n, n, n, n], axis=1)
        ips, snips, dr, champion, lift, more = bootstrap(rows[:, wanted], wholes, level, chance, replicates)
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
            champion_mean_weight_error=standard_error(of_champion, n),
            champion_ess=total_champion**2 / self._squares_champion,
            dismissed_champion=float(rows[:, _DISMISSED_CHAMPION].sum()) / count,
            dismissed_challenger=float(rows[:, _DISMISSED].sum()) / count,
            dismissed_more=more,
        )
