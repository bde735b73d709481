"""Dead letters: failures are counted, and letters are listed, revived and discarded."""

import msgspec
import pytest

from app.events.ports import DeadLetter
from app.features.events import TipEvent
from app.stores.sql.database import Database
from app.stores.sql.dead_letters import SqlDeadLetters
from app.stores.sql.event_log import SqlEventLog
from tests.support.clock import NOW_MS
from tests.support.events import admitted, feedback, served

pytestmark = pytest.mark.both_engines


@pytest.fixture
def letters(database: Database) -> SqlDeadLetters:
    return SqlDeadLetters(database)


async def fail(letters: SqlDeadLetters, seq: int, times: int, limit: int = 3) -> list[bool]:
    """Fail an event `times` times, a millisecond apart."""
    return [
        await letters.failed(seq, f"error {number}", f"trace {number}", NOW_MS + number, limit)
        for number in range(1, times + 1)
    ]


async def test_event_becomes_a_dead_letter_at_the_limit(event_log: SqlEventLog, letters: SqlDeadLetters) -> None:
    event = feedback("ann", dwell_ms=5, offset_min=120, decision_id="d")
    await event_log.append([[admitted(served()), admitted(event)]])

    assert await fail(letters, seq=2, times=2) == [False, False]
    assert [(item.seq, item.attempts) for item in await event_log.logged([1, 2])] == [(1, 0), (2, 2)]
    assert await letters.list(0, 10) == []

    assert await letters.failed(2, "error 3", "trace 3", NOW_MS + 3, 3)
    (letter,) = await letters.list(0, 10)
    assert letter == DeadLetter(1, "consumption", letter.payload, "error 3", "trace 3", 3, 2, NOW_MS + 3, NOW_MS + 3)
    assert msgspec.json.decode(letter.payload, type=TipEvent) == event
    assert [item.seq for item in await event_log.unconsumed(NOW_MS + 1, 10)] == [1]


async def test_failure_is_ignored_when_the_event_is_dead_or_deleted(
    event_log: SqlEventLog, letters: SqlDeadLetters
) -> None:
    await event_log.append([[admitted(served())]])
    await fail(letters, seq=1, times=3)
    (letter,) = await letters.list(0, 10)
    # Another worker had taken the same event and fails a moment later.
    assert await fail(letters, seq=1, times=2) == [False, False]
    assert await letters.list(0, 10) == [letter]
    assert await fail(letters, seq=99, times=5) == [False] * 5
    assert len(await letters.list(0, 10)) == 1


async def test_revived_event_is_unconsumed_and_counts_from_zero(
    event_log: SqlEventLog, letters: SqlDeadLetters
) -> None:
    await event_log.append([[admitted(served())]])
    await fail(letters, seq=1, times=3)
    await letters.revive(1)
    assert await letters.list(0, 10) == []
    assert [(item.seq, item.attempts) for item in await event_log.unconsumed(NOW_MS + 1, 10)] == [(1, 0)]
    assert await fail(letters, seq=1, times=3) == [False, False, True]
    (letter,) = await letters.list(0, 10)
    assert (letter.seq, letter.attempts) == (1, 3)
    assert letter.id == 2  # ids are not reused, so an old link never opens another letter


async def test_event_stays_consumed_when_its_letter_is_discarded(
    event_log: SqlEventLog, letters: SqlDeadLetters
) -> None:
    await event_log.append([[admitted(served())]])
    await fail(letters, seq=1, times=3)
    assert await letters.discard(1)
    assert not await letters.discard(1)
    assert await letters.get(1) is None
    assert await event_log.unconsumed(NOW_MS + 1, 10) == []


async def test_revived_letter_is_deleted_when_its_event_was_pruned(
    event_log: SqlEventLog, letters: SqlDeadLetters
) -> None:
    await event_log.append([[admitted(served())]])
    await fail(letters, seq=1, times=3)
    await event_log.prune(NOW_MS + 1, 10)
    assert await letters.revive(1)
    assert not await letters.revive(7), "letter 7 does not exist"
    assert await letters.list(0, 10) == []
    assert await event_log.unconsumed(NOW_MS + 1, 10) == []


async def test_payload_that_is_no_event_is_stored_unchanged(letters: SqlDeadLetters) -> None:
    ids = await letters.bury_payloads([(text, "why") for text in ('{"a": 1}', "\x01", "")], NOW_MS)
    assert ids == [1, 2, 3]
    assert [(letter.payload, letter.source, letter.seq) for letter in await letters.list(0, 10)] == [
        ('{"a": 1}', "queue", None),
        ("\x01", "queue", None),
        ("", "queue", None),
    ]
    assert [letter.id for letter in await letters.list(after=1, limit=1)] == [2]
    await letters.discard(1)
    assert await letters.get(1) is None
    assert (await letters.get(2)) == DeadLetter(2, "queue", "\x01", "why", "", 1, None, NOW_MS, NOW_MS)
