"""What the roll-out needs from outside. `app.stores.sqlite.rollout` implements it.

Evaluated are decisions that explored, whose reward is settled, and of which both policies' probabilities are known.
  - One that expired was never shown, so there is no reward it could have had. Leaving it out is right as long as not
    being shown does not depend on what was chosen; if it does, the mean weight of the rest moves away from 1, and the
    gate holds.
  - One whose shadow was dropped or lost has no probability under the other policy. That depends on load alone.
  - One that was decided without a pooled prior says nothing of a challenger that is there for what the prior knows.
  - One that is newer than the oldest unsettled decision waits. A reward that comes by feedback is settled at once, one
    that does not come only when the window closes; whoever counted all that is settled would count the quick ones
    first, and they are not like the others.
All methods raise `StoreUnavailable` when the database does not answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple, Protocol

import msgspec

from app.bandit.rollout.aggregates import Estimates, Page
from app.bandit.rollout.off_policy import Floats
from app.bandit.rollout.stages import RolloutState, Target
from app.bandit.rollout.verdict import Verdict


class RolloutLook(msgspec.Struct, frozen=True):
    """What was found when, at which level, and what was said of it then; `words`: of the stage."""

    number: int
    at_ms: int
    level: float
    words: str
    estimates: Estimates
    verdict: Verdict


class Counts(NamedTuple):
    """Settled decisions since the roll-out began.

    `until`: evaluated are those with a lower number. `waiting` are newer than the oldest unsettled one, `unshadowed`
    lack one policy's probabilities; `served` of those evaluated or waiting were served by the challenger since the
    stage began.
    """

    until: int
    evaluated: int
    waiting: int
    unshadowed: int
    served: int


class RecentDecisions(NamedTuple):
    """Decisions of late, settled or not; one a row. `elapsed_ms`: how long each took to answer."""

    elapsed_ms: Floats
    without_profile: Floats
    by_challenger: Floats


class RolloutRepository(Protocol):
    """Where the roll-out, its looks and the decisions it is judged by are kept."""

    async def state(self) -> RolloutState:
        """Where it stands."""
        ...

    async def move(self, seen: RolloutState, to: Target, reason: str, actor: str, now_ms: int) -> RolloutState | None:
        """Change it in one transaction; None where it is not as it was seen any more."""
        ...

    async def looks(self) -> list[RolloutLook]:
        """All of this roll-out, oldest first; one that another release wrote otherwise is left out."""
        ...

    async def add_look(self, look: RolloutLook, seen: RolloutState) -> bool:
        """Keep it, unless one of that number can be read, or the roll-out was begun anew; whether it was kept."""
        ...

    async def counts(self, state: RolloutState, overdue_ms: int) -> Counts:
        """How many there are. What was made before `overdue_ms` and is unsettled will stay so, and holds nothing up."""
        ...

    def pages(self, state: RolloutState, until: int) -> AsyncIterator[Page]:
        """All evaluated decisions, in the order made; one page at a time is in memory."""
        ...

    async def shown(self, state: RolloutState, limit: int) -> Page:
        """Those of the newest whose tip was shown, settled or not; the reward of one that is not stands as 0."""
        ...

    async def recent(self, since_ms: int, limit: int) -> RecentDecisions:
        """The newest decisions since a moment."""
        ...
