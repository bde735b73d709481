"""Protocols for the storage of the bandit; `app.stores.sqlite` implements them.

All methods raise `StoreUnavailable` if the database does not answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from app.bandit.decisions import Decision, DecisionOutcome, EventOutcome, Shadow, UserSnapshot
from app.bandit.model.pooled_prior import Prior
from app.features.events import LoggedEvent
from app.features.registry import Scalar

ReadProfile = Callable[[str], Awaitable[Mapping[str, Scalar]]]


class UserQuery(NamedTuple):
    """The user whose snapshot is read, and the request id whose stored decision belongs to it."""

    user_id: str
    request_id: str | None


class ProposedDecision(NamedTuple):
    """A decision to store, provided that the number of erased users is still `erasures`."""

    decision: Decision
    erasures: int


class RecordedDecision(NamedTuple):
    """The result of a proposal: the stored decision, which may be an earlier one with the same request id.

    None: a user, possibly this one, was erased meanwhile, so nothing was stored. `erasures` is the current number.
    """

    decision: Decision | None
    erasures: int


class SettleCounts(NamedTuple):
    """Decisions whose window has closed, by result. Unreadable ones are `set_aside`: kept, and not settled."""

    learned: int
    expired: int
    set_aside: int


class DecisionRepository(Protocol):
    async def snapshots(self, queries: Sequence[UserQuery]) -> list[UserSnapshot]:
        """Read all users in one snapshot. Statistics of an unknown spec are logged and returned as None."""
        ...

    async def record(self, proposed: Sequence[ProposedDecision]) -> list[RecordedDecision]:
        """Store decisions in one durable commit."""
        ...

    async def add_shadows(self, shadows: Sequence[Shadow]) -> None:
        """Add shadows to the decisions that still exist, in one commit."""
        ...

    async def find(self, decision_id: str) -> tuple[Decision, DecisionOutcome] | None: ...

    async def oldest_ms(self) -> int | None:
        """When the oldest decision was made; None if there is none."""
        ...

    async def prune(self, before_ms: int, limit: int) -> int:
        """Delete up to `limit` decisions made before a time, oldest first, and priors that no decision names."""
        ...


class LearningRepository(Protocol):
    async def concerned(self, events: Sequence[LoggedEvent]) -> list[LoggedEvent]:
        """The events that may concern a decision. Reads only, a few microseconds per event."""
        ...

    async def note_unknown(self, events: Sequence[LoggedEvent], now_ms: int) -> Mapping[str, int]:
        """Record events that name no decision of their user; returns their number by sender."""
        ...

    async def learn(self, events: Sequence[LoggedEvent], now_ms: int) -> Mapping[EventOutcome, int]:
        """Learn from events in the given order, each once however often it is delivered, in one transaction.

        Raises:
            SpecMismatch: the statistics of a user are damaged or of an unknown spec. Nothing was stored.
        """
        ...

    async def settle(self, now_ms: int, limit: int) -> SettleCounts:
        """Settle up to `limit` decisions whose window has closed: learn the default reward, or expire."""
        ...


class StateRepository(Protocol):
    """The statistics of all users, and the priors pooled from them."""

    async def pooled(self, now_ms: int) -> tuple[Prior, int] | None:
        """A prior pooled from the statistics of all users in one snapshot, and the number of changes it includes.

        None if nothing has changed since the newest stored prior. Damaged statistics are left out.
        """
        ...

    async def add_prior(self, prior: Prior, changes: int) -> bool:
        """Store a prior under the next version, unless a stored one includes as many changes."""
        ...

    async def grow(self, limit: int, now_ms: int) -> int:
        """Grow the statistics of up to `limit` users to the longest spec in one transaction; returns their number.

        Damaged statistics are set aside, and counted.
        """
        ...

    async def prior_version(self) -> int:
        """The version of the newest prior; 0 if there is none."""
        ...

    async def counts(self) -> Mapping[str, int]:
        """The number of users by the spec hash of their statistics."""
        ...
