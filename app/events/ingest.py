"""Ingest: the one function that stores events, behind `POST /events`, queue jobs and `profiles events`.

Invariant: `ingest` returns only after the events are durable and no process serves a value that they made stale. If the
cache does not answer, it records in the database that the deletion of the stale keys is *owed*, and waits until every
process has had time to notice the record: then no process serves cached values of the user. The order is fixed:
  1. commit the events; 2. DEL the stale keys; 3. notify the workers; 4. answer.
If DEL came before the commit, a reader could refill the cache from the old facts in between. If the answer came before
DEL, the sender could read the old value. A sender that gets no answer retries. Its events are then duplicates, and step
2 is repeated for them, because the first attempt may have failed between steps 1 and 2.

Requests that wait at the same time share a commit and a DEL; each is stored as a whole or not at all.
"""

import asyncio
from collections.abc import Callable, Sequence
from functools import cached_property

import msgspec

from app.concurrency.batcher import Batcher, Bounds
from app.errors import Conflict, Issue
from app.events.ports import Admitted, Appended, ClashingEvent, EventLog, Invalidates
from app.events.validation import admit, path_to
from app.features.clock import Clock
from app.features.events import TipEvent
from app.telemetry import Metrics

_SENDERS = {"queue": "the queue", "command": "the command line"}
BOUNDS = Bounds(kind="events", at_once=2_000, most=50_000)
BOUNDS_OF = {
    "http": BOUNDS._replace(patience_s=2.0),
    # arq starts a job every half millisecond at best and polls every ten milliseconds: without a time between commits,
    # each job would get its own.
    "queue": BOUNDS._replace(apart_s=0.004),
}


# The outcome of one request, and the task that deletes the stale keys of its group: see `_invalidate`.
_Committed = tuple[Appended | ClashingEvent, asyncio.Task[bool]]


class Ingestor(msgspec.Struct, kw_only=True, eq=False, dict=True):
    """Stores events and deletes the cache keys that they make stale. `publish` asks the workers to consume stored
    events, by sequence number; it never raises and never blocks."""

    log: EventLog
    invalidator: Invalidates
    publish: Callable[[Sequence[int]], None] | None
    retention_days: int
    clock: Clock
    metrics: Metrics
    door: str
    bounds: Bounds | None = None
    _invalidating: set[asyncio.Task[bool]] = msgspec.field(default_factory=set)

    @cached_property
    def _commits(self) -> Batcher[Sequence[Admitted], _Committed]:
        bounds = self.bounds or BOUNDS_OF.get(self.door, BOUNDS)
        return Batcher(self._commit, self.clock.monotonic, bounds, size=len)

    @property
    def overloaded(self) -> bool:
        """Whether new events would be rejected now; callers check it before they decode a body."""
        return self._commits.overloaded

    async def ingest(
        self, events: Sequence[TipEvent], sent_by: str = "", *, historical: bool = False, count_rejection: bool = True
    ) -> Appended:
        """Store all of these events, or none. `sent_by` names their sender; if it is empty, the entry point is recorded
        as the sender, such as "the queue". `historical`: the events count as known from their event time on (see
        `Admitted`), even those that are duplicates of stored events. Only imports by admins set it, since it changes
        what queries of the past return. Unless `count_rejection`, the metrics do not count rejected events, because the
        caller sends them again. Raises `InvalidInput` if an event time is not allowed, `Conflict` if an event id is
        known with other content, and `Overloaded` if too many events wait. After `StoreUnavailable`, the events may or
        may not be stored; retrying is safe."""
        try:
            sender = sent_by or _SENDERS.get(self.door, self.door)
            admitted = admit(events, self.clock.now_ms(), self.retention_days, sender, historical=historical)
        except Exception:
            self.metrics.events.labels(self.door, "refused").inc(len(events) * count_rejection)
            raise
        outcome, invalidating = await self._commits.submit(admitted)
        if isinstance(outcome, ClashingEvent):
            self.metrics.events.labels(self.door, "conflict").inc(len(events) * count_rejection)
            problem = f"{outcome.event_id!r} is known with other content"
            path = path_to(events, outcome.position, "event_id")
            raise Conflict(f"nothing was stored: event_id {problem}", [Issue(path, problem)])
        # Shielded, because a sender that disconnects cancels what it waits for, and others wait for the same task.
        return outcome if await asyncio.shield(invalidating) else outcome._replace(invalidated=False)

    async def close(self) -> None:
        """Wait until all submitted events are committed and the cache keys that they made stale are deleted."""
        await self._commits.close()
        while self._invalidating:
            await asyncio.wait(self._invalidating)

    async def _commit(self, group: Sequence[Sequence[Admitted]]) -> list[_Committed]:
        """Commit a group of requests. Delete the stale cache keys in the background, while the next group commits."""
        started = self.clock.monotonic()
        outcomes = await self.log.append(group)
        self.metrics.commit_seconds.observe(self.clock.monotonic() - started)
        self.metrics.commit_events.observe(sum(map(len, group)))
        together = zip(group, outcomes, strict=True)
        stored = [(events, outcome) for events, outcome in together if isinstance(outcome, Appended)]
        task = asyncio.get_running_loop().create_task(self._invalidate(stored))
        self._invalidating.add(task)
        task.add_done_callback(self._invalidating.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # retrieved: its senders may be gone
        return [(outcome, task) for outcome in outcomes]

    async def _invalidate(self, stored: Sequence[tuple[Sequence[Admitted], Appended]]) -> bool:
        """Delete the cache keys that events made stale and notify the workers. Return False if the DEL is owed."""
        stale: dict[str, frozenset[str]] = {}
        for _, outcome in stored:
            for user_id, features in outcome.stale.items():
                stale[user_id] = stale.get(user_id, frozenset()) | features
        invalidated = await self.invalidator.invalidate(stale)
        if self.publish is not None:
            self.publish([seq for _, outcome in stored for seq in outcome.seqs])
        now_ms = self.clock.now_ms()
        for events, outcome in stored:
            lag_ms = max(0, now_ms - events[0].received_at_ms)
            self.metrics.invalidation_lag.labels(self.door).observe(lag_ms / 1000)
            self.metrics.events.labels(self.door, "accepted").inc(outcome.accepted)
            self.metrics.events.labels(self.door, "duplicate").inc(outcome.duplicates)
        return invalidated
