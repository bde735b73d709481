"""Computing what the cache does not hold: few statements, each on a fresh snapshot.

Requests that wait at the same time share a statement, up to `CAP` users; a request joins only a statement that has
not begun, so its snapshot is never older than the request. A request for more users than that goes in slices, one at
a time, so that a batch of a thousand does not hold every reader while single reads wait.

Past moments go in slices of about equal work, each on a snapshot of its own, and requests take turns slice by slice: a
request waits for one slice of each of the others, however much they ask for.

Invariants: a value that is not of its feature's dtype never leaves this module; it is counted, logged and answered as
null with the reason. A feature that is not available (`app.profiles.availability`) is null with the reason, too, and no
request waits for it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from app.concurrency.load_estimate import LoadEstimate
from app.errors import StoreUnavailable, Unavailable
from app.features.clock import Clock
from app.features.registry import Registry, encode_value, indices
from app.profiles.availability import FeatureAvailability, FeatureTrouble
from app.profiles.ports import ComputeRow, Snapshot, Source
from app.profiles.trial import described
from app.telemetry import Metrics, logger

CAP = 128
# How long a read may wait for its statement to begin, and how many users may do so in any case.
LIVE_PATIENCE_S, LIVE_ALWAYS = 0.5, 64
# How long past moments may wait for others, and how many slices may wait in any case.
MOMENTS_PATIENCE_S, MOMENTS_ALWAYS = 10.0, 80
log = logger("profiles.computation")


class ComputedValue(NamedTuple):
    """One computed value as JSON, or null with the `error` that forbids serving it."""

    json: bytes
    error: str | None = None


class Computed(NamedTuple):
    """A user's values by feature index, of a statement that began at `at_ms` and saw the events up to `seq`."""

    seq: int
    at_ms: int
    outcomes: Mapping[int, ComputedValue]


class _Statement:
    """Users waiting for one statement that has not begun."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.wanted: dict[str, int] = {}
        self.done: asyncio.Future[dict[str, Computed]] = loop.create_future()

    def takes(self, wanted: Mapping[str, int]) -> bool:
        return len(self.wanted) + len(wanted) <= CAP

    def add(self, wanted: Mapping[str, int]) -> int:
        """How many more users it has now."""
        before = len(self.wanted)
        for user_id, mask in wanted.items():
            self.wanted[user_id] = self.wanted.get(user_id, 0) | mask
        return len(self.wanted) - before


class Computation:
    """Live computations, shared; and past moments, one by one."""

    def __init__(
        self,
        source: Source,
        registry: Registry,
        clock: Clock,
        metrics: Metrics,
        width: int,
        availability: FeatureAvailability | None = None,
    ) -> None:
        """`width`: how many statements may run at once, the number of read connections."""
        self.availability = availability or FeatureAvailability(registry, clock)
        self._source = source
        self._registry = registry
        self._clock = clock
        self._metrics = metrics
        self._width = width
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Statement] = deque()
        self._beginning = 0
        self._running: set[asyncio.Task[None]] = set()
        self._attempt: asyncio.Task[None] | None = None
        self._live = LoadEstimate(lanes=width, patience_s=LIVE_PATIENCE_S, always=LIVE_ALWAYS)
        # Past moments take turns with one another, piece by piece, and leave a reader to those who read now.
        self._moments_at_once = max(1, width - 1)
        self._moments = LoadEstimate(lanes=self._moments_at_once, patience_s=MOMENTS_PATIENCE_S, always=MOMENTS_ALWAYS)
        self._moments_turn = asyncio.Semaphore(self._moments_at_once)
        self._moments_left: dict[asyncio.Task[Any], int] = {}  # rows by request
        self._stopping = False
        self._defaults = [
            encode_value(entry.dtype, entry.default) or b"null" if entry.default is not None else b"null"
            for entry in registry
        ]

    @property
    def overloaded(self) -> bool:
        """Whether a live read that began now would wait too long. To be asked before; nothing is refused here."""
        return self._live.full

    def coming(self, users: int) -> None:
        """Count users that will soon wait for a statement, or (negative) that do so now and are counted otherwise."""
        self._live.waiting += users

    def history_overloaded(self, rows: int = 1) -> bool:
        """The same of a request for so many past moments: of each other request it waits for no more than its own."""
        slices = -(-rows // CAP)
        self._moments.waiting = sum(min(-(-left // CAP), slices) for left in self._moments_left.values())
        return self._moments.full

    def stop_moments(self) -> None:
        """Interrupt what computes past moments, and refuse it from now on: the process stops."""
        self._stopping = True
        for task in self._moments_left:
            task.cancel()

    async def live(self, wanted: Mapping[str, int]) -> dict[str, Computed]:
        """Compute each user's mask of features as of now, in slices of at most `CAP` users.

        The outcomes of a user may include features that only another request asked for.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        pairs = iter(wanted.items())
        results: dict[str, Computed] = {}
        self._live.waiting += (later := len(wanted))
        try:
            while piece := dict(islice(pairs, CAP)):
                self._live.waiting -= len(piece)
                later -= len(piece)
                # Shielded: a caller that goes away must not take the others' statement with it.
                shared = await asyncio.shield(self._join(piece))
                results.update((user_id, shared[user_id]) for user_id in piece)
        finally:
            self._live.waiting -= later
        return results

    async def moments(self, asked: Sequence[ComputeRow]) -> list[Mapping[int, ComputedValue]]:
        """Compute past moments, in the order asked; never shared, never cached. Cancelled, it interrupts its statement.

        Raises:
            StoreUnavailable: when the database does not answer, or the process stops.
        """
        task = asyncio.current_task()
        assert task is not None
        results: list[Mapping[int, ComputedValue]] = []
        try:
            while left := len(asked) - len(results):
                if self._stopping:
                    raise asyncio.CancelledError
                self._moments_left[task] = left
                async with self._moments_turn:
                    started = self._clock.monotonic()
                    piece = asked[len(results) : len(results) + CAP]
                    piece = piece[: await self._source.fitting(piece)]
                    _, outcomes = await self._compute(piece, self._clock.now_ms())
                    results.extend(outcomes)
                    self._moments.worked(1, self._clock.monotonic() - started)
        except asyncio.CancelledError:
            if not self._stopping:
                raise
            task.uncancel()
            raise StoreUnavailable("past moments are not computed any more: this process stops; try again") from None
        finally:
            self._moments_left.pop(task, None)
        return results

    def _join(self, wanted: Mapping[str, int]) -> asyncio.Future[dict[str, Computed]]:
        if not self._waiting or not self._waiting[-1].takes(wanted):
            self._waiting.append(_Statement(self._loop))
            self._pump()
        self._live.waiting += self._waiting[-1].add(wanted)
        return self._waiting[-1].done

    def _pump(self) -> None:
        """Start what may start in the next turn of the loop; requests until then join."""
        while len(self._waiting) > self._beginning and len(self._running) < self._width:
            self._beginning += 1
            task = self._loop.create_task(self._run())
            self._running.add(task)
            task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._pump()

    async def _run(self) -> None:
        self._beginning -= 1
        statement = self._waiting.popleft()
        self._live.waiting -= len(statement.wanted)
        started = self._clock.monotonic()
        asked = [ComputeRow(user_id, mask) for user_id, mask in statement.wanted.items()]
        try:
            at_ms = self._clock.now_ms()
            seq, rows = await self._compute(asked, at_ms)
            result = {row.user_id: Computed(seq, at_ms, outcomes) for row, outcomes in zip(asked, rows, strict=True)}
        except BaseException as error:
            if not statement.done.done():
                statement.done.set_exception(error)
                statement.done.exception()  # marked as seen: every waiter may be gone
            if not isinstance(error, Exception):
                raise
        else:
            self._live.worked(len(asked), self._clock.monotonic() - started)
            if not statement.done.done():
                statement.done.set_result(result)

    def withheld(self, index: int, user_id: str) -> FeatureTrouble | None:
        """Why a feature that is not cached is null now, without a statement; None if it can be computed."""
        trouble = self.availability.paused(index)
        if trouble is not None:
            self.availability.withheld(index, user_id)
            self.try_again()
        return trouble

    def try_again(self) -> None:
        """Compute a paused feature anew, in the background, if its pause is over."""
        if self._attempt is None or self._attempt.done():
            due = self.availability.due()
            if due is not None:
                self._attempt = self._loop.create_task(self._try(*due))

    async def close(self) -> None:
        """End what runs in the background."""
        if self._attempt is not None:
            self._attempt.cancel()
            await asyncio.gather(self._attempt, return_exceptions=True)

    async def _try(self, index: int, user_id: str) -> None:
        asked = ComputeRow(user_id, 1 << index)
        try:
            snapshot = await self._source.attempt(self._clock.now_ms(), [asked])
        except Unavailable as error:
            self.availability.pause(index, user_id, str(error), slow=True)
            return
        outcome = self._outcome(index, snapshot.rows[0][index], snapshot.errors.get((0, index)), user_id)
        if outcome.error is None:
            self.availability.resume(index)
        else:
            self.availability.pause(index, user_id, outcome.error, slow=bool(snapshot.overdue))

    async def _compute(self, asked: Sequence[ComputeRow], now_ms: int) -> tuple[int, list[dict[int, ComputedValue]]]:
        """The newest sequence number that the statement saw, and the outcomes row by row."""
        self.try_again()
        withheld = self.availability.unavailable
        # Before anything is awaited: a feature may be available again when the others have been computed.
        reasons = {index: ComputedValue(b"null", self.availability.reason(index)) for index in indices(withheld)}
        wanted = [row._replace(mask=row.mask & ~withheld) for row in asked] if withheld else asked
        started = self._clock.monotonic()
        snapshot = await self._source.compute(now_ms, wanted)
        self._metrics.computation_seconds.observe(self._clock.monotonic() - started)
        self._metrics.computed_users.inc(len(asked))
        found = [self._outcomes(place, row, snapshot) for place, row in enumerate(wanted)]
        if withheld:
            for row, outcomes in zip(asked, found, strict=True):
                for index in indices(row.mask & withheld):
                    self.availability.withheld(index, row.user_id)
                    outcomes[index] = reasons[index]
        return snapshot.seq, found

    def _outcomes(self, place: int, row: ComputeRow, snapshot: Snapshot) -> dict[int, ComputedValue]:
        raw = snapshot.rows[place]
        outcomes: dict[int, ComputedValue] = {}
        for index in indices(row.mask):
            outcome = self._outcome(index, raw[index], snapshot.errors.get((place, index)), row.user_id)
            if outcome.error is None:
                self.availability.succeeded(index)
            elif snapshot.overdue >> index & 1:
                self.availability.pause(index, row.user_id, outcome.error, slow=True)
            else:
                self.availability.failed(index, row.user_id, outcome.error)
            outcomes[index] = outcome
        return outcomes

    def _outcome(self, index: int, raw: object, error: str | None, user_id: str) -> ComputedValue:
        if raw is None and error is None:
            return ComputedValue(self._defaults[index])
        entry = self._registry[index]
        if error is None:
            encoded = encode_value(entry.dtype, raw)
            if encoded is not None:
                return ComputedValue(encoded)
            error = described(raw, entry.dtype)
        self._metrics.computation_errors.labels(entry.name).inc()
        log.error("computation_failed", feature=entry.name, user_id=user_id, error=error)
        return ComputedValue(b"null", error)
