"""Owed invalidations by hash slot: the slots of all rows, and rows without those of some slots."""

import pytest

from app.features.ids import hash_slot
from app.profiles.ports import EVERY_SLOT
from app.stores.sql.cache_state import SqlOwedInvalidations
from app.stores.sql.database import Database

pytestmark = pytest.mark.both_engines
USERS = ("ann", "bob", "cid")


async def test_state_has_the_slot_of_each_owed_user(database: Database) -> None:
    owed = SqlOwedInvalidations(database)
    assert (await database.state.query()).owed == frozenset()
    await owed.owe(USERS, 1)
    await owed.owe(["ann"], 2)
    assert (await database.state.query()).owed == set(map(hash_slot, USERS))
    await database.execute("INSERT INTO owed_invalidations (user_id, owed_at_ms) VALUES ('of an older release', 3)")
    assert EVERY_SLOT in (await database.state.query()).owed


async def test_pending_rows_are_without_the_given_slots(database: Database) -> None:
    owed = SqlOwedInvalidations(database)
    await owed.owe(USERS, 1)
    rows, _ = await owed.pending(10, {hash_slot("bob"), 1})
    assert [(row.user_id, row.slot) for row in rows] == [("ann", hash_slot("ann")), ("cid", hash_slot("cid"))]
    assert [row.user_id for row in (await owed.pending(1))[0]] == ["ann"]
