"""Protocols and value types of the event package; `app.stores` implements the protocols. Methods that use the database
raise `StoreUnavailable`. Every stored event has a sequence number; the numbers rise with every commit, and are never
reused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

from app.features.events import LoggedEvent, TipEvent


class Admitted(NamedTuple):
    """An event that has passed validation, with the facts that are stored beside it.

    `occurred_at_ms` is the event time that features use: the time that the producer claims or, if that is ahead of the
    service's clock, the time of arrival. In the second case `claimed_at_ms` is the claimed time, otherwise None.
    `sent_by` names the API key or the entry point, such as the queue. A `historical` event counts as known from its
    event time on, although it arrived later. `digest` is a hash of the event, which tells a duplicate from a conflict.
    `traceparent` is the position of its request or job in a trace, if traces are on.
    """

    event: TipEvent
    digest: bytes
    occurred_at_ms: int
    utc_offset_min: int
    claimed_at_ms: int | None
    received_at_ms: int
    sent_by: str
    historical: bool = False
    traceparent: str | None = None


class Appended(NamedTuple):
    """The outcome of a request whose events are stored. `seqs` has the sequence numbers of the new events. `stale` maps
    each user id to the features that the events, new or duplicate, invalidate."""

    accepted: int
    duplicates: int
    seqs: tuple[int, ...]
    stale: Mapping[str, frozenset[str]]


class ClashingEvent(NamedTuple):
    """The outcome of a rejected request: its event at index `position` reuses an event id with other content."""

    position: int
    event_id: str


class TracedEvent(NamedTuple):
    """A stored event and its processing state, as admins see it. `counted_at_ms`: the time at which features count the
    event. `claimed_at_ms`: the time that its sender gave, if the service replaced it because it was ahead of the clock.
    `consumed`: no worker has to consume the event any more. `letter_id`: its dead letter, if it became one."""

    logged: LoggedEvent
    counted_at_ms: int
    claimed_at_ms: int | None
    consumed: bool
    letter_id: int | None


class Holdings(NamedTuple):
    """How much the database holds of a user, as numbers of rows. `rebuilds` counts the rebuild runs whose list of users
    names the user, `learned` the decisions that the bandit has learned from."""

    views: int
    feedback: int
    dead_letters: int
    rebuilds: int
    decisions: int
    learned: int

    @property
    def events(self) -> int:
        return self.views + self.feedback


class ActivityCount(NamedTuple):
    """The number of a user's events of one kind (`served` or an action) in one day and local hour. `days_ago` counts
    periods of 24 hours back from now: 0 is the last 24 hours."""

    days_ago: int
    local_hour: int
    kind: str
    events: int


class DeadLetter(NamedTuple):
    """An event whose consumption failed repeatedly, or a queued payload that was rejected. `seq` is the sequence number
    of the event; None if the payload was never stored as an event."""

    id: int
    source: str
    payload: str
    error: str
    traceback: str
    attempts: int
    seq: int | None
    created_at_ms: int
    last_failed_at_ms: int


class EventLog(Protocol):
    async def append(self, requests: Sequence[Sequence[Admitted]]) -> list[Appended | ClashingEvent]:
        """Store the events of several requests in one durable commit; return one outcome per request. The events of one
        request are stored as a whole or not at all."""

    async def unconsumed(
        self, received_before_ms: int, limit: int, *, or_after_ms: int | None = None
    ) -> list[LoggedEvent]:
        """Up to `limit` unconsumed events that arrived before `received_before_ms`, or after `or_after_ms`. The latter
        is a time in the future: events with a later arrival time were stored before the clock was set back."""

    async def logged(self, seqs: Sequence[int]) -> list[LoggedEvent]:
        """The stored events with these sequence numbers, except those that are consumed already."""

    async def mark_consumed(self, seqs: Sequence[int]) -> None: ...

    async def stale_features(self) -> Mapping[str, frozenset[str]]:
        """The names of the features that events of each subject (kind of event) invalidate, by subject. They include
        the features of every registry that a process has ever recorded in this database."""


class DeadLetters(Protocol):
    async def bury_payloads(self, payloads: Sequence[tuple[str, str]], now_ms: int) -> Sequence[int]:
        """Store rejected payloads of the queue, each with its error, as dead letters, all or none; return their ids."""

    async def failed(self, seq: int, error: str, traceback: str, now_ms: int, limit: int) -> bool:
        """Count a failure to consume a stored event. Return True if this is failure number `limit`, with which the
        event becomes a dead letter."""

    async def list(self, after: int, limit: int) -> list[DeadLetter]:
        """Up to `limit` dead letters with ids above `after`, ordered by id."""

    async def get(self, letter_id: int) -> DeadLetter | None: ...

    async def discard(self, letter_id: int) -> bool:
        """Delete a dead letter; return False if there is none with this id."""

    async def count(self) -> int: ...

    async def refused(self, letter_id: int, reason: str, now_ms: int) -> None:
        """Record that the replay of a dead letter was rejected again."""

    async def revive(self, letter_id: int) -> bool:
        """Make the event of a dead letter unconsumed again, with 0 failures, and delete the letter. Return False if the
        letter does not exist."""


class UserRecords(Protocol):
    async def find(self, prefix: str, limit: int) -> list[str]:
        """Up to `limit` ids of users that begin with `prefix`, in the order of their UTF-8 bytes."""

    async def newest_events(self, user_id: str, limit: int) -> list[TracedEvent]:
        """Up to `limit` of the user's events, newest first."""

    async def activity(self, user_id: str, until_ms: int, days: int) -> list[ActivityCount]:
        """The user's event counts over `days` periods of 24 hours that end at `until_ms`. They are unordered, and a
        count of 0 is left out."""

    async def holdings(self, user_id: str) -> Holdings: ...

    async def erase(self, user_id: str, now_ms: int) -> Holdings:
        """Delete all rows of a user; return their number by kind. The same transaction records that the user's cache
        keys must be deleted."""

    async def erase_decisions(self, user_id: str) -> None:
        """Delete the user's decisions. Called after the cache keys were deleted, although `erase` deletes decisions,
        too: a request could read the erased user's cached values in between, and store a decision."""


class Invalidates(Protocol):
    """Deletes stale cached values: the part of `app.profiles.online.invalidation.Invalidator` that events use."""

    async def invalidate(self, stale: Mapping[str, Collection[str]]) -> bool:
        """Delete the cache keys of the given features, by user id; return True.

        If the cache does not answer, record in the database that the deletion is owed: while the record exists, no
        process serves cached values. Wait until every process has had time to notice the record, and return False.
        """

    async def drop_older(self, stale: Mapping[str, Mapping[str, int]]) -> None:
        """Delete cached values that were computed before an event. `stale` has the sequence number of the event by user
        id and feature name. The keys were deleted when the event was stored, so normally no such value exists."""


class Learner(Protocol):
    """A model that is updated from consumed events; each event counts once."""

    async def learn(self, events: Sequence[LoggedEvent]) -> None:
        """Learn from all of these events, or raise and learn from none. Events are delivered at least once; `seq`
        identifies repeats. Most events concern no learner, so skipping an event must be cheap."""
