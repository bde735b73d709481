"""Ingest: the one function behind `POST /events`, queue jobs and `profiles events`.

Invariant: `ingest` returns only after the events are durable and their keys are deleted, or the invalidation is
recorded as owed and every earlier trust check has expired. The order is fixed:
  1. commit the events; 2. DEL the keys; 3. notify the workers; 4. answer.
With DEL before the commit, a reader could refill the cache from the old facts in between. With the answer before DEL,
the sender could read the old value. A sender without an answer retries: its events are duplicates then, and step 2 is
repeated, because the first attempt may have failed before it.

Requests that wait at the same time share a commit; each is stored as a whole or not at all. arq starts jobs one by one,
so commits at the queue are spaced out, and more requests share each.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from app.concurrency.load_estimate import LoadEstimate
from app.errors import Conflict, Issue, Overloaded
from app.events.admission import Admission, path_to
from app.events.ports import Admitted, Appended, ClashingEvent, EventLog, Invalidates, Publisher
from app.features.clock import Clock
from app.features.events import TipEvent
from app.telemetry import Metrics

COMMIT_CAP = 2_000
_SENDERS = {"queue": "the queue", "command": "the command line"}
WAITING_CAP = 50_000
# How long events of an HTTP request may wait for their commit, and how many may wait in any case. Jobs are never
# rejected: they can wait in the queue as well.
PATIENCE_S, ALWAYS = {"http": 2.0}, COMMIT_CAP
# Time between commits, per door. arq starts a job every half millisecond at best and polls every ten milliseconds, so
# a commit is only delayed under load.
COMMITS_APART_S = {"queue": 0.004}


class Receipt(NamedTuple):
    """The result of one request. `invalidated` False: the invalidation is owed, and reads compute until it is made."""

    accepted: int
    duplicates: int
    invalidated: bool
    seqs: tuple[int, ...]


class _PendingIngest(NamedTuple):
    sent: Sequence[TipEvent]
    events: Sequence[Admitted]
    done: asyncio.Future[Receipt]


class Ingestor:
    """Stores events and invalidates the features that they change."""

    def __init__(
        self,
        *,
        log: EventLog,
        invalidator: Invalidates,
        publisher: Publisher | None,
        admission: Admission,
        clock: Clock,
        metrics: Metrics,
        door: str,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._log = log
        self._invalidator = invalidator
        self._publisher = publisher
        self._admission = admission
        self._clock = clock
        self._metrics = metrics
        self._door = door
        self._commits_apart_s = COMMITS_APART_S.get(door, 0.0)
        self._pause = pause
        self._next_commit_at = float("-inf")
        self._waiting: deque[_PendingIngest] = deque()
        self._backlog = LoadEstimate(lanes=1, patience_s=PATIENCE_S.get(door, float("inf")), always=ALWAYS)
        self._committing: asyncio.Task[None] | None = None
        self._finishing: set[asyncio.Task[None]] = set()

    @property
    def overloaded(self) -> bool:
        """Whether new events would be rejected; checked before a body is decoded."""
        return self._backlog.full

    async def ingest(self, events: Sequence[TipEvent], sent_by: str = "", *, historical: bool = False) -> Receipt:
        """Store all of these events, or none. `sent_by`: the key in words, or else the door.

        With `historical`, the events (duplicates included) count as known from their event time on in queries with
        `known_at`. This is for imports by admins, since it changes what past queries return.

        Raises:
            InvalidInput: an event time is not allowed.
            Conflict: an event id is known with other content.
            Overloaded: too many events wait already; nothing is stored.
            StoreUnavailable: the database does not answer. The events may or may not be stored; retrying is safe.
        """
        try:
            who = sent_by or _SENDERS.get(self._door, self._door)
            admitted = self._admission.admit(events, self._clock.now_ms(), who, historical=historical)
        except Exception:
            self._metrics.events.labels(self._door, "refused").inc(len(events))
            raise
        if self.overloaded or self._backlog.waiting + len(admitted) > WAITING_CAP:
            raise Overloaded("events")
        request = _PendingIngest(events, admitted, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        self._backlog.waiting += len(admitted)
        if self._committing is None:
            self._committing = asyncio.get_running_loop().create_task(self._commit_all())
        # Shielded: a sender that disconnects must not cancel the commit it shares with others.
        return await asyncio.shield(request.done)

    async def close(self) -> None:
        """Wait for pending commits and invalidations."""
        # A task that is cancelled before it starts never resets `_committing`, hence `done`.
        while begun := [task for task in (self._committing, *self._finishing) if task is not None and not task.done()]:
            await asyncio.wait(begun)

    async def _commit_all(self) -> None:
        try:
            while self._waiting:
                early_s = self._next_commit_at - self._clock.monotonic()
                if early_s > 0:
                    await self._pause(early_s)
                self._next_commit_at = self._clock.monotonic() + self._commits_apart_s
                await self._commit(self._take())
        finally:
            self._committing = None

    def _take(self) -> list[_PendingIngest]:
        group: list[_PendingIngest] = []
        size = 0
        while self._waiting and (not group or size + len(self._waiting[0].events) <= COMMIT_CAP):
            request = self._waiting.popleft()
            group.append(request)
            size += len(request.events)
        self._backlog.waiting -= size
        return group

    async def _commit(self, group: list[_PendingIngest]) -> None:
        started = self._clock.monotonic()
        try:
            outcomes = await self._log.append([request.events for request in group])
        except Exception as error:
            _fail(group, error)
            return
        took, size = self._clock.monotonic() - started, sum(len(request.events) for request in group)
        self._backlog.worked(size, took)
        self._metrics.commit_seconds.observe(took)
        self._metrics.commit_events.observe(size)
        # The next commit does not wait for the DEL of this one.
        task = asyncio.get_running_loop().create_task(self._finish(group, outcomes))
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)

    async def _finish(self, group: list[_PendingIngest], outcomes: Sequence[Appended | ClashingEvent]) -> None:
        stale: dict[str, frozenset[str]] = {}
        stored: list[tuple[_PendingIngest, Appended]] = []
        for request, outcome in zip(group, outcomes, strict=True):
            if isinstance(outcome, ClashingEvent):
                self._metrics.events.labels(self._door, "conflict").inc(len(request.events))
                _fail([request], _conflict(outcome, request.sent))
                continue
            stored.append((request, outcome))
            for user_id, features in outcome.stale.items():
                stale[user_id] = stale.get(user_id, frozenset()) | features
        try:
            invalidated = await self._invalidator.invalidate(stale)
        except Exception as error:
            _fail([request for request, _ in stored], error)
            return
        if self._publisher is not None:
            self._publisher.publish([seq for _, outcome in stored for seq in outcome.seqs])
        now_ms = self._clock.now_ms()
        for request, outcome in stored:
            self._metrics.invalidation_lag.labels(self._door).observe(
                max(0, now_ms - request.events[0].received_at_ms) / 1000
            )
            self._metrics.events.labels(self._door, "accepted").inc(outcome.accepted)
            self._metrics.events.labels(self._door, "duplicate").inc(outcome.duplicates)
            if not request.done.done():
                request.done.set_result(Receipt(outcome.accepted, outcome.duplicates, invalidated, outcome.seqs))


def _conflict(clash: ClashingEvent, sent: Sequence[TipEvent]) -> Conflict:
    return Conflict(
        f"nothing was stored: event_id {clash.event_id!r} is known with other content",
        [Issue(path_to(sent, clash.position, "event_id"), f"{clash.event_id!r} is known with other content")],
    )


def _fail(requests: Sequence[_PendingIngest], error: Exception) -> None:
    for request in requests:
        if not request.done.done():
            request.done.set_exception(error)
            request.done.exception()  # retrieved, since the sender may be gone
