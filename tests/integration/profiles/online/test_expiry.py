"""A cached value is served until the moment at which time makes it untrue, and not a millisecond longer."""

from collections.abc import Awaitable, Callable

import pytest

from app.features.clock import CLOCK_SKEW_MS, DAY_MS
from app.profiles.online.cache_protocol import FeatureValue, decode, encode
from app.profiles.ports import Cell
from app.stores.valkey.cache import key
from tests.support.clock import NOW_MS
from tests.support.database import log_of
from tests.support.events import feedback, served
from tests.support.registry import REGISTRY
from tests.support.servers import ask
from tests.support.service import NEAR_AFTER, Features, PausableService
from tests.support.service_group import ServiceGroup

pytestmark = pytest.mark.both_engines

USER = "ann"
VOLUME = "tip_volume_30d"
LEAVES_MS = NOW_MS + 60_000
OLDEST_MS = LEAVES_MS - 30 * DAY_MS


async def single(service: PausableService) -> Features:
    return await service.features(USER)


async def local(service: PausableService) -> Features:
    return await service.plain(USER)


async def batch(service: PausableService) -> Features:
    return (await service.batch(["bob", USER, "cid"]))[USER]


async def scoring(service: PausableService) -> Features:
    """As a scoring request reads its profile."""
    features, _ = await service.reader.read_recorded(USER)
    return dict(features)


async def generating(service: PausableService) -> Features:
    """As a request for a text reads its profile."""
    return dict(await service.reader.read_features(USER, service.registry.full_mask))


READS: list[Callable[[PausableService], Awaitable[Features]]] = [single, local, batch, scoring, generating]


@pytest.mark.parametrize("read", READS)
async def test_read_changes_when_the_oldest_event_leaves_the_window(
    service: PausableService, read: Callable[[PausableService], Awaitable[Features]]
) -> None:
    await service.send(served(USER, OLDEST_MS), feedback(USER, OLDEST_MS, dwell_ms=5), served(USER))
    for _ in range(NEAR_AFTER):
        await read(service)
        await service.plain(USER)
        await service.drain()
    service.clock.step_to(LEAVES_MS - 1)
    hits = service.counted("cache_hits")
    before = await read(service)
    assert (before[VOLUME], before["completion_rate_30d"], before["mean_dwell_ms_30d"]) == (2, 1.0, 5.0)
    assert service.counted("cache_hits") > hits, "the value was cached until then"
    service.clock.step_to(LEAVES_MS)
    after = await read(service)
    assert after == await service.recomputed(USER)
    assert (after[VOLUME], after["completion_rate_30d"], after["mean_dwell_ms_30d"]) == (1, None, None)


async def test_default_is_cached_after_the_last_event_has_left(service: PausableService) -> None:
    await service.send(served(USER, OLDEST_MS))
    await service.features(USER)
    await service.drain()
    service.clock.step_to(LEAVES_MS)
    assert (await service.features(USER))[VOLUME] == 0
    await service.drain()
    service.clock.advance(REGISTRY.named(VOLUME).ttl_ms // 2)
    (value,) = (await service.profile(USER, REGISTRY.mask([VOLUME]))).values()
    assert (value.json, value.cached) == (b"0", True)


async def test_pruned_event_does_not_expire_a_value(service: PausableService) -> None:
    await service.send(served(USER, NOW_MS - 31 * DAY_MS), served(USER, NOW_MS - 1))
    await log_of(service.database).prune(NOW_MS - 30 * DAY_MS, 10)
    (value,) = (await service.profile(USER, REGISTRY.mask([VOLUME]))).values()
    assert value.expires_at_ms is not None
    assert value.expires_at_ms - NOW_MS > REGISTRY.named(VOLUME).ttl_ms * 0.8


async def test_event_ahead_of_the_clock_counts_at_once(group: ServiceGroup) -> None:
    """Of another process, whose clock is ahead by half a second."""
    service = await group.open()
    service.clock.step_to(NOW_MS + 500)
    await service.send(served(USER, NOW_MS + 500))
    service.clock.step_to(NOW_MS)
    assert (await service.features(USER))[VOLUME] == 1


@pytest.mark.parametrize(
    ("computed_ahead_ms", "expires_in_ms", "hit"),
    [
        (0, 1, True),
        (0, 0, False),
        (0, -1, False),
        (CLOCK_SKEW_MS, 5_000, True),
        (CLOCK_SKEW_MS + 1, 5_000, False),
        (-DAY_MS, 1, True),
    ],
)
async def test_value_is_a_hit_only_between_its_times(
    service: PausableService, group: ServiceGroup, computed_ahead_ms: int, expires_in_ms: int, hit: bool
) -> None:
    fingerprint = REGISTRY.named(VOLUME).fingerprint.encode()
    value = FeatureValue(fingerprint, 0, NOW_MS + computed_ahead_ms, NOW_MS + expires_in_ms, b"7")
    cell = Cell(USER, VOLUME)
    epoch, _ = await service.cache.inner.read([cell])
    ask(group.server, "SET", key(epoch, cell), encode(value))
    (read,) = (await service.profile(USER, REGISTRY.mask([VOLUME]))).values()
    assert (read.json, read.cached) == ((b"7", True) if hit else (b"0", False))
    await service.drain()
    (raw,) = (await service.cache.inner.read([cell]))[1]
    kept = decode(raw)
    assert kept is not None
    assert kept.json == (b"7" if hit else b"0"), "a value that is no hit is replaced"


async def test_value_of_the_previous_cache_protocol_is_a_miss(service: PausableService, group: ServiceGroup) -> None:
    """Its fingerprint did not cover a protocol number, and it may be served beyond the edge of its window."""
    cell = Cell(USER, VOLUME)
    epoch, _ = await service.cache.inner.read([cell])
    ask(group.server, "SET", key(epoch, cell), b"V1f3a9c07:12:%d:%d:7" % (NOW_MS, NOW_MS + 60_000))
    (read,) = (await service.profile(USER, REGISTRY.mask([VOLUME]))).values()
    assert (read.json, read.cached) == (b"0", False)


async def test_value_without_events_is_no_fault_after_an_erasure(group: ServiceGroup) -> None:
    """Its version is negative then."""
    service = await group.open()
    await service.send(served("bob"))
    await service.erase("bob")
    for _ in range(NEAR_AFTER + 2):  # the erasure clears the local cache once
        await service.plain(USER)
        await service.drain()
    assert service.counted("near_hits") == (len(REGISTRY) if service.caches_locally else 0)
    (inspection,) = await service.inner.inspector.inspect([USER], compute=False)
    assert {cell.state for cell in inspection.cells} == {"fresh"}
