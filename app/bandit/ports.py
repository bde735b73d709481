"""What the bandit needs from outside, as small protocols. `app.stores.sqlite` implements them.

All methods raise `StoreUnavailable` when the database does not answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

from app.bandit.decisions import Decision, DecisionOutcome, EventOutcome, Known, Shadow
from app.bandit.model.pooled_prior import Prior
from app.features.events import TipEvent
from app.features.registry import Scalar

ReadProfile = Callable[[str], Awaitable[Mapping[str, Scalar]]]


class Told(Protocol):
    """A stored event, as a worker takes it up; the part of `app.events.ports.LoggedEvent` that is of use here."""

    @property
    def seq(self) -> int:
        """Its number: unique, and the same however often it is delivered."""
        ...

    @property
    def event(self) -> TipEvent:
        """As it was sent."""
        ...

    @property
    def received_at_ms(self) -> int:
        """When it arrived."""
        ...


ToldEvent = TypeVar("ToldEvent", bound=Told)


class Question(NamedTuple):
    """Whom a decision is about, and its request's id."""

    user_id: str
    request_id: str | None


class Proposed(NamedTuple):
    """A decision to be stored, if no user was erased since there were so many erasures."""

    decision: Decision
    erasures: int


class Recorded(NamedTuple):
    """What became of a proposal: the decision that stands, its own or an earlier one of the same request id.

    None: a user was erased meanwhile, perhaps this one, so nothing was stored. `erasures` is their count now.
    """

    decision: Decision | None
    erasures: int


class Swept(NamedTuple):
    """What a sweep made of decisions whose window has closed. What cannot be read is `aside`: kept, and unsettled."""

    learned: int
    expired: int
    aside: int


class DecisionRepository(Protocol):
    """Where decisions are kept."""

    async def look(self, questions: Sequence[Question]) -> list[Known]:
        """What is known of each, as of now. Evidence of an unknown spec is None, and is told to the log."""
        ...

    async def record(self, proposed: Sequence[Proposed]) -> list[Recorded]:
        """Store decisions, all in one durable commit."""
        ...

    async def add_shadows(self, shadows: Sequence[Shadow]) -> None:
        """Add what the other policy made of decisions, where those are still there; in one commit."""
        ...

    async def find(self, decision_id: str) -> tuple[Decision, DecisionOutcome] | None:
        """One decision and what came of it."""
        ...

    async def oldest_ms(self) -> int | None:
        """When the oldest decision was made; None if there is none."""
        ...

    async def prune(self, before_ms: int, limit: int) -> int:
        """Delete up to `limit` decisions made before a moment, oldest first, and priors no decision names."""
        ...


class LearningRepository(Protocol):
    """Where what was learned is kept."""

    async def concerned(self, events: Sequence[ToldEvent]) -> list[ToldEvent]:
        """Those of the events that may concern a decision. Nothing is written; what is none costs microseconds."""
        ...

    async def note_unknown(self, events: Sequence[Told], now_ms: int) -> Mapping[str, int]:
        """Count events that name no decision of their user; how many, by who sent them."""
        ...

    async def learn(self, events: Sequence[Told], now_ms: int) -> Mapping[EventOutcome, int]:
        """Learn from events in the order given, each once however often it comes; all in one transaction, or nothing.

        Raises:
            SpecMismatch: evidence that is damaged, or of an unknown spec, would have to be added to.
        """
        ...

    async def settle(self, now_ms: int, limit: int) -> Swept:
        """Settle up to `limit` decisions whose window has closed: they learn the default, or expire."""
        ...


class StateRepository(Protocol):
    """Where the evidence of all users is kept, and the priors made of it."""

    async def pooled(self, now_ms: int) -> tuple[Prior, int] | None:
        """A prior of all users' evidence as of one moment, and the count of changes it has seen.

        None where nothing has changed since the newest that is stored. Evidence that is damaged is left out.
        """
        ...

    async def add_prior(self, prior: Prior, changes: int) -> bool:
        """Store it under the next version, unless one that has seen as much is there."""
        ...

    async def grow(self, limit: int, now_ms: int) -> int:
        """Bring up to `limit` users' evidence to the longest spec, in one transaction; how many that were.

        Evidence that is damaged is set aside, and counts.
        """
        ...

    async def prior_version(self) -> int:
        """Of the newest prior; 0 where there is none."""
        ...

    async def counts(self) -> Mapping[str, int]:
        """Users by the hash of their evidence's spec."""
        ...
