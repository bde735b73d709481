"""Protocols and value types of the event package; `app.stores` implements the protocols.

Sequence numbers rise with every commit and are never reused. Methods that use the database raise `StoreUnavailable` if
it does not answer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

from app.features.events import LoggedEvent, TipEvent


class Admitted(NamedTuple):
    """An event that may be stored.

    `occurred_at_ms` is the event time that counts; `claimed_at_ms` is the producer's own if the two differ (an event
    from the near future counts from its arrival). `sent_by` names the key or the door. A `historical` event counts as
    known from its event time on, although it arrived later.
    """

    event: TipEvent
    digest: bytes
    occurred_at_ms: int
    utc_offset_min: int
    claimed_at_ms: int | None
    received_at_ms: int
    sent_by: str
    historical: bool = False


class Appended(NamedTuple):
    """The stored events of one request. `stale`: per user, the features that they invalidate, duplicates included."""

    accepted: int
    duplicates: int
    seqs: tuple[int, ...]
    stale: Mapping[str, frozenset[str]]


class ClashingEvent(NamedTuple):
    """A request that was rejected as a whole: the event at `position` reuses an id with other content."""

    position: int
    event_id: str


class TracedEvent(NamedTuple):
    """A stored event and its processing state.

    `counted_at_ms` is its event time, `claimed_at_ms` the producer's own if that differs. `letter_id` is set for a dead
    letter.
    """

    logged: LoggedEvent
    counted_at_ms: int
    claimed_at_ms: int | None
    consumed_at_ms: int | None
    letter_id: int | None


class Holdings(NamedTuple):
    """How much the database holds of a user: rows of each kind, and finished rebuilds that name the user.

    `learned`: the number of decisions in the user's sufficient statistics.
    """

    views: int
    feedback: int
    dead_letters: int
    rebuilds: int
    decisions: int
    learned: int

    @property
    def events(self) -> int:
        """Views and feedback together."""
        return self.views + self.feedback


class ActivityCount(NamedTuple):
    """The number of a user's events of one kind (`served` or an action) in one day and local hour.

    `days_ago` counts periods of 24 hours back from now: 0 is the last 24 hours.
    """

    days_ago: int
    local_hour: int
    kind: str
    events: int


class DeadLetter(NamedTuple):
    """A payload that could not be consumed. `seq` is None if it was never stored as an event."""

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
        """Store each request's events whole or not at all, all in one durable commit."""
        ...

    async def unconsumed(
        self, received_before_ms: int, limit: int, *, or_after_ms: int | None = None
    ) -> list[LoggedEvent]:
        """The oldest unconsumed events that arrived before `received_before_ms` or after `or_after_ms`."""
        ...

    async def logged(self, seqs: Sequence[int]) -> list[LoggedEvent]:
        """The given events that are not consumed yet."""
        ...

    async def mark_consumed(self, seqs: Sequence[int], now_ms: int) -> None:
        """Mark events as consumed. Idempotent."""
        ...

    async def stale_features(self, subjects: Collection[str]) -> Mapping[str, frozenset[str]]:
        """Per subject, the features it invalidates, over all registries announced to this database."""
        ...


class DeadLetters(Protocol):
    """Payloads that failed repeatedly, or were never events."""

    async def bury_payload(self, payload: str, error: str, traceback: str, now_ms: int) -> int:
        """Store a payload from the queue that is no event; return the id."""
        ...

    async def failed(self, seq: int, error: str, traceback: str, now_ms: int, limit: int) -> bool:
        """Count a failure of a stored event. At `limit` the event becomes a dead letter, and True is returned."""
        ...

    async def list(self, after: int, limit: int) -> list[DeadLetter]:
        """Up to `limit` dead letters with ids above `after`, in order."""
        ...

    async def get(self, letter_id: int) -> DeadLetter | None: ...

    async def discard(self, *letter_ids: int) -> int:
        """Delete dead letters; return how many existed."""
        ...

    async def newest_id(self) -> int:
        """The highest id; 0 if there is no dead letter."""
        ...

    async def count(self) -> int: ...

    async def refused(self, reasons: Mapping[int, str], now_ms: int) -> None:
        """Record that a replay was rejected again, with the newest reason of each."""
        ...

    async def revive(self, *letter_ids: int) -> int:
        """Make the events unconsumed again, with no failures counted, and delete the dead letters; return how many."""
        ...


class UserEvents(Protocol):
    """What an admin sees of a user's events. Raises `StoreUnavailable`."""

    async def newest_events(self, user_id: str, limit: int) -> list[TracedEvent]:
        """Newest first."""
        ...

    async def activity(self, user_id: str, until_ms: int, days: int) -> list[ActivityCount]:
        """Counts over `days` periods of 24 hours that end at `until_ms`, unordered. A count of 0 is left out."""
        ...


class UserRecords(Protocol):
    """Everything that the database holds of a user. Raises `StoreUnavailable`."""

    async def find(self, prefix: str, limit: int) -> list[str]:
        """Ids that begin with `prefix`, in the order of their UTF-8 bytes."""
        ...

    async def holdings(self, user_id: str) -> Holdings: ...

    async def erase(self, user_id: str, now_ms: int) -> Holdings:
        """Delete all rows of a user, and owe the invalidation of the user's keys in the same transaction."""
        ...

    async def erase_decisions(self, user_id: str) -> None:
        """Delete decisions that were made while the user's cached values still existed."""
        ...


class Invalidates(Protocol):
    """The part of `app.profiles.online.invalidation.Invalidator` that events use."""

    async def invalidate(self, stale: Mapping[str, Collection[str]]) -> bool:
        """Delete the keys (True), or record the invalidation as owed and wait (False)."""
        ...

    async def drop_older(self, stale: Mapping[str, Mapping[str, int]]) -> None:
        """Delete values that are older than an event whose keys were deleted before."""
        ...


class Publisher(Protocol):
    """Notifies workers of stored events. Never raises and never blocks."""

    def publish(self, seqs: Sequence[int]) -> None:
        """Announce events whose keys are deleted or owed."""
        ...


class Learner(Protocol):
    """Learns from each event once."""

    async def learn(self, events: Sequence[LoggedEvent]) -> None:
        """Learn from all of these events, or raise and learn from none.

        Events are delivered at least once; an implementation recognises repeats by `seq`. Most events concern no
        learner, so skipping one must be cheap.
        """
        ...
