"""Protocols for the storage of the bandit; `app.stores.sql` implements them.

All methods raise `StoreUnavailable` if the database does not answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec

from app.bandit.decisions import Decision, DecisionOutcome, DecisionState, EventOutcome, Role, UserSnapshot
from app.bandit.evaluation.records import DecisionRecord
from app.bandit.model.pooled_prior import Prior
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.features.events import Action, LoggedEvent
from app.features.profile_read import ProfileRead
from app.features.registry import Scalar

# Reads a user's profile: the values by feature name, and how they were read.
ReadProfile = Callable[[str], Awaitable[tuple[Mapping[str, Scalar], ProfileRead]]]


class ProposedDecision(NamedTuple):
    """A decision to store. It is stored only if the number of users erased so far still equals `erasures`, and the
    user's statistics still have exactly `decision.state_version` decisions and belong to the spec with the hash
    `statistics_spec`, None for a user without statistics."""

    decision: Decision
    erasures: int
    statistics_spec: str | None


class SettleCounts(NamedTuple):
    """Numbers of decisions whose reward window has closed. `learned`: the tip was served. `expired`: it was not served.
    `set_aside`: the decision or the user's statistics are damaged, so nothing was learned."""

    learned: int
    expired: int
    set_aside: int


class DecisionPlace(NamedTuple):
    """A position among all decisions, ordered by user id and sequence number. The default is before the first."""

    user: str = ""
    number: int = 0


EARLIEST_MS, LATEST_MS = -(10**18), 10**18  # before and after the time of any decision


class DecisionMoment(NamedTuple):
    """A place in the order of the decisions by the time at which they were made, and by id."""

    at_ms: int
    decision_id: str = ""


class DecisionsPage(NamedTuple):
    """Decisions in the order of their moments. Continue after `following`; it is None on the last page. Damaged
    decisions are left out, so that a page may have few records, or none, though more follow."""

    records: list[DecisionRecord]
    following: DecisionMoment | None


class DecisionSummary(NamedTuple):
    """A decision in a list. `number` is its sequence number, `probability` that of the chosen candidate; None if the
    stored probabilities are damaged."""

    number: int
    decision_id: str
    decided_at_ms: int
    user_id: str
    chosen_id: str
    probability: float | None
    role: Role
    served_by: str
    state: DecisionState
    reward: float | None
    action: Action | None


class LoggedDecision(NamedTuple):
    """A decision, its sequence number and its outcome."""

    number: int
    decision: Decision
    outcome: DecisionOutcome


class UserLog(NamedTuple):
    """All stored decisions of a user, and the user's statistics; None if there are none, or they are damaged."""

    user_id: str
    statistics: SufficientStatistics | None
    decisions: list[LoggedDecision]


class StateGrowth(msgspec.Struct):
    """Numbers of users: all with learned statistics, and those whose statistics lack inputs of the challenger."""

    users: int
    to_grow: int


class DecisionRepository(Protocol):
    async def snapshots(self, queries: Sequence[tuple[str, str | None]]) -> list[UserSnapshot]:
        """Read the data of each queried user, in the order of the queries: pairs of a user id and the id of the scoring
        request. If statistics are damaged or of an unknown spec, this is logged, and `statistics` is None."""

    async def record(self, proposed: Sequence[ProposedDecision]) -> list[Decision | None]:
        """Store the decisions whose conditions are met in one durable commit. Return, in order, each stored decision,
        which may be an earlier one with the same request id; None if the conditions are not met."""

    async def add_shadows(self, after: DecisionPlace, limit: int) -> DecisionPlace | None:
        """Compute and store the shadows (both policies' rankings) of up to `limit` unsettled decisions without one, the
        first after `after`. Decisions whose user's statistics have changed since the decision are skipped. Return the
        place of the last decision; None if no more follow."""

    async def find(self, decision_id: str) -> tuple[Decision, DecisionOutcome] | None:
        """The decision with this id; None if there is none, or it is damaged."""

    async def page(self, after: DecisionMoment, until_ms: int, limit: int) -> DecisionsPage:
        """Up to `limit` decisions after `after` that were made before `until_ms`."""

    async def summary(self, decision_id: str) -> DecisionSummary | None: ...

    async def newest(
        self,
        limit: int,
        *,
        user_id: str | None = None,
        since_ms: int = EARLIEST_MS,
        until_ms: int = LATEST_MS,
        before: tuple[int, int] = (LATEST_MS, LATEST_MS),
    ) -> list[DecisionSummary]:
        """Up to `limit` decisions made from `since_ms` on and before `until_ms`, the newest first. Those of one user
        are in the order in which they were stored. `before`: time and number of the last decision of the page before.
        """

    async def user_logs(self, after: str, decisions: int) -> list[UserLog]:
        """The logs of the users after the user `after`, in the order of ids, of at least so many decisions in all;
        fewer if no more users follow. Damaged decisions are left out."""

    async def priors(self) -> list[Prior]:
        """All intact pooled priors, oldest first."""


class LearningRepository(Protocol):
    async def concerned(self, events: Sequence[LoggedEvent]) -> list[LoggedEvent]:
        """The events that may be about a decision, in the given order. The search takes microseconds per event."""

    async def note_unknown(self, events: Sequence[LoggedEvent], now_ms: int) -> Mapping[str, int]:
        """Record events whose `decision_id` does not exist for their user; return the number of events by sender."""

    async def learn(self, events: Sequence[LoggedEvent], now_ms: int) -> Mapping[EventOutcome, int]:
        """Learn from events in the given order, in one transaction; return the number of events by outcome.

        An event that has been counted before is ignored.

        Raises:
            SpecMismatch: the statistics of a user are damaged or of an unknown spec. Nothing was stored.
        """

    async def settle(self, now_ms: int, limit: int) -> SettleCounts:
        """Settle up to `limit` decisions whose reward window has closed without feedback. If the tip was served, the
        reward of `app.bandit.learning.rewards.NO_FEEDBACK` is learned; otherwise the decision expires."""

    async def grow(self, now_ms: int) -> int:
        """Extend the statistics of a page of users to the longest spec, by a replay of their learned decisions. Damaged
        statistics are set aside. Return the number of users; 0 if none is left."""


class StateRepository(Protocol):
    """Storage of all users' sufficient statistics, their sums over ranges of users, and the priors made from these."""

    async def sum_range(self, round_ms: int, now_ms: int) -> bool:
        """Claim a range of users that no worker has claimed since `round_ms`, and sum their statistics if these have
        changed. Damaged statistics are left out, and marked as unusable. Return False if no range is left."""

    async def pooled(self, now_ms: int) -> tuple[Prior, int] | None:
        """Estimate a prior from the stored sums of all ranges of users.

        Return the prior and its revision: how often the sums have been changed so far. Return None if no sum has
        changed since the newest stored prior, or if a range has not been summed.
        """

    async def add_prior(self, prior: Prior, revision: int) -> bool:
        """Store a prior under the next version, with the revision that `pooled` returned with it. Return False, and
        store nothing, if a prior of at least this revision is stored already."""

    async def prior_version(self) -> int:
        """The version of the newest prior; 0 if there is none."""

    async def growth(self) -> StateGrowth:
        """Count the users with statistics, at most 100,000 per spec."""
