"""Ingests events that other programs publish as queue jobs.

Invariant: when `take_in` returns, every item of the payload is either stored as an event or is a dead letter. Events
are stored first: storing is idempotent, and creating a dead letter is not. So if the payload is retried after a failure
between these steps, each rejected item still becomes one dead letter.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from app.errors import Conflict, InvalidInput
from app.events.ingest import Ingestor
from app.events.ports import DeadLetters
from app.events.replay import reason_of
from app.events.validation import MAX_EVENTS, from_queue
from app.features.clock import Clock
from app.features.events import TipEvent
from app.telemetry import Metrics, logger

log = logger("events.queue_door")


class QueueDoor(msgspec.Struct, eq=False, dict=True):
    ingestor: Ingestor
    letters: DeadLetters
    clock: Clock
    metrics: Metrics

    async def take_in(self, payload: object) -> list[int]:
        """Store a payload, a list of events, and return the sequence numbers of the new events.

        Items that are rejected become dead letters, and so does a payload that is not a list.

        Raises:
            StoreUnavailable: the database does not answer; retry the whole payload.
        """
        if not isinstance(payload, list):
            await self.bury(payload, "expected a list of events")
            return []
        events: list[TipEvent] = []
        refused: list[tuple[object, str]] = []
        for index, item in enumerate(payload):
            try:
                events.append(from_queue(item, f"[{index}]"))
            except InvalidInput as error:
                refused.append((item, reason_of(error)))
        seqs: list[int] = []
        for start in range(0, len(events), MAX_EVENTS):
            seqs.extend(await self._store(events[start : start + MAX_EVENTS], refused))
        for item, reason in refused:
            await self.bury(item, reason)
        return seqs

    async def bury(self, payload: object, reason: str) -> None:
        """Store a rejected payload as a dead letter, with the reason. Raises `StoreUnavailable`."""
        try:
            text = msgspec.json.encode(payload, enc_hook=repr).decode()
        except RecursionError:
            text = '"nested too deeply to be kept"'
        letter = await self.letters.bury_payload(text, reason, "", self.clock.now_ms())
        self.metrics.events.labels("queue", "buried").inc()
        log.warning("event_buried", dead_letter=letter, error=reason)

    async def _store(self, events: Sequence[TipEvent], refused: list[tuple[object, str]]) -> list[int]:
        try:
            return list((await self.ingestor.ingest(events)).seqs)
        except (InvalidInput, Conflict):
            pass  # at least one event is rejected: ingest each alone, in a shared commit
        outcomes = await asyncio.gather(*(self.ingestor.ingest([event]) for event in events), return_exceptions=True)
        seqs: list[int] = []
        for event, outcome in zip(events, outcomes, strict=True):
            if isinstance(outcome, (InvalidInput, Conflict)):
                refused.append((msgspec.to_builtins(event), reason_of(outcome)))
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                seqs.extend(outcome.seqs)
        return seqs
