"""Protocol for the storage of the roll-out; `app.stores.sql.rollout` implements it.

A decision is settled when its reward is learned or it expires. It is evaluated if it was made with exploration, its
reward is learned, and it has both policies' propensities. Not evaluated:
  - Expired decisions. Their tip was never shown, so they have no reward. This adds no bias unless being shown depends
    on the choice; then the mean weight of the evaluated decisions differs from 1, and the verdict is `hold`.
  - Decisions without a shadow (the ranking by the policy that did not choose), because there was no challenger or
    something was damaged.
  - Decisions made without a pooled prior. Without it, the challenger is practically the champion.
  - Decisions newer than the oldest unsettled one, until that is settled. Feedback settles a decision at once, missing
    feedback when the reward window closes: counting all settled decisions would favour those with quick feedback.

All methods raise `StoreUnavailable` if the database does not answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple, Protocol

import msgspec

from app.bandit.model.inputs import Array
from app.bandit.rollout.aggregates import DecisionPage, Estimates
from app.bandit.rollout.stages import RolloutState, Target
from app.bandit.rollout.verdict import Verdict


class RolloutLook(msgspec.Struct, frozen=True):
    """An interim analysis ("look"): its number, counted from 1, the estimates, and the verdict and stage of that time.
    `level` is the probability with which each interval misses the true value."""

    number: int
    at_ms: int
    level: float
    stage: str = msgspec.field(name="words")  # the name in stored looks
    estimates: Estimates
    verdict: Verdict


class Counts(NamedTuple):
    """Numbers of decisions with a learned reward since the roll-out began, by whether they can be evaluated.

    `evaluated` decisions have sequence numbers below `until`. `waiting` decisions are newer than the oldest one without
    a reward, and are evaluated once it is settled. `unshadowed` decisions lack one policy's propensities. `served`
    counts the evaluated and waiting decisions that the challenger served since the stage began. `without_prior`
    decisions would be evaluated if a prior had been pooled before they were made.
    """

    until: int
    evaluated: int
    waiting: int
    unshadowed: int
    served: int
    without_prior: int = 0


class RecentDecisions(NamedTuple):
    """Recent decisions, settled or not, in columns of one element per decision.

    `elapsed_ms` is the duration of the scoring request, without its commit. `without_profile` is 1 if every profile
    feature was missing or null, `by_challenger` is 1 if the challenger served, else 0. `made_ms` is in epoch ms.
    """

    elapsed_ms: Array
    without_profile: Array
    by_challenger: Array
    made_ms: Array


class RolloutRepository(Protocol):
    async def state(self) -> RolloutState: ...

    async def move(self, seen: RolloutState, to: Target, reason: str, actor: str, now_ms: int) -> RolloutState | None:
        """Change the stage in one transaction; return None, and change nothing, if the state is no longer `seen`. If
        the roll-out starts anew, the stored looks (interim analyses) are deleted, too."""

    async def looks(self) -> list[RolloutLook]:
        """The looks (interim analyses), oldest first. Looks in the unreadable format of another release are omitted."""

    async def add_look(self, look: RolloutLook, seen: RolloutState) -> bool:
        """Store an interim analysis. Return False if its number is taken or the roll-out started anew after `seen`."""

    async def counts(self, state: RolloutState, overdue_ms: int) -> Counts:
        """Count the decisions of the roll-out by whether they can be evaluated. A decision whose reward is not known
        yet delays all later ones, unless it was made before `overdue_ms` (epoch ms)."""

    def pages(self, state: RolloutState, until: int) -> AsyncIterator[DecisionPage]:
        """Yield pages of the evaluated decisions whose sequence number is below `until`, oldest first."""

    async def shown(self, state: RolloutState, among: int) -> tuple[DecisionPage, Array]:
        """Read recent decisions whose tip was shown: of the newest `among` decisions of the roll-out, those that were
        made with exploration and have both policies' rankings. A decision without a reward yet has the reward 0. For
        each decision, the array has 1 if the challenger served, 0 if the champion did, and NaN if the decision is older
        than the current stage."""

    async def recent(self, since_ms: int, limit: int) -> RecentDecisions:
        """The decisions made at or after `since_ms`; if there are more than `limit`, the newest of them."""
