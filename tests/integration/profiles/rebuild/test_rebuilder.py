"""Rebuilding: every feature computed now and cached when the answer comes; the schedules are in `schedules.py`."""

from __future__ import annotations

import pytest

from app.errors import StoreUnavailable
from app.profiles.online.cache_protocol import decode
from app.profiles.rebuild import ATTEMPTS
from tests.support.events import served
from tests.support.registry import REGISTRY
from tests.support.servers import ask
from tests.support.service import PausableService, assert_true
from tests.support.service_group import ServiceGroup

pytestmark = pytest.mark.both_engines

USER = "ann"
FULL = REGISTRY.full_mask


async def test_values_are_in_the_cache_when_the_rebuild_answers(service: PausableService) -> None:
    await service.send(served(USER))
    assert await service.rebuild(USER, "bob") == {user: await service.recomputed(user) for user in (USER, "bob")}
    assert all(decode(raw) is not None for raw in (await service.held(USER, "bob")).values())


async def test_held_values_are_recomputed(service: PausableService) -> None:
    await assert_true([service], USER)
    service.clock.advance(60_000)
    await service.rebuild(USER)
    values = [decode(raw) for raw in (await service.held(USER)).values()]
    assert {value.computed_at_ms for value in values if value} == {service.clock.now_ms()}


async def test_only_the_selection_is_rebuilt_when_features_are_selected(service: PausableService) -> None:
    await assert_true([service], USER)
    service.clock.advance(60_000)
    await service.rebuilder.rebuild([USER], REGISTRY.mask(["preferred_hour"]))
    fresh = [cell.feature for cell, raw in (await service.held(USER)).items() if computed_now(service, raw)]
    assert fresh == ["preferred_hour"]


def computed_now(service: PausableService, raw: bytes | None) -> bool:
    value = decode(raw)
    return value is not None and value.computed_at_ms == service.clock.now_ms()


async def test_rebuild_stops_filling_when_events_keep_coming(
    service: PausableService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer is right as of its last snapshot, and the next read computes."""
    fill = service.cache.inner.fill

    async def outrun(epoch: str, fills: list[object]) -> list[bool]:
        await service.send(served(USER))
        return await fill(epoch, fills)  # type: ignore[arg-type]  # handed on as it came

    monkeypatch.setattr(service.cache.inner, "fill", outrun)
    rebuilt = (await service.rebuilder.rebuild([USER], FULL))[USER]
    assert service.decoded(rebuilt)["tip_volume_30d"] == ATTEMPTS - 1
    not_kept = [REGISTRY.names[index] for index, value in rebuilt.items() if value.expires_at_ms is None]
    assert not_kept == ["tip_volume_30d"]
    monkeypatch.setattr(service.cache.inner, "fill", fill)
    await assert_true([service], USER)


async def test_rebuild_answers_when_the_cache_is_away(fragile_world: ServiceGroup) -> None:
    service = await fragile_world.open()
    fragile_world.server.kill()
    for _ in range(3):
        assert await service.rebuild(USER) == {USER: await service.recomputed(USER)}
    assert not service.cache.available
    rebuilt = await service.rebuilder.rebuild([USER], service.registry.full_mask)
    assert {reading.expires_at_ms for reading in rebuilt[USER].values()} == {None}, "nothing keeps these values"
    fragile_world.restart()


@pytest.mark.parametrize("trouble", ["full", "away for this process"])
async def test_no_older_value_is_left_when_fills_fail(
    fragile_world: ServiceGroup, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, admin = await fragile_world.open(), await fragile_world.open()
    await reader.send(served(USER))
    await assert_true([reader, admin], USER)
    await admin.database.execute("DELETE FROM tip_views")
    if trouble == "full":
        ask(fragile_world.server, "CONFIG", "SET", "maxmemory-policy", "noeviction")
        ask(fragile_world.server, "CONFIG", "SET", "maxmemory", 1)
    else:
        monkeypatch.setattr(type(admin.cache), "available", property(lambda cache: cache is not admin.cache))
    rebuilt = (await admin.rebuilder.rebuild([USER], FULL))[USER]
    assert admin.decoded(rebuilt)["tip_volume_30d"] == 0
    assert {value.expires_at_ms for value in rebuilt.values()} == {None}, "nothing keeps these values"
    await admin.inner.clear_local_caches()
    for read in (reader.plain, reader.features):
        assert (await read(USER))["tip_volume_30d"] == 0


async def test_rebuild_raises_when_the_database_fails(service: PausableService) -> None:
    service.source.failure = StoreUnavailable("locked")
    with pytest.raises(StoreUnavailable):
        await service.rebuild(USER)
