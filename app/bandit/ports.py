"""Protocols for the storage of the bandit; `app.stores.sql` implements them. All methods raise `StoreUnavailable`.

A decision is settled when its reward is learned or it expires. A roll-out evaluates it if it was made with exploration,
its reward is learned, and it has both policies' propensities. A look is an interim analysis of the challenger.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec

from app.bandit.decisions import Decision, DecisionLine, DecisionOutcome, DecisionRecord, EventOutcome, UserSnapshot
from app.bandit.model.inputs import Array
from app.bandit.model.sufficient_statistics import Prior, SufficientStatistics
from app.bandit.rollout.aggregates import DecisionPage, Estimates
from app.bandit.rollout.stages import RolloutState, Target
from app.bandit.rollout.verdict import Verdict
from app.features.events import LoggedEvent
from app.features.registry import ProfileRead, Scalar

# Reads a user's profile: the values by feature name, and how they were read.
ReadProfile = Callable[[str], Awaitable[tuple[Mapping[str, Scalar], ProfileRead]]]


class ProposedDecision(NamedTuple):
    """A decision to store, unless the user has been erased or the user's statistics have changed since it was made.
    `erasures`: how many users had been erased before the user's data were read. `version`: `UserSnapshot.version`."""

    decision: Decision
    erasures: int
    version: tuple[str, int] | None


EARLIEST_MS, LATEST_MS = -(10**18), 10**18  # before and after the time of any decision


class DecisionMoment(NamedTuple):
    """A place in the order of the decisions by time and id."""

    at_ms: int
    decision_id: str = ""


class LoggedDecision(NamedTuple):
    number: int
    decision: Decision
    outcome: DecisionOutcome


class UserLog(NamedTuple):
    """All stored decisions of a user, and the user's statistics. `statistics` is None if missing or damaged."""

    user_id: str
    statistics: SufficientStatistics | None
    decisions: list[LoggedDecision]


class StateGrowth(msgspec.Struct):
    """`users`: the number of users with statistics. `to_grow`: how many of them lack inputs of the challenger."""

    users: int
    to_grow: int


class DecisionRepository(Protocol):
    async def snapshots(self, queries: Sequence[tuple[str, str | None]]) -> list[UserSnapshot]:
        """Read the data of each queried user, in the order of the queries: pairs of a user id and the id of the scoring
        request. If statistics are damaged or of an unknown spec, log a warning, and return None for `statistics`."""

    async def record(self, proposed: Sequence[ProposedDecision]) -> list[Decision | None]:
        """Store decisions in one durable commit. Return one item per proposed decision, in order: the stored decision,
        or the earlier one with the same request id; None if it must not be stored (see `ProposedDecision`)."""

    async def add_shadows(self, after: tuple[str, int], limit: int) -> tuple[str, int] | None:
        """Compute and store the missing shadows (see `Decision`) of up to `limit` unsettled decisions, in the order of
        user id and number. Begin after the pair `after`. Skip a decision if its user's statistics have changed since
        the decision was made. Return the user id and number of the last decision; None if no decision follows it."""

    async def find(self, decision_id: str) -> tuple[Decision, DecisionOutcome] | None:
        """The decision with this id; None if there is none, or it is damaged."""

    async def page(
        self, after: DecisionMoment, until_ms: int, limit: int
    ) -> tuple[list[DecisionRecord], DecisionMoment | None]:
        """Up to `limit` decisions after `after` that were made before `until_ms`, and the moment after which the next
        page begins; it is None on the last page. Damaged decisions are left out, so any page may be empty."""

    async def line(self, decision_id: str) -> DecisionLine | None: ...

    async def newest(
        self,
        limit: int,
        *,
        user_id: str | None = None,
        since_ms: int = EARLIEST_MS,
        until_ms: int = LATEST_MS,
        before: tuple[int, int] = (LATEST_MS, LATEST_MS),
    ) -> tuple[list[DecisionLine], tuple[int, int] | None]:
        """Up to `limit` decisions made from `since_ms` on and before `until_ms`, newest first: by time, or by sequence
        number if `user_id` is given. The second item is `before` for the next page, a pair of time and sequence number.
        It is None on the last page."""

    async def user_logs(self, after: str, decisions: int) -> list[UserLog]:
        """The logs of users with ids above `after`, in the order of ids. Users are added until the logs contain at
        least `decisions` decisions, or no user is left. Damaged decisions are left out."""

    async def priors(self) -> list[Prior]:
        """All pooled priors, oldest first. Damaged ones are left out."""


class LearningRepository(Protocol):
    async def concerned(self, events: Sequence[LoggedEvent]) -> list[LoggedEvent]:
        """The events that may be about a decision, in the given order. The search takes microseconds per event."""

    async def note_unknown(self, events: Sequence[LoggedEvent], now_ms: int) -> Mapping[str, int]:
        """Record events whose `decision_id` does not exist for their user; return the number of events by sender."""

    async def learn(self, events: Sequence[LoggedEvent], now_ms: int) -> Mapping[EventOutcome, int]:
        """Learn from events in the given order, in one transaction; return the number of events by outcome. Events that
        have been counted before are ignored. Raises `SpecMismatch`, and stores nothing, if the statistics of a user are
        damaged or of an unknown spec."""

    async def settle(self, now_ms: int, limit: int) -> Mapping[str, int]:
        """Settle up to `limit` decisions whose reward window has closed without feedback. Return how many learned the
        `default` reward of a served tip, how many `expired` unserved, and how many were `set aside`, because they or
        the user's statistics are damaged."""

    async def grow(self, now_ms: int) -> int:
        """Extend the statistics of a page of users to the longest spec, by a replay of their learned decisions. Set
        damaged statistics aside. Return the number of users; 0 if no user is left."""


class StateRepository(Protocol):
    async def sum_range(self, round_ms: int, now_ms: int) -> bool:
        """Claim a range of users that no worker has claimed since `round_ms`, and sum their statistics if these have
        changed. Damaged statistics are left out, and marked as unusable. Return False if no range is left."""

    async def pool(self, now_ms: int) -> Prior | None:
        """Estimate a prior from the stored sums of all ranges of users, and store it under the next version. Return
        None, and store nothing, if no sum has changed since the newest prior, or if a range has no sum."""

    async def prior_version(self) -> int:
        """The version of the newest prior; 0 if there is none."""

    async def growth(self) -> StateGrowth:
        """Count the users with statistics. This takes 10 ms for 100,000 users, because only an index is read."""


class RolloutLook(msgspec.Struct, frozen=True):
    """A look: its number, counted from 1, the estimates, and the verdict and stage of that time. `level` is the
    probability with which each interval misses the true value."""

    number: int
    at_ms: int
    level: float
    stage: str = msgspec.field(name="words")  # the name in stored looks
    estimates: Estimates
    verdict: Verdict


class Counts(NamedTuple):
    """Numbers of decisions with a learned reward since the roll-out began. `app.bandit.rollout.status.DecisionsView`
    explains them; `served` is named `served_by_challenger` in that class. `evaluated` decisions have sequence numbers
    below `until`, and `waiting` decisions have higher ones."""

    until: int
    evaluated: int
    waiting: int
    unshadowed: int
    served: int
    without_prior: int = 0


class RecentDecisions(NamedTuple):
    """Recent decisions, settled or not, in columns of one element per decision. `elapsed_ms` is the duration of the
    scoring request until its commit. `without_profile` is 1 if every profile feature was missing or null, else 0.
    `by_challenger` is 1 if the challenger served, else 0. `made_ms` is in epoch ms."""

    elapsed_ms: Array
    without_profile: Array
    by_challenger: Array
    made_ms: Array


class RolloutRepository(Protocol):
    async def state(self) -> RolloutState: ...

    async def move(self, seen: RolloutState, to: Target, reason: str, actor: str, now_ms: int) -> RolloutState | None:
        """Change the stage in one transaction; return None, and change nothing, if the state is no longer `seen`. If
        the roll-out starts anew, the stored looks are deleted, too."""

    async def looks(self) -> list[RolloutLook]:
        """The looks, oldest first. Looks in the unreadable format of another release are omitted."""

    async def add_look(self, look: RolloutLook, seen: RolloutState) -> bool:
        """Store a look. Return False if its number is taken or the roll-out started anew after `seen`."""

    async def counts(self, state: RolloutState, overdue_ms: int) -> Counts:
        """Count the decisions of the roll-out by whether they can be evaluated. Decisions are evaluated in order, up to
        the oldest unsettled decision. An unsettled decision from before `overdue_ms` (epoch ms) is ignored."""

    def pages(self, state: RolloutState, until: int) -> AsyncIterator[DecisionPage]:
        """Yield pages of the evaluated decisions whose sequence number is below `until`, oldest first."""

    async def shown(self, state: RolloutState, among: int) -> tuple[DecisionPage, Array]:
        """Of the newest `among` decisions of the roll-out, those in which the policies can be compared: the tip was
        shown, the choice was explored, and both policies ranked the candidates. A reward that is not known yet is 0.
        The array has 1 where the challenger served, 0 where the champion did, and NaN before the current stage."""

    async def recent(self, since_ms: int, limit: int) -> RecentDecisions:
        """The decisions made at or after `since_ms`; if there are more than `limit`, the newest of them."""
