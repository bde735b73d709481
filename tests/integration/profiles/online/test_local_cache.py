"""The near cache: what is answered from this process's own memory, and when it must not be."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from app.profiles.online.cache_protocol import LAST_EXPIRY_MS
from app.profiles.online.local_cache import MASKS_PER_USER, PROOFS_PER_TICK, KeptProfile, LocalCache
from app.stores.sql.cache_state import ADVANCE_LOCAL_CACHE_EPOCH, SELECT_LOCAL_CACHE_EPOCH
from app.stores.sql.users import DELETE_EVENTS
from app.stores.sqlite.data_version import SELECT_TAIL, TAIL_CAP, DataVersion
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.events import feedback, served
from tests.support.registry import REGISTRY
from tests.support.servers import ask
from tests.support.service import NEAR_AFTER, NEAR_USERS, PausableService, let_pass
from tests.support.service_group import Kind, ServiceGroup

USER = "ann"
FULL = REGISTRY.full_mask
WIDTH = len(REGISTRY)


async def kept(service: PausableService, *user_ids: str) -> None:
    """Plain reads until the users are kept near."""
    for user_id in user_ids:
        for _ in range(NEAR_AFTER):
            await service.plain(user_id)
            await service.drain()
        assert await is_near(service, user_id)


async def seen(service: PausableService, user_id: str) -> None:
    """Plain reads until the next one keeps the user near."""
    for _ in range(NEAR_AFTER - 1):
        await service.plain(user_id)
        await service.drain()


async def is_near(service: PausableService, user_id: str) -> bool:
    """Whether a plain read, which is made, asks no server."""
    await service.drain()
    before = service.cache.commands.copy()
    await service.plain(user_id)
    await service.drain()
    return service.cache.commands == before


async def test_repeated_reads_need_no_server(service: PausableService) -> None:
    await service.send(served(USER), feedback(USER, dwell_ms=5))
    await kept(service, USER)
    service.cache.commands.clear()
    hits = service.counted("near_hits")
    for _ in range(5):
        assert await service.plain(USER) == await service.recomputed(USER)
    assert service.cache.commands == {}
    assert service.counted("near_hits") == hits + 5 * WIDTH
    assert service.counted("cache_hits") >= service.counted("near_hits")


async def test_user_read_once_is_not_kept(service: PausableService) -> None:
    await service.plain(USER)
    await service.drain()
    await service.plain(USER)
    assert not await is_near(service, USER), "this read is the second hit, and keeps"
    assert await is_near(service, USER)


async def test_detailed_read_asks_the_server(service: PausableService) -> None:
    await kept(service, USER)
    service.cache.commands.clear()
    await service.features(USER)
    assert service.cache.commands == {"read": 1}


async def test_batch_asks_only_for_users_not_held(service: PausableService) -> None:
    await kept(service, "a", "c")
    await service.send(served("b"))
    wanted = dict.fromkeys(["a", "b", "c", "d"], FULL)
    service.source.statements.clear()
    values = await service.reader.read_values(wanted)
    assert {user_id: values[user_id][4] for user_id in wanted} == {"a": b"0", "b": b"1", "c": b"0", "d": b"0"}
    assert [row.user_id for row in service.source.statements[0]] == ["b", "d"]


async def test_each_selection_is_kept_apart(service: PausableService) -> None:
    await kept(service, USER)
    volume = REGISTRY.mask(["tip_volume_30d"])
    service.cache.commands.clear()
    assert (await service.reader.read_values({USER: volume}))[USER] == (b"0",)
    assert (await service.reader.read_values({USER: volume}))[USER] == (b"0",)
    assert service.cache.commands == {"read": 1}
    assert await is_near(service, USER)


async def test_event_of_another_process_is_seen(group: ServiceGroup) -> None:
    reader, writer = await group.open(), await group.open()
    await kept(reader, USER, "bob")
    for number in range(1, 4):
        await writer.send(served(USER))
        assert (await reader.plain(USER))["tip_volume_30d"] == number
        assert await is_near(reader, "bob"), "an event is about its own user"
        await kept(reader, USER)


async def test_profile_is_kept_when_another_feature_changes(service: PausableService) -> None:
    """The event log's newest number grows, the values of the other subject keep theirs: they are still proved."""
    await service.send(feedback(USER))
    await kept(service, USER)
    await service.send(served(USER))
    await kept(service, USER)
    assert await service.plain(USER) == await service.recomputed(USER)


async def test_old_value_is_not_kept_before_its_deletion(group: ServiceGroup) -> None:
    """E commit, R looks, R reads the old value; E DEL, E answer; R finds."""
    reader, writer = await group.open(), await group.open()
    await kept(reader, USER, "bob")
    sending = await group.stopped_at(writer.cache.before_drop, writer.send(served(USER)))
    await reader.plain("bob")  # a look that sees the event
    for _ in range(NEAR_AFTER):
        assert (await reader.plain(USER))["tip_volume_30d"] == 0, "nobody was told of the event yet"
    assert not await is_near(reader, USER)
    writer.cache.before_drop.go()
    await sending
    assert (await reader.plain(USER))["tip_volume_30d"] == 1


async def test_old_value_is_not_kept_when_an_event_interleaves(group: ServiceGroup) -> None:
    """R reads the old value, E commit, E DEL, E answer, R keeps; R finds."""
    reader, writer = await group.open(), await group.open()
    await seen(reader, USER)
    reading = await group.stopped_at(reader.cache.after_read, reader.plain(USER))
    await writer.send(served(USER))
    reader.cache.after_read.go()
    assert (await reading)["tip_volume_30d"] == 0, "it began before"
    assert (await reader.plain(USER))["tip_volume_30d"] == 1


async def test_old_value_is_not_kept_when_a_clear_interleaves(group: ServiceGroup) -> None:
    """R reads the old value, A erases, A DEL, A recalls, R keeps, R finds: the log forgot the user."""
    reader, admin = await group.open(), await group.open()
    await reader.send(served(USER))
    await seen(reader, USER)
    reading = await group.stopped_at(reader.cache.after_read, reader.plain(USER))
    await admin.erase(USER)
    reader.cache.after_read.go()
    await reading
    assert (await reader.plain(USER))["tip_volume_30d"] == 0


async def test_erased_user_is_forgotten_in_other_processes(group: ServiceGroup) -> None:
    reader, admin = await group.open(), await group.open()
    await reader.send(served(USER), feedback(USER))
    await kept(reader, USER)
    await admin.erase(USER)
    assert await reader.plain(USER) == await reader.recomputed(USER)


async def test_event_is_seen_while_its_user_is_erased(group: ServiceGroup) -> None:
    """R keeps; E commit, E DEL, E answer; A erases and has not settled; R finds. The log does not know E any more."""
    reader, writer, admin = await group.open(), await group.open(), await group.open()
    await writer.send(served(USER))
    await kept(reader, USER)
    await writer.send(served(USER))
    erasing = await group.stopped_at(admin.cache.before_drop, admin.erase(USER))
    assert (await reader.plain(USER))["tip_volume_30d"] in (0, 2)
    admin.cache.before_drop.go()
    await erasing
    assert (await reader.plain(USER))["tip_volume_30d"] == 0


async def test_event_is_seen_when_its_user_is_erased_between_looks(group: ServiceGroup) -> None:
    """R keeps; E commit, E answer; R reads the tail; A erases; R reads the recalls."""
    reader, writer, admin = await group.open(), await group.open(), await group.open()
    await writer.send(served(USER))
    await kept(reader, USER)
    await writer.send(served(USER))
    data_version = reader.inner.database.state
    assert isinstance(data_version, DataVersion)
    tail = data_version._connection

    class Between:
        """Erases before the second statement of a look."""

        def __init__(self) -> None:
            self.seen: list[str] = []

        def execute(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
            self.seen.append(statement)
            if len(self.seen) == 3:  # the version, one of the two, and now the other
                with sqlite3.connect(str(group.store)) as hand:
                    for erasing in (*DELETE_EVENTS, ADVANCE_LOCAL_CACHE_EPOCH):
                        hand.execute(erasing, {"user": USER})
            return tail.execute(statement, *parameters)

    data_version._connection = between = Between()  # type: ignore[assignment]
    assert (await reader.plain(USER))["tip_volume_30d"] in (0, 2)
    assert set(between.seen[1:3]) == {SELECT_TAIL, SELECT_LOCAL_CACHE_EPOCH}
    data_version._connection = tail
    await admin.erase(USER)


async def test_erased_user_is_not_kept_while_owed(group: ServiceGroup) -> None:
    """E commit; A erases; R reads the old value and may not keep it; E DEL, E answer; R finds; A settles."""
    reader, writer, admin = await group.open(), await group.open(), await group.open()
    await writer.send(served(USER))
    await kept(reader, USER, "bob")
    sending = await group.stopped_at(writer.cache.before_drop, writer.send(served(USER)))
    erasing = await group.stopped_at(admin.cache.before_drop, admin.erase(USER))
    await kept_as_far_as_allowed(reader)
    writer.cache.before_drop.go()
    await sending
    assert (await reader.plain(USER))["tip_volume_30d"] in (0, 2)
    admin.cache.before_drop.go()
    await erasing
    assert (await reader.plain(USER))["tip_volume_30d"] == 0


async def kept_as_far_as_allowed(service: PausableService) -> None:
    """More plain reads than it takes; the clock stands still, so a look at what is owed is never too old."""
    await service.plain("bob")
    for _ in range(NEAR_AFTER):
        await service.plain(USER)


async def test_large_batch_is_checked_in_bounded_pieces(service: PausableService) -> None:
    users = [f"user {number}" for number in range(PROOFS_PER_TICK * 2)]
    for round_ in range(NEAR_AFTER + 2):
        hits = service.counted("near_hits")
        await service.reader.read_values(dict.fromkeys(users, FULL))
        await service.drain()
        assert service.counted("near_hits") - hits == WIDTH * PROOFS_PER_TICK * max(0, round_ - 2)


async def test_values_rebuilt_by_another_process_are_read(group: ServiceGroup, database_path: Path) -> None:
    """The facts were changed by hand, without an event. A rebuild is the only way to correct the values."""
    reader, admin = await group.open(), await group.open()
    await reader.send(served(USER), feedback(USER))
    await kept(reader, USER)
    with sqlite3.connect(database_path) as hand:
        hand.execute("DELETE FROM tip_views")
    assert (await reader.plain(USER))["tip_volume_30d"] == 1
    await admin.rebuild(USER)
    assert (await reader.plain(USER))["tip_volume_30d"] == 0


async def test_profile_is_answered_only_between_its_times(service: PausableService) -> None:
    await service.plain(USER)
    await service.drain()
    profile = await service.profile(USER)
    begin = profile[0].computed_at_ms
    end = min(value.expires_at_ms or 0 for value in profile.values())
    await kept(service, USER)
    for at_ms, near in ((end - 1, True), (end, False), (begin - 1_000, True), (begin - 1_001, False)):
        service.clock.step_to(begin)
        await kept(service, USER)
        service.clock.step_to(at_ms)
        assert await is_near(service, USER) == near


def lock_out(service: PausableService) -> None:
    """Every later query of the observed state fails."""
    assert isinstance(service.inner.database.state, DataVersion)
    service.inner.database.state.close()


@pytest.mark.parametrize("trouble", ["owed", "locked out"])
async def test_local_cache_is_bypassed_when_the_cache_is_untrusted(service: PausableService, trouble: str) -> None:
    await kept(service, USER)
    if trouble == "owed":
        await service.owed.owe([USER], 1)
    else:
        lock_out(service)  # a look fails
    let_pass(service.clock, 0.051)
    hits = service.counted("near_hits")
    assert await service.plain(USER) == await service.recomputed(USER)
    assert service.counted("near_hits") == hits
    assert service.counted("degraded_reads", reason="owed") == 1


async def test_users_of_other_slots_are_served_while_an_invalidation_is_owed(service: PausableService) -> None:
    for user_id in (USER, "another-user"):
        await kept(service, user_id)
    await service.owed.owe(["another-user"], 1)
    let_pass(service.clock, 0.051)
    assert await is_near(service, USER)
    full = service.registry.full_mask
    hits = service.counted("near_hits")
    assert await service.reader.read_values({USER: full, "another-user": full})
    assert service.counted("near_hits") == hits + WIDTH


async def test_reads_are_right_when_the_change_feed_fails(service: PausableService) -> None:
    await kept(service, USER)
    lock_out(service)
    await service.send(served(USER))
    for _ in range(NEAR_AFTER + 1):
        assert (await service.plain(USER))["tip_volume_30d"] == 1


@pytest.mark.slow
async def test_number_of_kept_users_is_bounded(service: PausableService) -> None:
    users = [f"user {number}" for number in range(NEAR_USERS + 3)]
    for user_id in users:
        await kept(service, user_id)
    assert [user_id for user_id in users if await is_near(service, user_id)] == users[3:]


async def test_number_of_kept_selections_is_bounded(service: PausableService) -> None:
    for mask in range(1, MASKS_PER_USER + 4):
        for _ in range(NEAR_AFTER):
            await service.reader.read_values({USER: mask})
            await service.drain()
    near = 0
    for mask in range(MASKS_PER_USER + 3, 0, -1):
        hits = service.counted("near_hits")
        await service.reader.read_values({USER: mask})
        near += service.counted("near_hits") > hits
    assert 0 < near <= MASKS_PER_USER


async def test_local_cache_is_cleared_when_too_many_events_came(group: ServiceGroup) -> None:
    reader, writer = await group.open(), await group.open()
    await kept(reader, USER)
    await writer.send(*(served(f"user {number}") for number in range(1_000)))
    await writer.send(*(served(f"user {number}") for number in range(1_000)))
    await writer.send(*(served("bob") for _ in range(TAIL_CAP - 1_999)), served(USER))
    assert (await reader.plain(USER))["tip_volume_30d"] == 1


class Unproved(LocalCache):
    """A mutant: it keeps whatever the cache held."""

    def _proved(
        self, user_id: str, mask: int, held: Sequence[bytes | None], values: Sequence[bytes]
    ) -> KeptProfile | None:
        return KeptProfile(values, [], 0, LAST_EXPIRY_MS)


class Unmarked(LocalCache):
    """A mutant: it does not care what was recalled meanwhile."""

    def offer(self, mark: int, user_id: str, mask: int, held: Sequence[bytes | None], values: Sequence[bytes]) -> None:
        self._check()
        super().offer(self.cleared, user_id, mask, held, values)


class Blind(LocalCache):
    """A mutant: it does not look before it answers."""

    def _check(self) -> bool:
        return True


MUTANTS: list[tuple[type[LocalCache], Callable[[ServiceGroup], Awaitable[None]]]] = [
    (Unproved, test_old_value_is_not_kept_before_its_deletion),
    (Unmarked, test_old_value_is_not_kept_when_a_clear_interleaves),
    (Blind, test_event_of_another_process_is_seen),
]


@pytest.mark.parametrize(("mutant", "schedule"), MUTANTS, ids=lambda value: value.__name__)
async def test_stale_read_is_found_when_the_local_cache_is_broken(
    mutant: type[LocalCache],
    schedule: Callable[[ServiceGroup], Awaitable[None]],
    database_path: Path,
    valkey: EmbeddedServer,
) -> None:
    async with ServiceGroup(database_path, valkey, Kind(mutant.__name__, local_cache=mutant)) as group:
        with pytest.raises(AssertionError):
            await schedule(group)


async def test_profile_is_kept_when_the_cache_is_emptied(group: ServiceGroup) -> None:
    service = await group.open()
    await kept(service, USER)
    ask(group.server, "FLUSHALL")
    assert await is_near(service, USER)
    await service.send(served(USER))
    assert await service.plain(USER) == await service.recomputed(USER)
