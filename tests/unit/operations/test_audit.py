"""The audit trail: the intent is stored before the action, and the outcome after it."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import CacheUnavailable, Conflict, NotFound, StoreUnavailable
from app.features.ids import user_hash
from app.operations.audit import MAX_OUTCOME, AuditEntry, audited
from app.stores.sql.access import SqlAuditTrail
from app.stores.sql.database import Database
from tests.support.audit import NEWEST, newest_entries
from tests.support.clock import NOW_MS

pytestmark = pytest.mark.both_engines


class Breaking(SqlAuditTrail):
    broken = False

    async def begin(self, at_ms: int, actor: str, action: str, subject: str, outcome: str = "begun") -> int:
        self._check()
        return await super().begin(at_ms, actor, action, subject, outcome)

    async def settle(self, entry_id: int, outcome: str) -> None:
        self._check()
        await super().settle(entry_id, outcome)

    def _check(self) -> None:
        if self.broken:
            raise StoreUnavailable("the disk is full")


@pytest.fixture
def trail(database: Database) -> Breaking:
    return Breaking(database)


async def outcome(trail: SqlAuditTrail) -> str:
    (entry,) = await newest_entries(trail, 10)
    assert entry == AuditEntry(1, NOW_MS, "ann", "discard", "dead-letter:7", entry.outcome)
    return entry.outcome


def discarding(trail: SqlAuditTrail):  # type: ignore[no-untyped-def]  # a context manager
    return audited(trail, NOW_MS, "ann", "discard", "dead-letter:7")


async def test_outcome_replaces_the_intent_after_the_action(trail: Breaking) -> None:
    async with discarding(trail):
        assert await outcome(trail) == "begun"
    assert await outcome(trail) == "done"


async def test_outcome_is_that_of_the_action_shortened(trail: Breaking) -> None:
    async with discarding(trail) as act:
        act.outcome = "x" * 10_000
    assert await outcome(trail) == "x" * MAX_OUTCOME


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Conflict("it has ended"), "refused: it has ended"),
        (NotFound("no such letter"), "refused: no such letter"),
        (CacheUnavailable("no answer"), "failed: no answer"),
        (StoreUnavailable("locked"), "failed: locked"),
        (ZeroDivisionError("of user ann"), "failed: unexpected, ZeroDivisionError; see the log"),
    ],
)
async def test_failure_is_stored_and_raised_when_the_action_fails(
    trail: Breaking, error: Exception, expected: str
) -> None:
    with pytest.raises(type(error)):
        async with discarding(trail):
            raise error
    assert await outcome(trail) == expected


async def test_action_does_not_begin_when_its_intent_is_not_stored(trail: Breaking) -> None:
    trail.broken = True
    with pytest.raises(StoreUnavailable):
        async with discarding(trail):
            pytest.fail("it began")
    assert await newest_entries(trail, 10) == []


@pytest.mark.parametrize("error", [None, Conflict("it has ended")])
async def test_entry_stays_begun_when_the_outcome_is_not_stored(trail: Breaking, error: Exception | None) -> None:
    async def act() -> None:
        async with discarding(trail):
            trail.broken = True
            if error is not None:
                raise error

    (raised,) = await asyncio.gather(act(), return_exceptions=True)
    assert raised is error
    assert await outcome(trail) == "begun"


async def test_entry_stays_begun_when_the_action_is_cancelled(trail: Breaking) -> None:
    reached = asyncio.Event()

    async def act() -> None:
        async with discarding(trail):
            reached.set()
            await asyncio.Event().wait()

    acting = asyncio.create_task(act())
    await reached.wait()
    acting.cancel()
    await asyncio.gather(acting, return_exceptions=True)
    assert await outcome(trail) == "begun"


async def test_settled_entry_does_not_change(trail: Breaking) -> None:
    entry = await trail.begin(NOW_MS, "ann", "discard", "dead-letter:7")
    await trail.settle(entry, "done")
    await trail.settle(entry, "refused: no")
    assert await outcome(trail) == "done"


def test_state_is_the_first_word_of_an_outcome() -> None:
    states = {"begun": "begun", "done": "done", "done: a reason": "done", "8a9c": "done", "beguns": "done"}
    states |= {"refused: no": "refused", "failed: no": "failed"}
    assert {text: AuditEntry(1, NOW_MS, "ann", "replay", "", text).state for text in states} == states


@given(user=st.text(min_size=9))
def test_hash_of_a_user_does_not_hold_the_id(user: str) -> None:
    assert user not in user_hash(user.encode("utf-8", "replace").decode()).removeprefix("user-sha256:")


async def test_entries_are_filtered_and_paged_backwards(trail: Breaking) -> None:
    for number in range(12):
        await trail.begin(number, "ann" if number % 2 else "bob", "erase" if number % 3 else "replay", f"s{number % 4}")

    async def found(before: int = NEWEST, limit: int = 100, **wanted: str) -> list[int]:
        return [entry.at_ms for entry in await trail.page(before, limit, **wanted)]

    assert await found() == list(range(11, -1, -1))
    assert await found(actor="ann") == [11, 9, 7, 5, 3, 1]
    assert await found(action="replay") == [9, 6, 3, 0]
    assert await found(subject="s1") == [9, 5, 1]
    assert await found(actor="ann", action="replay", subject="s1") == [9]
    assert await found(actor="nobody") == []
    assert await found(limit=2) == [11, 10]
    assert await found(before=11, limit=2) == [9, 8]
