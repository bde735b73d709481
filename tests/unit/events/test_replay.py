"""Replaying dead letters: a letter goes only when its event is stored, and its event is stored once."""

from __future__ import annotations

import asyncio
import json

import pytest

import app.events.queue_door as module
from app.errors import Conflict, InvalidInput, NotFound, StoreUnavailable, Undecodable
from app.events.ingest import Ingestor
from app.events.ports import DeadLetter
from app.events.queue_door import QueueDoor, ReplayedLetter
from app.stores.sql.database import Database
from app.stores.sql.dead_letters import SqlDeadLetters
from app.telemetry import Metrics
from tests.support.clock import NOW_MS, FakeClock
from tests.support.database import log_of
from tests.support.events import payload, served
from tests.unit.events.recorders import Journal, RecordingInvalidator

pytestmark = pytest.mark.both_engines


class ReplayFixture:
    """Where letters are replayed, over a real log."""

    def __init__(self, database: Database) -> None:
        self.clock = FakeClock()
        self.letters = SqlDeadLetters(database)
        self.log = log_of(database)
        self.ingestor = Ingestor(
            log=self.log,
            invalidator=RecordingInvalidator(Journal()),
            publish=None,
            retention_days=180,
            clock=self.clock,
            metrics=Metrics(),
            door="http",
        )
        self.door = QueueDoor(self.ingestor, self.letters)

    async def bury(self, content: object) -> DeadLetter:
        """A letter as the queue's door leaves it."""
        text = content if isinstance(content, str) else json.dumps(content)
        (letter_id,) = await self.letters.bury_payloads([(text, "no event")], NOW_MS)
        letter = await self.letters.get(letter_id)
        assert letter is not None
        return letter

    async def kept(self) -> list[int]:
        return [letter.id for letter in await self.letters.list(0, 10_000)]

    async def stored(self) -> list[str]:
        return [event.event.user_id for event in await self.log.unconsumed(NOW_MS * 2, 10_000)]


@pytest.fixture
async def fixture(database: Database) -> ReplayFixture:
    return ReplayFixture(database)


async def failed_for_good(fixture: ReplayFixture, user: str) -> DeadLetter:
    await fixture.ingestor.ingest([served(user)])
    event = next(item for item in await fixture.log.unconsumed(NOW_MS * 2, 10_000) if item.event.user_id == user)
    assert await fixture.letters.failed(event.seq, "it failed", "Traceback", NOW_MS, 1)
    return (await fixture.letters.list(0, 10_000))[-1]


async def test_letter_is_stored_once_when_replayed_concurrently(fixture: ReplayFixture) -> None:
    letter = await fixture.bury(payload(served("ann")))
    outcomes = await asyncio.gather(*(fixture.door.replay(letter) for _ in range(8)))
    outcomes.sort(key=lambda outcome: outcome.accepted)
    assert outcomes == [ReplayedLetter(0, 1, False)] * 7 + [ReplayedLetter(1, 0, False)]
    assert await fixture.stored() == ["ann"]
    assert await fixture.kept() == []


async def test_event_is_revived_once_when_replayed_concurrently(fixture: ReplayFixture) -> None:
    letter = await failed_for_good(fixture, "ann")
    outcomes = await asyncio.gather(*(fixture.door.replay(letter) for _ in range(4)), return_exceptions=True)
    assert [outcome for outcome in outcomes if isinstance(outcome, ReplayedLetter)] == [ReplayedLetter(0, 0, True)]
    assert sum(isinstance(outcome, NotFound) for outcome in outcomes) == 3
    assert await fixture.stored() == ["ann"]


@pytest.mark.parametrize(
    ("content", "error", "reason"),
    [
        ("nonsense", Undecodable, "not valid JSON: "),
        ({**payload(served("ann")), "user_id": ""}, InvalidInput, "user_id: "),
        ({**payload(served("ann")), "occurred_at": "2001-01-01T00:00:00Z"}, InvalidInput, "occurred_at: "),
        ("<script>alert(1)</script>", Undecodable, "not valid JSON: "),
    ],
)
async def test_letter_keeps_the_newest_reason(
    fixture: ReplayFixture, content: object, error: type[Exception], reason: str
) -> None:
    letter = await fixture.bury(content)
    fixture.clock.advance(1_000)
    with pytest.raises(error):
        await fixture.door.replay(letter)
    kept = await fixture.letters.get(letter.id)
    assert kept is not None
    assert (kept.attempts, kept.created_at_ms, kept.last_failed_at_ms) == (2, NOW_MS, NOW_MS + 1_000)
    assert kept.payload == letter.payload
    assert kept.error.startswith(reason)
    assert await fixture.stored() == []


async def test_failing_letters_stay_with_their_reason(fixture: ReplayFixture) -> None:
    known = served("known")
    await fixture.ingestor.ingest([known])
    revived = await failed_for_good(fixture, "revived")
    fine = await fixture.bury(payload(served("fine")))
    duplicate = await fixture.bury(payload(known))
    bad = await fixture.bury({"any": "thing"})
    clash = await fixture.bury({**payload(known), "tip_id": "another"})
    tally = await fixture.door.replay_all(0)
    assert (tally.replayed, tally.accepted, tally.duplicates, tally.revived) == (3, 1, 1, 1)
    assert (tally.failed, [item.id for item in tally.failures]) == (2, [bad.id, clash.id])
    assert "content" in tally.failures[1].reason
    assert tally.next_after is None
    assert await fixture.kept() == [bad.id, clash.id]
    assert sorted(await fixture.stored()) == ["fine", "known", "revived"]
    assert [letter.attempts for letter in await fixture.letters.list(0, 10)] == [2, 2]
    assert {revived.id, fine.id, duplicate.id}.isdisjoint(await fixture.kept())


async def test_many_letters_are_replayed_in_pages(fixture: ReplayFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 2)
    monkeypatch.setattr(module, "MOST", 4)
    letters = [await fixture.bury(payload(served(f"user-{number}")) if number % 2 else number) for number in range(9)]
    first = await fixture.door.replay_all(0)
    assert (first.replayed, len(first.failures), first.next_after) == (2, 2, letters[3].id)
    assert first.next_after is not None
    second = await fixture.door.replay_all(first.next_after)
    assert second.next_after == letters[7].id
    last = await fixture.door.replay_all(letters[7].id)
    assert (last.replayed, [item.id for item in last.failures], last.next_after) == (0, [letters[8].id], None)
    assert await fixture.kept() == [letter.id for letter in letters[::2]]
    await fixture.letters.discard(letters[8].id)
    assert (await fixture.door.replay_all(0)).next_after is None  # four letters are left


async def test_letters_stay_when_the_database_does_not_answer(
    fixture: ReplayFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    letters = [await fixture.bury(payload(served(user))) for user in ("ann", "bob")]

    async def locked(*_: object) -> None:
        raise StoreUnavailable("locked")

    with monkeypatch.context() as patch:
        patch.setattr(fixture.ingestor, "ingest", locked)
        with pytest.raises(StoreUnavailable):
            await fixture.door.replay_all(0)
        with pytest.raises(StoreUnavailable):
            await fixture.door.replay(letters[0])
    assert [letter.attempts for letter in await fixture.letters.list(0, 10)] == [1, 1]
    assert (await fixture.door.replay_all(0)).replayed == 2


async def test_conflict_is_reported(fixture: ReplayFixture) -> None:
    event = served("ann")
    await fixture.ingestor.ingest([event])
    letter = await fixture.bury({**payload(event), "tip_id": "another"})
    with pytest.raises(Conflict):
        await fixture.door.replay(letter)
    assert await fixture.kept() == [letter.id]
