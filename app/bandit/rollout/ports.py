"""Protocol for the storage of the roll-out; `app.stores.sqlite.rollout` implements it.

Evaluated decisions are those that explored, are settled, and have both policies' propensities. Not evaluated:
  - Expired decisions. Their tip was never shown, so they have no reward. This introduces no bias as long as being shown
    does not depend on the choice; if it does, the mean weight of the others differs from 1, and the verdict is `hold`.
  - Decisions whose shadow was dropped or lost. This depends on load alone.
  - Decisions made without a pooled prior. Without it, the challenger is practically the champion.
  - Decisions newer than the oldest unsettled one; they wait. Feedback settles a decision at once, silence only when the
    window closes. Counting every settled decision would favour those with quick feedback.

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
    """One look: the estimates at `level`, and the verdict and stage of that time."""

    number: int
    at_ms: int
    level: float
    stage: str = msgspec.field(name="words")  # the name in stored looks
    estimates: Estimates
    verdict: Verdict


class Counts(NamedTuple):
    """Numbers of settled decisions since the roll-out began.

    Evaluated decisions have a number below `until`. `waiting` ones are newer than the oldest unsettled decision,
    `unshadowed` ones lack one policy's propensities. `served`: evaluated or waiting decisions that the challenger
    served since the stage began.
    """

    until: int
    evaluated: int
    waiting: int
    unshadowed: int
    served: int


class RecentDecisions(NamedTuple):
    """Recent decisions, settled or not, one element each: duration of the request in ms, and two flags of 0 or 1."""

    elapsed_ms: Floats
    without_profile: Floats
    by_challenger: Floats


class RolloutRepository(Protocol):
    async def state(self) -> RolloutState: ...

    async def move(self, seen: RolloutState, to: Target, reason: str, actor: str, now_ms: int) -> RolloutState | None:
        """Change the state in one transaction; None if it is no longer the one `seen`."""
        ...

    async def looks(self) -> list[RolloutLook]:
        """The looks of this roll-out, oldest first, without those in an unreadable format of another release."""
        ...

    async def add_look(self, look: RolloutLook, seen: RolloutState) -> bool:
        """Store a look, unless its number is stored or the roll-out was started anew; whether it was stored."""
        ...

    async def counts(self, state: RolloutState, overdue_ms: int) -> Counts:
        """Count decisions. Unsettled ones made before `overdue_ms` will never be settled, and make no others wait."""
        ...

    def pages(self, state: RolloutState, until: int) -> AsyncIterator[DecisionPage]:
        """All evaluated decisions in the order made, with one page at a time in memory."""
        ...

    async def shown(self, state: RolloutState, limit: int) -> DecisionPage:
        """The newest decisions whose tip was shown, settled or not; the reward of an unsettled one is 0."""
        ...

    async def recent(self, since_ms: int, limit: int) -> RecentDecisions:
        """The newest decisions since a time."""
        ...
