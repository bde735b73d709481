"""What events need from outside, as small protocols with their value types. `app.stores` implements them.

A *sequence number* is the order in which events were committed; numbers are never reused. All methods of the SQLite
ports raise `StoreUnavailable` when the database does not answer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

from app.features.events import TipEvent


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
    """One request's events are stored. `stale` names per user the features that they make untrue, duplicates' too."""

    accepted: int
    duplicates: int
    seqs: tuple[int, ...]
    stale: Mapping[str, frozenset[str]]


class ClashingEvent(NamedTuple):
    """One request was refused whole: the event at `position` reuses an id with other content."""

    position: int
    event_id: str


class LoggedEvent(NamedTuple):
    """A stored event, as a worker takes it up. `attempts` counts failures by itself."""

    seq: int
    event: TipEvent
    received_at_ms: int
    attempts: int


class TracedEvent(NamedTuple):
    """A stored event and what became of it. `counted_at_ms` is its event time; `claimed_at_ms` the producer's own
    where that is another. `letter_id` is set where it is a dead letter, whose consumption ended without success."""

    logged: LoggedEvent
    counted_at_ms: int
    claimed_at_ms: int | None
    consumed_at_ms: int | None
    letter_id: int | None


class Holdings(NamedTuple):
    """How much the database holds of a user: rows of each kind, and ended rebuilds that name them.

    `learned`: how many decisions the evidence was learned from that the bandit keeps of the user.
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
    """So many events of a kind (`served`, or the feedback's action) fell on a day and a local hour of the user.

    Days are 24 hours each, counted back from now: 0 is the last 24 hours.
    """

    days_ago: int
    local_hour: int
    kind: str
    events: int


class DeadLetter(NamedTuple):
    """What could not be consumed. `seq` is None where it never became an event; then `payload` is all there is."""

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
    """The facts and their log."""

    async def append(self, requests: Sequence[Sequence[Admitted]]) -> list[Appended | ClashingEvent]:
        """Store each request's events whole or not at all, all in one durable commit."""
        ...

    async def unconsumed(
        self, received_before_ms: int, limit: int, *, or_after_ms: int | None = None
    ) -> list[LoggedEvent]:
        """The oldest events that no worker has consumed and that arrived before a moment, or after another."""
        ...

    async def logged(self, seqs: Sequence[int]) -> list[LoggedEvent]:
        """Those of these events that are not consumed yet."""
        ...

    async def mark_consumed(self, seqs: Sequence[int], now_ms: int) -> None:
        """Consumed: no worker takes them up again."""
        ...

    async def stale_features(self, subjects: Collection[str]) -> Mapping[str, frozenset[str]]:
        """Per subject, the features that any process of this database caches and the subject makes untrue."""
        ...

    async def oldest_ms(self) -> int | None:
        """When the oldest event occurred; None if there is none."""
        ...

    async def prune(self, before_ms: int, limit: int) -> int:
        """Delete up to `limit` of the oldest events that occurred before a moment; how many went."""
        ...


class DeadLetters(Protocol):
    """What failed by itself again and again, or was never an event."""

    async def bury_payload(self, payload: str, error: str, traceback: str, now_ms: int) -> int:
        """Keep what came by the queue and is no event."""
        ...

    async def failed(self, seq: int, error: str, traceback: str, now_ms: int, limit: int) -> bool:
        """Count one failure of a logged event; at `limit` it becomes a dead letter, and True is returned."""
        ...

    async def list(self, after: int, limit: int) -> list[DeadLetter]:
        """Dead letters by id, above `after`."""
        ...

    async def get(self, letter_id: int) -> DeadLetter | None:
        """One of them."""
        ...

    async def discard(self, *letter_ids: int) -> int:
        """Forget these; how many there were."""
        ...

    async def newest_id(self) -> int:
        """The highest id; 0 where there is no letter."""
        ...

    async def count(self) -> int:
        """How many there are."""
        ...

    async def refused(self, reasons: Mapping[int, str], now_ms: int) -> None:
        """They were tried again and are still no events: count that, and keep the newest reason of each."""
        ...

    async def revive(self, *letter_ids: int) -> int:
        """Put logged events back among the unconsumed, their counts at zero, and forget the letters.

        How many letters there were.
        """
        ...


class Invalidates(Protocol):
    """The part of `app.profiles.online.invalidation.Invalidator` that events use."""

    async def invalidate(self, stale: Mapping[str, Collection[str]]) -> bool:
        """Drop the keys (True), or record the debt and wait (False)."""
        ...

    async def drop_older(self, stale: Mapping[str, Mapping[str, int]]) -> None:
        """Drop values computed before an event whose DEL is known to have been made."""
        ...


class Publisher(Protocol):
    """Tells workers of stored events. Never fails the caller and never makes it wait."""

    def publish(self, seqs: Sequence[int]) -> None:
        """Events whose keys have been dropped, or are owed."""
        ...


class Learner(Protocol):
    """Learns from events once."""

    async def learn(self, events: Sequence[LoggedEvent]) -> None:
        """Learn from all of these, or from none where one of them cannot be learned from: then it raises.

        Called at least once per event: an implementation tells repeats by `seq`. Most events concern no learner; they
        must cost next to nothing.
        """
        ...
