"""The queue's door: every item of a payload is stored or buried, whatever it is, and however often it is given."""

import math
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from app.errors import StoreUnavailable
from app.events.ports import DeadLetter
from app.events.queue_door import QueueDoor
from app.events.validation import MAX_EVENTS
from app.features.clock import DAY_MS
from app.stores.sql.dead_letters import SqlDeadLetters
from app.stores.sql.registries import announce
from app.stores.sql.users import SqlUsers
from app.stores.sqlite.database import SqliteDatabase
from tests.support.clock import NOW_MS
from tests.support.events import feedback, payload, served
from tests.support.registry import REGISTRY
from tests.unit.events.recorders import IngestFixture


class Door:
    """A queue door over a real log and real letters."""

    def __init__(self, database: SqliteDatabase) -> None:
        self.fixture = IngestFixture(database)
        self.letters = SqlDeadLetters(database)
        self.door = QueueDoor(self.fixture.ingestor, self.letters)

    async def take_in(self, *items: object) -> list[int]:
        """A list, as it comes off the queue."""
        return await self.door.take_in(msgspec.msgpack.decode(msgspec.msgpack.encode(list(items))))

    async def buried(self) -> list[DeadLetter]:
        return await self.letters.list(0, 100)


@pytest.fixture
async def door(database: SqliteDatabase) -> Door:
    await announce(database, REGISTRY, NOW_MS)
    return Door(database)


def event(event_id: str, **changes: Any) -> dict[str, Any]:
    return payload(served("ann", event_id=event_id), **changes)


async def test_all_are_stored_when_all_are_sound(door: Door) -> None:
    assert await door.take_in(event("a"), event("b"), payload(feedback("bob", event_id="c"))) == [1, 2, 3]
    assert await door.fixture.stored() == ["a", "b", "c"]
    assert await door.buried() == []


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (event("x", subject="signals.tip.unknown"), "[1].subject: unknown subject 'signals.tip.unknown'"),
        (event("x", user_id=...), "[1].user_id: missing"),
        (event("x", colour="red"), "[1].colour: unknown field"),
        (event("x", user_id="a/b"), "[1].user_id: must not contain /"),
        (event("x", occurred_at="2026-04-25T12:00:00"), "[1].occurred_at: "),
        (event("x", occurred_at="2027-01-01T00:00:00Z"), "occurred_at: more than five minutes ahead"),
        (payload(served("ann", NOW_MS - 181 * DAY_MS, event_id="x")), "occurred_at: "),
        (event("a", tip_id="another"), "event_id: 'a' is known with other content"),
        ("text", "[1]: "),
        (None, "[1]: "),
        (b"bytes", "[1]: "),
        ({b"bytes": 1, 2: [None, float("nan")]}, "[1]"),
        (msgspec.msgpack.Ext(5, b"x"), "[1]: "),
    ],
)
async def test_rest_counts_when_one_item_is_bad(door: Door, item: object, reason: str) -> None:
    await door.take_in(event("a"), item, event("b"))
    assert await door.fixture.stored() == ["a", "b"]
    (letter,) = await door.buried()
    assert letter.error.startswith(reason)
    assert (letter.source, letter.seq) == ("queue", None)
    msgspec.json.decode(letter.payload)


@pytest.mark.parametrize("depth", [10, 300, 480, 600, 900])
@pytest.mark.parametrize("made", [lambda inner: [inner], lambda inner: {"a": inner}])
async def test_rest_counts_when_one_item_is_nested(door: Door, depth: int, made: Callable[[object], object]) -> None:
    deep: object = None
    for _ in range(depth):
        deep = made(deep)
    nested = {**payload(feedback("ann", event_id="x"), dwell_ms=7200.0), "more": deep}
    await door.take_in(event("a"), nested, event("b"))
    assert await door.fixture.stored() == ["a", "b"]
    (letter,) = await door.buried()
    assert "user_id" in letter.payload
    assert (await SqlUsers(door.fixture.database).erase("ann", NOW_MS)).dead_letters == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"occurred_at": datetime.fromtimestamp(NOW_MS / 1000, UTC)},
        {"dwell_ms": math.nan},
        {"dwell_ms": -math.inf},
        {"user_id": b"ann"},
        {"tip_id": b"\xff"},
        {"decision_id": msgspec.msgpack.Ext(5, b"x")},
    ],
)
async def test_replay_refuses_what_only_msgpack_can_say(door: Door, changes: dict[str, object]) -> None:
    await door.take_in(payload(feedback("ann", event_id="x"), **changes))
    assert await door.letters.count() == 1
    tally = await door.door.replay_all(0)
    assert (tally.replayed, tally.failed) == (0, 1)
    assert await door.fixture.stored() == []
    assert [letter.id for letter in await door.buried()] == [tally.failures[0].id]


@pytest.mark.parametrize(
    "item", [{"user_id": b"ann"}, {b"user_id": b"ann"}, b"ann", [b"ann"], msgspec.msgpack.Ext(5, b"ann")]
)
async def test_letter_in_bytes_is_erased_with_its_user(door: Door, database: SqliteDatabase, item: object) -> None:
    await door.take_in(item)
    assert (await SqlUsers(database).erase("bob", NOW_MS)).dead_letters == 0
    assert (await SqlUsers(database).erase("ann", NOW_MS)).dead_letters == 1
    assert await door.buried() == []


@pytest.mark.parametrize("whole", [None, "text", {"events": []}, 7])
async def test_whole_is_buried_when_it_is_no_list(door: Door, whole: object) -> None:
    assert await door.door.take_in(whole) == []
    (letter,) = await door.buried()
    assert letter.error == "expected a list of events"
    assert msgspec.json.decode(letter.payload) == whole


async def test_duplicate_is_no_fault_when_it_comes_again(door: Door) -> None:
    assert await door.take_in(event("a")) == [1]
    assert await door.take_in(event("a"), event("b")) == [2]
    assert await door.buried() == []


async def test_bad_item_is_buried_once_when_redelivered(door: Door) -> None:
    door.fixture.log.failure = StoreUnavailable("locked")
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            await door.take_in(event("a"), "bad")
    assert await door.buried() == []
    door.fixture.log.failure = None
    await door.take_in(event("a"), "bad")
    assert await door.fixture.stored() == ["a"]
    assert len(await door.buried()) == 1


async def test_items_are_buried_once_when_burying_one_fails(door: Door, database: SqliteDatabase) -> None:
    fail = (
        "CREATE TRIGGER fail BEFORE INSERT ON dead_letters WHEN NEW.payload = '2' BEGIN SELECT RAISE(ABORT, 'no'); END"
    )
    await database.execute(fail, ())
    with pytest.raises(sqlite3.IntegrityError):
        await door.take_in(1, 2, 3)
    assert await door.buried() == []
    await database.execute("DROP TRIGGER fail", ())
    await door.take_in(1, 2, 3)
    assert [letter.payload for letter in await door.buried()] == ["1", "2", "3"]


async def test_event_is_counted_once_when_another_is_rejected(door: Door) -> None:
    old = payload(served("ann", NOW_MS - 181 * DAY_MS, event_id="old"))
    await door.take_in(event("a"), event("b"), old)
    await door.take_in(event("c"), event("a", tip_id="another"), event("d"))
    counted = {outcome: door.fixture.counted(outcome) for outcome in ("accepted", "refused", "conflict", "duplicate")}
    assert counted == {"accepted": 4, "refused": 1, "conflict": 1, "duplicate": 0}


async def test_payload_is_stored_in_pieces_when_it_is_very_long(door: Door) -> None:
    seqs = await door.take_in(*(event(f"e{number}") for number in range(2 * MAX_EVENTS + 1)))
    assert len(seqs) == 2 * MAX_EVENTS + 1
    assert door.fixture.log.commits == [[MAX_EVENTS], [MAX_EVENTS], [1]]


async def test_something_is_kept_when_a_payload_is_too_deep_to_be_written(door: Door) -> None:
    deep: list[object] = []
    for _ in range(5_000):
        deep = [deep]
    await door.door.bury([(deep, "too deep")])
    (letter,) = await door.buried()
    assert letter.payload == '"nested too deeply to be kept"'
