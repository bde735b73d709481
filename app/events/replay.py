"""Replaying dead letters: what failed is given another try.

A letter whose event is stored goes back to the workers; any other's payload is taken in as if it had just come, its
event id making that idempotent. Invariants: a letter goes only when its event is stored, or was before; one that is
still no event stays, with the newest reason. Two that replay the same letter at once store its event once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from app.errors import Conflict, InvalidInput, NotFound, Undecodable
from app.events.admission import decode_json
from app.events.ingest import Ingestor, Receipt
from app.events.ports import DeadLetter, DeadLetters
from app.features.clock import Clock

AT_ONCE = 100
MOST = 1_000
MAX_REASON = 1_000
REFUSALS = (Undecodable, InvalidInput, Conflict)


class ReplayResult(NamedTuple):
    """What replaying one letter did. `revived`: its event was stored already and is with the workers again."""

    accepted: int
    duplicates: int
    revived: bool


@dataclass(slots=True)
class ReplaySummary:
    """What replaying many letters did: letters that went; events taken in, known before, with the workers again.

    `failures`: letter to reason. `next_after`: where to go on, None at the end.
    """

    replayed: int = 0
    accepted: int = 0
    duplicates: int = 0
    revived: int = 0
    failures: dict[int, str] = field(default_factory=dict)
    next_after: int | None = None


class Replayer:
    """Gives letters another try."""

    def __init__(self, ingestor: Ingestor, letters: DeadLetters, clock: Clock) -> None:
        self._ingestor = ingestor
        self._letters = letters
        self._clock = clock

    async def replay(self, letter: DeadLetter) -> ReplayResult:
        """One letter.

        Raises:
            Undecodable, InvalidInput, Conflict: it is still no event that can be stored; the letter stays.
            NotFound: somebody else replayed or discarded it meanwhile.
            StoreUnavailable: try again.
        """
        if letter.seq is not None:
            if not await self._letters.revive(letter.id):
                raise NotFound(f"dead letter {letter.id} is gone: somebody else replayed or discarded it")
            return ReplayResult(0, 0, True)
        try:
            receipt = await self._take_in(letter)
        except REFUSALS as error:
            await self._letters.refused({letter.id: reason_of(error)}, self._clock.now_ms())
            raise
        # 1. The event is stored; 2. the letter goes. Dying in between leaves a letter that is a duplicate next time.
        await self._letters.discard(letter.id)
        return ReplayResult(receipt.accepted, receipt.duplicates, False)

    async def replay_all(self, after: int) -> ReplaySummary:
        """Up to `MOST` letters above an id, some at once, so that they share commits.

        Letters buried meanwhile wait for another time. Raises `StoreUnavailable`; what was replayed stays so.
        """
        tally = ReplaySummary()
        newest = await self._letters.newest_id()
        for _ in range(0, MOST, AT_ONCE):
            page = [letter for letter in await self._letters.list(after, AT_ONCE) if letter.id <= newest]
            await self._replay_page(page, tally)
            if len(page) < AT_ONCE:
                return tally
            after = page[-1].id
        tally.next_after = after
        return tally

    async def _replay_page(self, page: Sequence[DeadLetter], tally: ReplaySummary) -> None:
        revived = [letter.id for letter in page if letter.seq is not None]
        others = [letter for letter in page if letter.seq is None]
        failures: dict[int, str] = {}
        stored: list[int] = []
        outcomes = await asyncio.gather(*(self._take_in(letter) for letter in others), return_exceptions=True)
        for letter, outcome in zip(others, outcomes, strict=True):
            if isinstance(outcome, REFUSALS):
                failures[letter.id] = reason_of(outcome)
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                stored.append(letter.id)
                tally.accepted += outcome.accepted
                tally.duplicates += outcome.duplicates
        if revived:
            count = await self._letters.revive(*revived)
            tally.revived += count
            tally.replayed += count
        if stored:
            tally.replayed += await self._letters.discard(*stored)
        if failures:
            await self._letters.refused(failures, self._clock.now_ms())
        tally.failures.update(failures)

    async def _take_in(self, letter: DeadLetter) -> Receipt:
        return await self._ingestor.ingest(decode_json(letter.payload.encode()))


def reason_of(error: Undecodable | InvalidInput | Conflict) -> str:
    """Why a payload is no event that can be stored: each place and what is wrong with it."""
    places = (issue.detail if issue.path == "$" else f"{issue.path}: {issue.detail}" for issue in error.issues)
    reason = "; ".join(places) or str(error)
    return reason[:MAX_REASON]
