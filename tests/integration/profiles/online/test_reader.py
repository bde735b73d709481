"""Reads: shared work, independent waiting, distrusted bytes, and failures of cache and database."""

import asyncio
import json
from functools import partial

import pytest

from app.errors import StoreUnavailable
from app.features.clock import rfc3339
from app.features.ids import hash_slot
from app.features.registry import Registry
from app.profiles.online.cache_protocol import CHECK_VALID_S, FeatureValue, decode, encode
from app.profiles.online.compute import CAP, TTL_JITTER
from app.profiles.online.request_batching import GROUP_CAP
from app.profiles.ports import EVERY_SLOT, Cell, ComputeRow, Fill
from tests.support.entries import entry
from tests.support.events import feedback, served
from tests.support.features import TIP_VOLUME
from tests.support.registry import REGISTRY
from tests.support.servers import calls, keys
from tests.support.service import NEAR_AFTER, READERS, PausableService, assert_true, let_pass
from tests.support.service_group import ServiceGroup
from tests.support.waiting import eventually

pytestmark = pytest.mark.both_engines

USER = "ann"
FULL = REGISTRY.full_mask
BROKEN = "SELECT user_id, 'x' AS value FROM views GROUP BY user_id"


async def test_cold_user_has_a_full_profile(service: PausableService) -> None:
    assert await service.features("nobody") == {
        "completion_rate_30d": None,
        "dismiss_rate_30d": None,
        "mean_dwell_ms_30d": None,
        "preferred_hour": None,
        "tip_volume_30d": 0,
    }


async def test_requests_of_one_tick_share_mget_and_statement(service: PausableService) -> None:
    users = [f"user {number}" for number in range(50)]
    profiles = await asyncio.gather(*(service.features(user) for user in users))
    await service.drain()
    assert len(profiles) == 50
    assert service.cache.commands == {"read": 1, "lease": 1, "fill": 1}
    assert len(service.source.statements) == 1
    assert service.statements == 1
    await asyncio.gather(*(service.features(user) for user in users))
    assert service.cache.commands == {"read": 2, "lease": 1, "fill": 1}
    assert service.counted("cache_hits") == service.counted("cache_misses") == 50 * len(REGISTRY)


async def test_few_statements_serve_500_requests_of_a_cold_user(service: PausableService) -> None:
    await service.send(served(USER))
    profiles = await asyncio.gather(*(service.features(USER) for _ in range(500)))
    assert profiles == [await service.recomputed(USER)] * 500
    assert len(service.source.statements) <= READERS + 1
    await assert_true([service], USER)


async def test_few_statements_serve_500_requests_over_many_ticks(service: PausableService, group: ServiceGroup) -> None:
    tasks = [await group.stopped_at(service.source.before, service.features(USER))]
    for wave in range(2, 12):
        answered = service.cache.answered_reads
        tasks += [await group.started(service.features(USER)) for _ in range(50 if wave < 11 else 49)]
        await eventually(partial(_answered, service, answered + 1))
    service.source.before.go()
    assert len({json.dumps(profile) for profile in await asyncio.gather(*tasks)}) == 1
    assert len(tasks) == 500
    assert len(service.source.statements) <= READERS + 1
    await assert_true([service], USER)


def _answered(service: PausableService, reads: int) -> bool:
    return service.cache.answered_reads >= reads and service.cache.answered_reads == service.cache.commands["read"]


async def test_hits_do_not_wait_for_a_miss(service: PausableService) -> None:
    await assert_true([service], "hot")
    service.source.before.stop()
    service.cache.commands.clear()
    cold, hot = (asyncio.get_running_loop().create_task(service.features(user)) for user in ("cold", "hot"))
    await service.source.before.reached()
    assert service.cache.commands["read"] == 1, "they share an MGET"
    reads = service.cache.commands["read"]
    await eventually(hot.done)
    assert not cold.done()
    await service.features("hot")
    assert not cold.done()
    assert service.cache.commands["read"] == reads + 1
    service.source.before.go()
    assert await cold == await service.recomputed("cold")


async def test_single_read_overtakes_a_batch_of_1000(service: PausableService, group: ServiceGroup) -> None:
    users = [f"user {number}" for number in range(1_000)]
    batch = await group.stopped_at(service.source.before, service.batch(users))
    single = await group.started(service.features(USER))
    await eventually(lambda: service.cache.commands["lease"] == 2)
    service.source.before.go()
    assert await single == await service.recomputed(USER)
    assert not batch.done()
    place = next(
        place for place, asked in enumerate(service.source.statements) if USER in {row.user_id for row in asked}
    )
    assert place <= 2, "it waited for what had begun, and for nothing else"
    profiles = await batch
    assert list(profiles) == users
    assert max(len(asked) for asked in service.source.statements) == CAP


async def test_only_missing_features_are_computed(service: PausableService) -> None:
    await service.send(served(USER), feedback(USER, dwell_ms=7))
    await service.profile(USER, REGISTRY.mask(["preferred_hour", "tip_volume_30d"]))
    await service.drain()
    service.cache.commands.clear()
    service.cache.filled.clear()
    service.source.statements.clear()
    assert await service.features(USER) == await service.recomputed(USER)
    await service.drain()
    missing = ["completion_rate_30d", "dismiss_rate_30d", "mean_dwell_ms_30d"]
    assert service.cache.commands == {"read": 1, "lease": 1, "fill": 1}
    assert service.source.statements == [[ComputeRow(USER, REGISTRY.mask(missing))]]
    assert [fill.cell for fill in service.cache.filled] == [Cell(USER, name) for name in missing]


async def test_only_selected_features_are_read(service: PausableService) -> None:
    mask = REGISTRY.mask(["tip_volume_30d"])
    assert list(await service.profile(USER, mask)) == [4]
    assert service.source.statements == [[ComputeRow(USER, mask)]]


async def test_batch_larger_than_a_group_is_answered(service: PausableService) -> None:
    users = [f"user {number}" for number in range(GROUP_CAP + CAP + 3)]
    await service.send(*(served(user) for user in users[::7]))
    expected = {user: int(place % 7 == 0) for place, user in enumerate(users)}
    for _ in range(2):  # computed, then from the cache
        profiles = await service.batch(users)
        assert {user: profile["tip_volume_30d"] for user, profile in profiles.items()} == expected
        await service.drain()
    assert len(service.source.statements) == 4


async def test_hit_says_when_it_was_computed_when_it_is_read_later(service: PausableService) -> None:
    computed = await service.profile(USER)
    await service.drain()
    service.clock.advance(1_000)
    hit = await service.profile(USER)
    assert {index: reading._replace(cached=False) for index, reading in hit.items()} == computed
    assert all(reading.cached for reading in hit.values())


async def test_reads_are_right_and_counted_when_the_cache_is_stopped(fragile_world: ServiceGroup) -> None:
    service = await fragile_world.open()
    await service.send(served(USER))
    await assert_true([service], USER)
    fragile_world.server.kill()
    for count in range(1, 6):
        assert await service.features(USER) == await service.recomputed(USER)
        assert service.counted("degraded_reads", reason="unavailable") == count
    assert not service.cache.available
    together = await asyncio.gather(*(service.features(USER) for _ in range(100)))
    assert together == [await service.recomputed(USER)] * 100
    fragile_world.restart()
    await service.reconnected()
    await assert_true([service], USER)


async def test_reads_compute_when_the_cache_dies_between_mget_and_lease(fragile_world: ServiceGroup) -> None:
    service = await fragile_world.open()
    reading = await fragile_world.stopped_at(service.cache.before_lease, service.features(USER))
    fragile_world.server.kill()
    service.cache.before_lease.go()
    assert await reading == await service.recomputed(USER)
    assert service.counted("degraded_reads", reason="unavailable") == 1


async def test_answer_stands_when_the_cache_dies_before_the_fill(fragile_world: ServiceGroup) -> None:
    service = await fragile_world.open()
    reading = await fragile_world.stopped_at(service.source.after, service.features(USER))
    fragile_world.server.kill()
    service.source.after.go()
    assert await reading == await service.recomputed(USER)
    await service.drain()
    assert service.counted("cache_fills", outcome="failed") == len(REGISTRY)


async def test_others_are_answered_when_one_of_a_degraded_statement_is_cancelled(service: PausableService) -> None:
    await service.owed.owe(["another-user"], 1)
    let_pass(service.clock, 0.051)
    service.source.before.stop()
    first, second = (asyncio.get_running_loop().create_task(service.features(user)) for user in (USER, "bob"))
    await service.source.before.reached()
    first.cancel()
    service.source.before.go()
    assert await second == await service.recomputed("bob")
    with pytest.raises(asyncio.CancelledError):
        await first
    assert len(service.source.statements) == 1


@pytest.mark.parametrize("slot", [hash_slot(USER), EVERY_SLOT])
async def test_no_hit_is_served_when_an_invalidation_is_owed(service: PausableService, slot: int) -> None:
    await assert_true([service], USER)
    await service.database.execute("INSERT INTO owed_invalidations VALUES (1, 'of an older release', 1, ?)", (slot,))
    service.clock.advance(51)
    statements = len(service.source.statements)
    assert not any(value.cached or value.expires_at_ms for value in (await service.profile(USER)).values())
    assert len(service.source.statements) == statements + 1
    assert service.counted("degraded_reads", reason="owed") == 1


async def test_hits_are_served_when_an_invalidation_of_another_slot_is_owed(service: PausableService) -> None:
    await assert_true([service], USER)
    await service.owed.owe(["another-user"], 1)
    service.clock.advance(51)
    statements = len(service.source.statements)
    both = await service.reader.read(dict.fromkeys((USER, "another-user"), service.registry.full_mask))
    assert all(value.cached for value in both[USER].values())
    assert not any(value.cached for value in both["another-user"].values())
    assert [[row.user_id for row in rows] for rows in service.source.statements[statements:]] == [["another-user"]]
    assert service.counted("degraded_reads", reason="owed") == 1


async def put(service: PausableService, cell: Cell, raw: bytes) -> None:
    """Store bytes under a key, as a foreign program would."""
    epoch, (held,) = await service.cache.inner.read([cell])
    (token,) = [held] if held is not None else await service.cache.inner.lease(epoch, [cell])
    assert await service.cache.inner.fill(epoch, [Fill(cell, token, raw, 60_000)]) == [True]


@pytest.mark.parametrize(
    "raw", [b"garbage", b"V", b"V::::", b"Vxxxxxxxx:1:2:3:4", b"Vxxxxxxxx:one:2:3:4", b"", b"\xff\x00", b"X" * 10_000]
)
async def test_foreign_bytes_are_a_miss_and_replaced(service: PausableService, raw: bytes) -> None:
    await put(service, Cell(USER, TIP_VOLUME.name), raw)
    await service.features(USER)
    await service.drain()
    assert service.counted("cache_hits") == 0
    assert decode((await service.held(USER))[Cell(USER, TIP_VOLUME.name)]) is not None
    await service.features(USER)
    assert service.counted("cache_hits") == len(REGISTRY)
    await assert_true([service], USER)


async def test_value_of_another_fingerprint_is_replaced(service: PausableService) -> None:
    cell = Cell(USER, TIP_VOLUME.name)
    await put(service, cell, encode(FeatureValue(b"deadbeef", 0, 1, 2, b"99")))
    await service.profile(USER, REGISTRY.mask([TIP_VOLUME.name]))
    await service.drain()
    assert service.cache.commands == {"read": 1, "fill": 1}
    value = decode((await service.held(USER))[cell])
    assert value is not None
    assert (value.fingerprint, value.json) == (TIP_VOLUME.fingerprint.encode(), b"0")


async def test_invalid_value_is_null_and_not_cached(group: ServiceGroup) -> None:
    broken = entry(name="broken", compute=BROKEN)
    service = await group.open(registry=Registry([REGISTRY.named(TIP_VOLUME.name), broken]))
    await service.send(served(USER))
    for _ in range(2):
        profile = await service.profile(USER)
        await service.drain()
        assert profile[0].json == b"1"
        assert (profile[1].json, profile[1].cached, profile[1].expires_at_ms) == (b"null", False, None)
        assert profile[1].error is not None
    held = await service.held(USER)
    assert decode(held[Cell(USER, TIP_VOLUME.name)]) is not None
    assert decode(held[Cell(USER, "broken")]) is None
    assert (await service.rebuilder.rebuild([USER], 3))[USER][1].error is not None
    assert service.counted("computation_errors", feature="broken") == 3


async def test_others_are_answered_when_one_is_cancelled(service: PausableService, group: ServiceGroup) -> None:
    service.source.before.stop()
    tasks = [asyncio.get_running_loop().create_task(service.features(USER)) for _ in range(3)]
    await service.source.before.reached()
    tasks[0].cancel()
    late = await group.started(service.features(USER))
    await eventually(lambda: service.cache.commands["read"] == 2)
    late.cancel()
    service.source.before.go()
    expected = await service.recomputed(USER)
    assert [await tasks[1], await tasks[2]] == [expected, expected]
    outcomes = await asyncio.gather(tasks[0], late, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [asyncio.CancelledError] * 2
    await assert_true([service], USER)
    assert len(service.source.statements) <= READERS


async def test_all_requests_fail_when_the_database_fails(service: PausableService, group: ServiceGroup) -> None:
    service.source.failure = StoreUnavailable("locked")
    tasks = [await group.stopped_at(service.source.before, service.features(USER))]
    tasks.append(await group.started(service.features(USER)))
    await eventually(lambda: service.cache.commands["read"] == 2)
    service.source.before.go()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [StoreUnavailable] * 2
    service.source.failure = None
    await assert_true([service], USER)


async def test_degraded_reads_raise_when_the_database_fails_too(fragile_world: ServiceGroup) -> None:
    service = await fragile_world.open()
    fragile_world.server.kill()
    service.source.failure = StoreUnavailable("locked")
    with pytest.raises(StoreUnavailable):
        await service.features(USER)


async def test_ttls_differ_and_stay_within_bounds(service: PausableService) -> None:
    users = [f"user {number}" for number in range(200)]
    profiles = await service.reader.read(dict.fromkeys(users, FULL))
    await service.drain()
    for index, feature in enumerate(REGISTRY):
        ttls = [fill.ttl_ms for fill in service.cache.filled if fill.cell.feature == feature.name]
        assert len(ttls) == 200
        assert all((1 - TTL_JITTER) * feature.ttl_ms < ttl <= feature.ttl_ms for ttl in ttls)
        assert len(set(ttls)) > 100
        expiries = [profile[index].expires_at_ms for profile in profiles.values()]
        assert expiries == [service.clock.now_ms() + ttl for ttl in ttls]


async def test_fills_are_finished_when_the_reader_closes(service: PausableService, group: ServiceGroup) -> None:
    service.cache.before_fill.stop()
    await service.features(USER)
    await service.cache.before_fill.reached()
    assert all(raw is not None and raw[:1] == b"L" for raw in (await service.held(USER)).values())
    closing = await group.started(service.reader.close())
    assert not closing.done()
    service.cache.before_fill.go()
    await closing
    assert all(decode(raw) is not None for raw in (await service.held(USER)).values())


async def test_request_is_answered_when_the_reader_closes(service: PausableService, group: ServiceGroup) -> None:
    reading = await group.stopped_at(service.source.before, service.features(USER))
    closing = await group.started(service.reader.close())
    service.source.before.go()
    await closing
    assert reading.done()
    await reading


async def test_past_moments_touch_no_cache(service: PausableService, group: ServiceGroup) -> None:
    await service.send(served(USER))
    await assert_true([service], USER)
    service.cache.commands.clear()
    now_ms = service.clock.now_ms()
    rows = await service.reader.read_as_of(
        [ComputeRow(USER, FULL, now_ms - 1), ComputeRow(USER, FULL, now_ms), ComputeRow("x", 1, 5)]
    )
    assert [row[4].json for row in rows[:2]] == [b"0", b"1"]
    assert list(rows[2]) == [0]
    assert {reading.computed_at_ms for reading in rows[0].values()} == {now_ms - 1}
    assert service.cache.commands == {}
    assert len(keys(group.server)) == len(REGISTRY)


async def test_cold_read_takes_two_round_trips(service: PausableService, group: ServiceGroup) -> None:
    before = calls(group.server, "mget")
    await service.features(USER)
    await service.drain()
    await service.features(USER)
    assert calls(group.server, "mget") - before == 2


async def test_disabled_feature_is_null_with_its_reason(service: PausableService) -> None:
    await service.send(served(USER), feedback(USER))
    before = await service.features(USER)
    await service.drain()
    await service.switch("tip_volume_30d", on=False)
    profile = await service.profile(USER)
    disabled = profile[REGISTRY.names.index("tip_volume_30d")]
    since = rfc3339(service.clock.now_ms())
    assert (disabled.json, disabled.cached, disabled.expires_at_ms) == (b"null", False, None)
    assert disabled.error == f"disabled by ada at {since}: it is wrong"
    assert service.decoded(profile) == {**before, "tip_volume_30d": None}
    assert [reading.cached for reading in profile.values()].count(True) == len(REGISTRY) - 1
    assert await service.features("cold") == dict.fromkeys(REGISTRY.names)  # its default is not served either


async def test_disabled_feature_is_null_in_every_kind_of_read(service: PausableService) -> None:
    await service.send(served(USER), feedback(USER))
    for _ in range(NEAR_AFTER):
        await service.plain(USER)
        await service.drain()
    expected = await service.plain(USER)
    await service.switch("preferred_hour", on=False)
    expected["preferred_hour"] = None
    for _ in range(NEAR_AFTER + 1):
        assert await service.plain(USER) == expected
        await service.drain()
    hour = REGISTRY.mask(["preferred_hour"])
    if service.caches_locally:
        assert service.reader.local_values(USER, FULL) is not None
        assert list(service.reader.local_values(USER, hour) or ()) == [b"null"]
    assert await service.reader.read_values({USER: hour, "other": FULL}) == {
        USER: [b"null"],
        "other": [b"null", b"null", b"null", b"null", b"0"],
    }
    (past,) = await service.reader.read_as_of([ComputeRow(USER, FULL, service.clock.now_ms())])
    assert service.decoded(past) == expected
    assert (await service.rebuild(USER))[USER] == expected


async def test_cache_is_not_asked_when_all_features_are_disabled(service: PausableService) -> None:
    for feature in REGISTRY.names:
        await service.switch(feature, on=False)
    before = dict(service.cache.commands)
    assert await service.features(USER) == dict.fromkeys(REGISTRY.names)
    assert await service.reader.read_shared_values({USER: FULL}) == {USER: [b"null"] * len(REGISTRY)}
    assert await service.plain(USER) == dict.fromkeys(REGISTRY.names)
    features, recorded = await service.reader.read_recorded(USER)
    assert (features, recorded.values) == (dict.fromkeys(REGISTRY.names), {})
    assert service.cache.commands == before
    assert service.counted("cache_errors", kind="refused") == 0
    assert service.counted("degraded_reads", reason="unavailable") == 0


async def test_enabled_feature_is_right_at_once(service: PausableService) -> None:
    await service.send(served(USER))
    await service.features(USER)
    await service.drain()
    await service.switch("tip_volume_30d", on=False)
    await service.send(served(USER))
    await service.switch("tip_volume_30d", on=True)
    assert (await service.features(USER))["tip_volume_30d"] == 2


async def test_other_processes_see_a_disabled_feature(service: PausableService, group: ServiceGroup) -> None:
    other = await group.open()
    await service.send(served(USER))
    await other.features(USER)
    await service.switch("tip_volume_30d", on=False)
    let_pass(other.clock, CHECK_VALID_S + 0.001)
    await other.features(USER)  # looks
    assert (await other.features(USER))["tip_volume_30d"] is None


async def test_paused_feature_is_null_without_a_statement(group: ServiceGroup) -> None:
    registry = Registry([entry(name="sound"), entry(name="broken", compute=BROKEN)])
    service = await group.open(registry)
    for user in ("a", "b", "c"):
        await service.send(served(user, tip_id="t"))
        assert (await service.features(user))["broken"] is None
    await service.drain()
    statements = len(service.source.statements)
    for _ in range(5):
        assert await service.plain("a") == {"sound": 1, "broken": None}
    detailed = await service.profile("a")
    assert len(service.source.statements) == statements
    assert detailed[0].cached
    assert (detailed[1].json, detailed[1].error) == (b"null", "the SQL gave text where int is declared")
