"""Protocol for the storage of the roll-out; `app.stores.sqlite.rollout` implements it.

A decision is evaluated if it explored, is settled, and has both policies' propensities. Not evaluated:
  - Expired decisions. Their tip was never shown, so they have no reward. This introduces no bias as long as being shown
    does not depend on the choice; if it does, the mean weight of the others differs from 1, and the verdict is `hold`.
  - Decisions whose shadow was dropped or lost. This depends on load alone.
  - Decisions made without a pooled prior. Without it, the challenger is practically the champion.
  - Decisions newer than the oldest unsettled one; they wait. Feedback settles a decision at once, missing feedback only
    when the reward window closes. Counting every settled decision would favour decisions with quick feedback.

All methods raise `StoreUnavailable` if the database does not answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple, Protocol

import msgspec

from app.bandit.rollout.aggregates import DecisionPage, Estimates
from app.bandit.rollout.off_policy import Floats
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
    """Numbers of settled decisions since the roll-out began, by whether they can be evaluated.

    `evaluated` counts the decisions that can; their sequence numbers are below `until`. `waiting` counts the decisions
    that are newer than the oldest unsettled one, `unshadowed` those without one policy's propensities. `served` counts
    the evaluated and waiting decisions that the challenger served since the stage began.
    """

    until: int
    evaluated: int
    waiting: int
    unshadowed: int
    served: int


class RecentDecisions(NamedTuple):
    """Recent decisions, settled or not, in columns of one element per decision.

    `elapsed_ms` is the duration of the scoring request. `without_profile` is 1 if the policy had no profile feature,
    `by_challenger` is 1 if the challenger served, else 0.
    """

    elapsed_ms: Floats
    without_profile: Floats
    by_challenger: Floats


class RolloutRepository(Protocol):
    async def state(self) -> RolloutState: ...

    async def move(self, seen: RolloutState, to: Target, reason: str, actor: str, now_ms: int) -> RolloutState | None:
        """Change the stage in one transaction; return None, and change nothing, if the state is no longer `seen`. If
        the roll-out starts anew, the stored looks (interim analyses) are deleted, too."""

    async def looks(self) -> list[RolloutLook]:
        """The looks (interim analyses), oldest first. Looks in the unreadable format of another release are omitted."""

    async def add_look(self, look: RolloutLook, seen: RolloutState) -> bool:
        """Store an interim analysis. Return False if its number is stored or the roll-out has started anew."""

    async def counts(self, state: RolloutState, overdue_ms: int) -> Counts:
        """Count the decisions. An unsettled decision made before `overdue_ms` makes no newer decision wait."""

    def pages(self, state: RolloutState, until: int) -> AsyncIterator[DecisionPage]:
        """Yield pages of the evaluated decisions whose sequence number is below `until`, oldest first."""

    async def shown(self, state: RolloutState, limit: int) -> DecisionPage:
        """The newest decisions, up to `limit`, that explored, have a shadow, and whose tip was shown. Unsettled
        decisions are included, with a reward of 0."""

    async def recent(self, since_ms: int, limit: int) -> RecentDecisions:
        """The decisions made at or after `since_ms`; if there are more than `limit`, the newest of them."""
