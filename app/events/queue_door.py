"""Ingests events that other programs publish as queue jobs, and replays dead letters when an admin asks for it.

Invariants:
- When `take_in` returns, every item of the payload is either stored as an event or is a dead letter. Events are stored
  first: storing is idempotent, and creating dead letters is not. The dead letters of a payload are created in one
  transaction. So if the payload is retried after a failure, each rejected item still becomes one dead letter.
- A letter is deleted only after its event is stored; a letter that is still invalid stays, with the newest reason. Two
  concurrent replays of a letter store its event once.
"""

import asyncio
import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

import msgspec
from msgspec import Meta

from app.errors import Conflict, InvalidInput, NotFound, Undecodable
from app.events.ingest import Ingestor
from app.events.ports import DeadLetter, DeadLetters
from app.events.validation import MAX_EVENTS, decode_json, from_queue
from app.features.events import TipEvent
from app.telemetry import logger

AT_ONCE = 100
MOST = 1_000
MAX_REASON = 1_000
REFUSALS = (Undecodable, InvalidInput, Conflict)
log = logger("events.queue_door")


class ReplayedLetter(msgspec.Struct):
    """The result of replaying a dead letter: how many of its events are new, and how many had been stored before."""

    accepted: int
    duplicates: int
    revived: Annotated[bool, Meta(description="The event was stored already; a worker will consume it again.")]


class ReplayFailure(msgspec.Struct):
    """A dead letter that could not be replayed, and why."""

    id: int
    reason: str


class ReplayedLetters(msgspec.Struct, kw_only=True):
    """The result of replaying dead letters. If `next_after` is not null, there are more letters above that id."""

    replayed: Annotated[int, Meta(description="Letters that are deleted, because their events are stored.")]
    accepted: int
    duplicates: int
    revived: Annotated[int, Meta(description="Events that were stored already; a worker will consume them again.")]
    failed: int
    failures: list[ReplayFailure]
    next_after: int | None


class QueueDoor(msgspec.Struct, eq=False, dict=True):
    ingestor: Ingestor
    letters: DeadLetters

    async def take_in(self, payload: object) -> list[int]:
        """Store a list of events, and return the sequence numbers of the new ones. Rejected items, and a payload
        that is not a list, become dead letters. After `StoreUnavailable`, retry the whole payload."""
        if not isinstance(payload, list):
            await self.bury([(payload, "expected a list of events")])
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
        if refused:
            await self.bury(refused)
        return seqs

    async def bury(self, refused: Sequence[tuple[object, str]]) -> None:
        """Store rejected payloads, each with the reason, as dead letters, all or none. Raises `StoreUnavailable`."""
        payloads = [(_json_text(payload), reason) for payload, reason in refused]
        letters = await self.letters.bury_payloads(payloads, self.ingestor.clock.now_ms())
        self.ingestor.metrics.events.labels("queue", "buried").inc(len(letters))
        for letter, (_, reason) in zip(letters, refused, strict=True):
            log.warning("event_buried", dead_letter=letter, error=reason)

    async def replay(self, letter: DeadLetter) -> ReplayedLetter:
        """Replay one dead letter, and delete it if that succeeds. If it has a `seq`, its event is stored already, and
        becomes unconsumed again. Otherwise its payload is ingested as if it had just arrived; the event id makes this
        idempotent. Raises one of `REFUSALS` if the payload is still invalid, and `NotFound` if the letter is gone."""
        if letter.seq is not None:
            if not await self.letters.revive(letter.id):
                raise NotFound(f"dead letter {letter.id} is gone: it was replayed or discarded meanwhile")
            return ReplayedLetter(0, 0, True)
        try:
            receipt = await self.ingestor.ingest(decode_json(letter.payload.encode()))
        except REFUSALS as error:
            await self.letters.refused(letter.id, reason_of(error), self.ingestor.clock.now_ms())
            raise
        # 1. The event is stored; 2. the letter is deleted. After a crash in between, another replay finds a duplicate.
        await self.letters.discard(letter.id)
        return ReplayedLetter(receipt.accepted, receipt.duplicates, False)

    async def replay_all(self, after: int) -> ReplayedLetters:
        """Replay up to `MOST` dead letters with ids above `after`, several at once, so that they share commits. After
        `StoreUnavailable`, finished replays are not undone."""
        tally = ReplayedLetters(replayed=0, accepted=0, duplicates=0, revived=0, failed=0, failures=[], next_after=None)
        for _ in range(0, MOST, AT_ONCE):
            page = await self.letters.list(after, AT_ONCE)
            outcomes = await asyncio.gather(*(self.replay(letter) for letter in page), return_exceptions=True)
            for letter, outcome in zip(page, outcomes, strict=True):
                if isinstance(outcome, REFUSALS):
                    tally.failed += 1
                    tally.failures.append(ReplayFailure(letter.id, reason_of(outcome)))
                elif isinstance(outcome, ReplayedLetter):
                    tally.replayed += 1
                    tally.accepted += outcome.accepted
                    tally.duplicates += outcome.duplicates
                    tally.revived += outcome.revived
                elif not isinstance(outcome, NotFound):
                    raise outcome
            if len(page) < AT_ONCE:
                return tally
            after = page[-1].id
        tally.next_after = after if await self.letters.list(after, 1) else None
        return tally

    async def _store(self, events: Sequence[TipEvent], refused: list[tuple[object, str]]) -> list[int]:
        with suppress(InvalidInput, Conflict):
            return list((await self.ingestor.ingest(events, count_rejection=False)).seqs)
        # At least one event is rejected: ingest each alone, in a shared commit.
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


def _json_text(payload: object) -> str:
    for form in (_in_json, repr):  # `repr` can be nested twice as deeply
        with suppress(RecursionError):
            return msgspec.json.encode(form(payload)).decode()
    return '"nested too deeply to be kept"'


def _in_json(value: object) -> object:
    """Replace each value that JSON lacks by an object such as `{"bytes": "ada"}`, which no field of an event accepts.
    If text replaced it, a replay could store an event that was never sent. For instance, bytes as the user id would
    become the user `YWRh` (base64), and a msgpack timestamp, which has no UTC offset, would become a time in UTC."""
    if isinstance(value, dict):
        return {_text(key): _in_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_in_json(item) for item in value]
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return {type(value).__name__: _text(value)}


def _text(value: object) -> str:
    value = value.data if isinstance(value, msgspec.msgpack.Ext) else value
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def reason_of(error: Undecodable | InvalidInput | Conflict) -> str:
    """The reasons why a payload was rejected, each with its place, as text of at most `MAX_REASON` characters."""
    places = (issue.detail if issue.path == "$" else f"{issue.path}: {issue.detail}" for issue in error.issues)
    return ("; ".join(places) or str(error))[:MAX_REASON]
