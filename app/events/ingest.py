"""Ingest: the one function behind both doors.

Invariant: `ingest` returns only after the events are durable and their keys are gone (or the debt is committed and
every older look has expired). The order is fixed:
  1. commit the events; 2. DEL the keys; 3. tell the workers; 4. answer.
DEL before commit would let a reader refill from the old facts in between; an answer before DEL would let the sender
read the old value. A sender that got no answer sends again: the events are duplicates then, and 2 is made again,
because the first try may have died before it.

Requests that wait at the same time share a commit; each is stored whole or not at all. Where requests come one by one
(arq starts one job after the other), commits that begin some time apart find more of them waiting.
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
# How long events may wait for their commit at the door where somebody waits for the answer, and how many may in any
# case. What comes by the queue is not sent away: its jobs wait there as well as here.
PATIENCE_S, ALWAYS = {"http": 2.0}, COMMIT_CAP
# By door; at the others commits follow one another. arq starts a job every half millisecond at best, and looks for new
# ones every ten: only under load is a commit put off.
COMMITS_APART_S = {"queue": 0.004}


class Receipt(NamedTuple):
    """What became of one request. `invalidated` False: the debt is recorded, and reads compute until it is settled."""

    accepted: int
    duplicates: int
    invalidated: bool
    seqs: tuple[int, ...]


class _PendingIngest(NamedTuple):
    sent: Sequence[TipEvent]
    events: Sequence[Admitted]
    done: asyncio.Future[Receipt]


class Ingestor:
    """Stores events and makes the profiles they touch untrue."""

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
        """Whether events that came now would wait too long; nobody need decode them then."""
        return self._backlog.full

    async def ingest(self, events: Sequence[TipEvent], sent_by: str = "", *, historical: bool = False) -> Receipt:
        """Store all of these events, or none. `sent_by`: the key in words, or else the door.

        `historical` ones, those known already too, count as known from their event time on when a past moment is asked
        about with `known_at`. That is for imports by an admin: it rewrites what was known when.

        Raises:
            InvalidInput: a time is refused.
            Conflict: an event id is known with other content.
            Overloaded: too much waits for the database already; nothing is stored.
            StoreUnavailable: the database does not answer. The events may or may not be stored; sending them again is
                safe.
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
        # Shielded: a sender that hangs up must not undo what shares its commit.
        return await asyncio.shield(request.done)

    async def close(self) -> None:
        """Finish what was begun."""
        # Looked at by `done`: a task that is cancelled before it has begun clears nothing behind it.
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
        # The next commit need not wait for this one's DEL.
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
            request.done.exception()  # marked as seen: the sender may be gone
