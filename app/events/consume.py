"""Consumes stored events in a worker.

For each event, in this order: delete cached values older than the event, pass the event to the learners (such as the
bandit), mark it as consumed. A crash at any point leaves the event unconsumed; a periodic sweep consumes such events.
The learners get many events in one call and, if that fails, one event per call. An event becomes a dead letter after
`ATTEMPTS` failed calls with that event alone. While the cache, the queue or the database is unavailable, no failure is
counted.

Within one process, a job and the sweep never consume the same event at the same time, so it is not learned twice
concurrently. A queue job hands its events over to `consume_within` and does not wait: consuming the events of many jobs
together takes one query of the log, one of the cache and one commit.
"""

import asyncio
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import msgspec

from app.concurrency.batcher import Bounds
from app.errors import Unavailable
from app.events.ports import DeadLetters, EventLog, Invalidates, Learn
from app.features.clock import Clock
from app.features.events import LoggedEvent, subject_of
from app.telemetry import Metrics, logger, warn

ATTEMPTS = 5
SWEEP_AGE_MS = 2_000
SWEEP_CHUNK = 500
BOUNDS = Bounds(kind="consumption", at_once=500, most=100_000, apart_s=0.2)
log = logger("events.consume")


class Consumer(msgspec.Struct, kw_only=True, eq=False, dict=True):
    log: EventLog
    letters: DeadLetters
    invalidator: Invalidates
    learners: Sequence[Learn]
    clock: Clock
    metrics: Metrics
    tracing: Callable[[list[str | None]], AbstractContextManager[object]] = nullcontext
    _in_hand: set[int] = msgspec.field(default_factory=set)

    async def consume(self, seqs: Sequence[int], *, swept: bool = False) -> int:
        """Consume events, by sequence number; return how many were consumed. Events that another call is consuming are
        skipped. `swept`: first delete the cache keys that the events make stale. By default, the ingest has deleted
        them already, or has recorded the deletion as owed. If the call raises `Unavailable`, the events stay unconsumed
        and the call can be repeated."""
        mine = [seq for seq in seqs if seq not in self._in_hand]
        self._in_hand.update(mine)
        try:
            # Read only now that no other call can consume them. Otherwise: 1. the sweep sees an unconsumed
            # event; 2. a job consumes it and marks it; 3. the sweep learns it again.
            if not (events := await self.log.logged(mine)):
                return 0
            with self.tracing([item.traceparent for item in events]):
                features = await self.log.stale_features()
                newest: dict[str, dict[str, int]] = {}
                for item in events:
                    stale = dict.fromkeys(features[subject_of(item.event)], item.seq)
                    newest.setdefault(item.event.user_id, {}).update(stale)
                if swept:
                    await self.invalidator.invalidate({user: cells.keys() for user, cells in newest.items()})
                else:
                    await self.invalidator.drop_older(newest)
                if consumed := await self._learned(events):
                    now_ms = self.clock.now_ms()
                    await self.log.mark_consumed([item.seq for item in consumed])
                    for item in consumed:
                        self.metrics.consumption_lag.observe(max(0, now_ms - item.received_at_ms) / 1000)
                return len(consumed)
        finally:
            self._in_hand.difference_update(mine)

    async def consume_within(self, limit_s: float, seqs: Sequence[int]) -> None:
        """Consume events as `consume` does, or leave them to the sweep if that fails or takes longer than `limit_s`."""
        try:
            async with asyncio.timeout(limit_s):
                await self.consume(seqs)
        except (Unavailable, TimeoutError) as error:
            warn(log, error)("left_to_the_sweep", events=len(seqs), error=str(error) or type(error).__name__)
        except Exception:
            log.exception("left_to_the_sweep", events=len(seqs))

    async def sweep(self) -> int:
        """Consume events that have been unconsumed for `SWEEP_AGE_MS`; return how many were consumed. The process that
        stored them may have died before it deleted the stale cache keys, so the sweep deletes these first."""
        swept = 0
        before_ms = self.clock.now_ms() - SWEEP_AGE_MS
        # If the clock was set back, events that arrived before have a time ahead of it. They are swept at once.
        while events := await self.log.unconsumed(
            before_ms, SWEEP_CHUNK, or_after_ms=self.clock.now_ms() + SWEEP_AGE_MS
        ):
            consumed = await self.consume([item.seq for item in events], swept=True)
            swept += consumed
            if consumed < len(events):
                break  # events that failed or are held elsewhere are retried by the next sweep, not at once
        if swept:
            log.info("swept", events=swept)
        return swept

    async def _learned(self, events: Sequence[LoggedEvent]) -> Sequence[LoggedEvent]:
        """Pass events to the learners together, and one by one if that fails. Return the events that were learned."""
        try:
            for learn in self.learners:
                await learn(events)
        except Unavailable:
            raise
        except Exception as error:
            if len(events) > 1:
                return [item for event in events for item in await self._learned([event])]
            (item,) = events
            reason = f"{type(error).__name__}: {error}"
            buried = await self.letters.failed(item.seq, reason, traceback.format_exc(), self.clock.now_ms(), ATTEMPTS)
            log.warning("event_failed", event_id=item.event.event_id, error=reason, buried=buried)
            return []
        return events
