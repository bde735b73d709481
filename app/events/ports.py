"""Protocols and value types of the event package. `app.stores` implements the protocols, whose methods may raise
`StoreUnavailable`. The sequence numbers of events rise with every commit and are never reused."""

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

from app.features.events import LoggedEvent, TipEvent


class Admitted(NamedTuple):
    """An event that has passed validation, with the facts that are stored beside it. `digest` is a hash of the event,
    which tells a duplicate from a conflict. `occurred_at_ms` is the event time that features use: the time that the
    producer claims or, if that is ahead of the service's clock, the time of arrival. In the second case `claimed_at_ms`
    is the claimed time, otherwise None. `sent_by` names the API key or the entry point. A `historical` event counts as
    known from its event time on, although it arrived later. `traceparent`: the trace of its request or job, if any."""

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
    each user id to the features that the events, new or duplicate, invalidate. The ingest sets `invalidated` to False
    if the deletion of the stale cache keys is owed."""

    accepted: int
    duplicates: int
    seqs: tuple[int, ...]
    stale: Mapping[str, frozenset[str]]
    invalidated: bool = True


class ClashingEvent(NamedTuple):
    """The outcome of a rejected request: its event at index `position` reuses an event id with other content."""

    position: int
    event_id: str


class TracedEvent(NamedTuple):
    """A stored event and its processing state. Features count it at `counted_at_ms`. For `claimed_at_ms`, see
    `Admitted`. `consumed`: no worker has to consume it any more. `letter_id`: the id of its dead letter, if any."""

    logged: LoggedEvent
    counted_at_ms: int
    claimed_at_ms: int | None
    consumed: bool
    letter_id: int | None


class Holdings(NamedTuple):
    """How many rows the database holds of a user. `rebuilds`: the runs whose list of users names the user. `learned`:
    the decisions that the bandit has learned from."""

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
    """An event whose consumption failed repeatedly, or a queued payload that was rejected, which has no `seq`."""

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
        """Store requests, each as a whole or not at all, in one durable commit. Return an outcome for each request."""

    async def unconsumed(
        self, received_before_ms: int, limit: int, *, or_after_ms: int | None = None
    ) -> list[LoggedEvent]:
        """Up to `limit` unconsumed events that arrived before `received_before_ms`, or after `or_after_ms`, a time in
        the future. Events have a time of arrival in the future if the clock was set back since."""

    async def logged(self, seqs: Sequence[int]) -> list[LoggedEvent]:
        """The stored events with these sequence numbers, in rising order, except those that are consumed already."""

    async def mark_consumed(self, seqs: Sequence[int]) -> None: ...

    async def stale_features(self) -> Mapping[str, frozenset[str]]:
        """For each subject, the features that its events invalidate. A feature is included if it is in any of the
        registries that processes have recorded, even in that of an earlier release."""


class DeadLetters(Protocol):
    async def bury_payloads(self, payloads: Sequence[tuple[str, str]], now_ms: int) -> Sequence[int]:
        """Store rejected payloads of the queue, each with its error, as dead letters, all or none; return their ids."""

    async def failed(self, seq: int, error: str, traceback: str, now_ms: int, limit: int) -> bool:
        """Count a failure to consume an event. At failure number `limit`, make it a dead letter and return True."""

    async def list(self, after: int, limit: int) -> list[DeadLetter]:
        """Up to `limit` dead letters with ids above `after`, ordered by id."""

    async def get(self, letter_id: int) -> DeadLetter | None: ...

    async def discard(self, letter_id: int) -> bool:
        """Delete a dead letter; return False if there is none with this id."""

    async def count(self) -> int: ...

    async def refused(self, letter_id: int, reason: str, now_ms: int) -> None:
        """Record that the replay of a dead letter was rejected again."""

    async def revive(self, letter_id: int) -> bool:
        """Make the event of a dead letter unconsumed again, and delete the letter; return False if there is none."""


class UserRecords(Protocol):
    """Finds users, and shows, counts and erases the rows that the database holds of a user."""

    async def find(self, prefix: str, limit: int) -> list[str]:
        """Up to `limit` ids of users that begin with `prefix`, in the order of their UTF-8 bytes."""

    async def newest_events(self, user_id: str, limit: int) -> list[TracedEvent]:
        """Up to `limit` of the user's events, newest first."""

    async def activity(self, user_id: str, until_ms: int, days: int) -> list[ActivityCount]:
        """The user's event counts, unordered and without zeros, over `days` periods of 24 hours until `until_ms`."""

    async def holdings(self, user_id: str) -> Holdings: ...

    async def erase(self, user_id: str, now_ms: int) -> Holdings:
        """Delete all rows of a user, and record in the same transaction that the deletion of the cache keys is owed."""

    async def erase_decisions(self, user_id: str) -> None:
        """Delete the user's decisions again, after the cache keys have been deleted. Until then, a request could read
        the erased user's cached values and store a decision."""


class Invalidates(Protocol):
    """Deletes stale cached values: the part of `app.profiles.online.invalidation.Invalidator` that events use."""

    async def invalidate(self, stale: Mapping[str, Collection[str]]) -> bool:
        """Delete the cached values of features, by user id. If the cache does not answer, record in the database that
        they must be deleted, wait until every process knows that, and return False."""

    async def drop_older(self, stale: Mapping[str, Mapping[str, int]]) -> None:
        """Delete a user's cached value of a feature if it was computed before an event. `stale` maps the user id and
        the name of the feature to the sequence number of the event."""


# Updates a model with all of these events, or raises and learns from none. Events are delivered at least once; `seq`
# identifies repeats. Most events concern no model, so skipping an event must be cheap.
Learn = Callable[[Sequence[LoggedEvent]], Awaitable[None]]
