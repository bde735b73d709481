"""Freshness is measured: each cell is fresh, missing or stale, and a value on its way out is no fault."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from app.errors import CacheUnavailable
from app.profiles.codec import Value, encode
from app.profiles.consistency.freshness import FreshnessMeter
from app.profiles.ports import Cell
from app.stores.sqlite.users import SqliteUsers
from app.stores.valkey.cache import key
from tests.profiles.world import World
from tests.support.events import feedback, served
from tests.support.registry import REGISTRY
from tests.support.servers import ask
from tests.support.service import Service


async def _at_once(_: float) -> None:
    """No pause."""


def meter(service: Service, pause: Callable[[float], Awaitable[None]] = _at_once) -> FreshnessMeter:
    """Measures that service's cache."""
    users = SqliteUsers(service.database)
    return FreshnessMeter(cache=service.cache, users=users, registry=service.registry, clock=service.clock, pause=pause)


async def put(
    service: Service, world: World, user: str, feature: str, seq: int, fingerprint: bytes | None = None
) -> None:
    """Put a value past the protocol."""
    known = service.registry.named(feature).fingerprint.encode()
    now_ms = service.clock.now_ms()
    epoch, _ = await service.cache.inner.read([Cell(user, feature)])
    raw = encode(Value(fingerprint or known, seq, now_ms, now_ms + 60_000, b"1"))
    ask(world.server, "SET", key(epoch, Cell(user, feature)), raw)


async def states(measuring: FreshnessMeter, *users: str) -> dict[tuple[str, str], str]:
    """The state of each cell."""
    return {(look.user_id, REGISTRY.names[look.feature]): look.state for look in await measuring.look(users)}


async def test_cells_are_fresh_missing_and_stale_when_the_cache_holds_such(service: Service, world: World) -> None:
    await service.send(*(served(user) for user in ("ann", "bob", "cyd", "dee")), feedback("ann"))
    await service.batch(["ann", "bob"])
    await service.drain()
    await put(service, world, "cyd", "tip_volume_30d", seq=1)
    await put(service, world, "dee", "tip_volume_30d", seq=99, fingerprint=b"another")
    looks = await meter(service).look(["ann", "bob", "cyd", "dee"])
    assert [(look.user_id, look.feature) for look in looks] == [
        (user, index) for user in ("ann", "bob", "cyd", "dee") for index in range(len(REGISTRY))
    ]
    assert all((look.value is None) == (look.state == "missing") for look in looks)
    found = {(look.user_id, REGISTRY.names[look.feature]): look for look in looks}
    volumes = {user: found[user, "tip_volume_30d"] for user in ("ann", "bob", "cyd", "dee")}
    assert {user: look.state for user, look in volumes.items()} == {
        "ann": "fresh",
        "bob": "fresh",
        "cyd": "stale",
        "dee": "missing",
    }
    assert [volumes[user].value.json for user in ("ann", "cyd")] == [b"1", b"1"]  # type: ignore[union-attr]  # live


async def test_only_the_features_asked_for_are_looked_at(service: Service) -> None:
    looks = await meter(service).look(["ann"], REGISTRY.mask(["preferred_hour"]))
    assert [(look.feature, look.state) for look in looks] == [(3, "missing")]
    assert await meter(service).look([]) == []


async def test_only_events_of_its_subjects_make_a_value_stale(service: Service, world: World) -> None:
    rate = ("ann", "completion_rate_30d")
    await service.send(served("ann"))  # 1: of no interest to a rate of feedback
    await put(service, world, *rate, seq=0)
    assert (await states(meter(service), "ann"))[rate] == "fresh"
    await service.send(feedback("ann"))  # 2: its DEL takes the value away
    await put(service, world, *rate, seq=1)
    assert (await states(meter(service), "ann"))[rate] == "stale"


async def test_a_value_is_no_fault_when_it_goes_before_the_second_look(service: Service, world: World) -> None:
    await service.send(served("ann"))
    await put(service, world, "ann", "tip_volume_30d", seq=0)

    async def drop(_: float) -> None:
        await service.cache.inner.drop([Cell("ann", "tip_volume_30d")])

    assert (await states(meter(service, drop), "ann"))["ann", "tip_volume_30d"] == "missing"


async def test_nothing_is_claimed_when_the_cache_goes_away(fragile_world: World) -> None:
    service = await fragile_world.open()
    await service.send(served("ann"), served("bob"))
    await service.batch(["ann", "bob"])
    await service.drain()
    fragile_world.server.kill()
    with pytest.raises(CacheUnavailable):
        await meter(service).look(["ann"])
