"""Freshness is measured: fresh, missing and stale tie out, and a value on its way out is no fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import timedelta

import pytest

import app.profiles.freshness as module
from app.features.clock import DAY_MS
from app.profiles.codec import Value, encode
from app.profiles.freshness import FreshnessMeter, distribution, percentiles
from app.profiles.ports import Cell
from app.stores.sqlite.users import SqliteUsers
from app.stores.valkey.cache import key
from tests.profiles.world import World
from tests.support.clock import NOW_MS
from tests.support.entries import entry
from tests.support.events import feedback, served
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


async def test_figures_tie_out_when_values_are_fresh_missing_and_stale(
    service: Service, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 2)
    await service.send(*(served(user) for user in ("ann", "bob", "cyd", "dee")), served("old", NOW_MS - 31 * DAY_MS))
    await service.send(feedback("ann"))
    await service.batch(["ann", "bob", "old"])
    await service.drain()
    await put(service, world, "cyd", "tip_volume_30d", seq=1)
    await put(service, world, "dee", "tip_volume_30d", seq=99, fingerprint=b"another")
    report = await meter(service).measure()
    assert (report.eligible, report.measured) == (4, True)
    for figures in report.features.values():
        assert figures.eligible == figures.fresh + figures.missing + figures.stale == 4
        assert len(figures.ages_ms) == figures.fresh + figures.stale == sum(figures.values.values())
    volume = report.features["tip_volume_30d"]
    assert (volume.fresh, volume.missing, volume.stale) == (2, 1, 1)
    rate = report.features["completion_rate_30d"]
    assert (rate.fresh, rate.missing, rate.stale) == (2, 2, 0)
    assert rate.values == {1.0: 1, None: 1}


async def test_only_events_of_its_subjects_make_a_value_stale(service: Service, world: World) -> None:
    await service.send(served("ann"))  # 1: of no interest to a rate of feedback
    await put(service, world, "ann", "completion_rate_30d", seq=0)
    assert (await meter(service).measure()).features["completion_rate_30d"].stale == 0
    await service.send(feedback("ann"))  # 2: its DEL takes the value away
    await put(service, world, "ann", "completion_rate_30d", seq=1)
    assert (await meter(service).measure()).features["completion_rate_30d"].stale == 1


async def test_a_value_is_no_fault_when_it_goes_before_the_second_look(service: Service, world: World) -> None:
    await service.send(served("ann"))
    await put(service, world, "ann", "tip_volume_30d", seq=0)

    async def drop(_: float) -> None:
        await service.cache.inner.drop([Cell("ann", "tip_volume_30d")])

    figures = (await meter(service, drop).measure()).features["tip_volume_30d"]
    assert (figures.stale, figures.missing) == (0, 1)


async def test_nothing_is_claimed_when_the_cache_goes_away(fragile_world: World) -> None:
    service = await fragile_world.open()
    await service.send(served("ann"), served("bob"))
    await service.batch(["ann", "bob"])
    await service.drain()
    fragile_world.server.kill()
    report = await meter(service).measure()
    assert (report.eligible, report.measured) == (2, False)


def test_percentiles_are_of_the_nearest_rank() -> None:
    assert percentiles([], (0.5, 1.0)) == [None, None]
    assert percentiles([7], (0.0, 0.5, 1.0)) == [7, 7, 7]
    assert percentiles(list(range(1, 101)), (0.5, 0.9, 0.99, 1.0)) == [51, 91, 100, 100]


def test_a_distribution_counts_each_value_when_they_are_few_or_text() -> None:
    integers = entry(dtype="int")
    assert distribution(integers, Counter({3: 2, 1: 5, None: 9})) == [
        {"value": 1, "count": 5},
        {"value": 3, "count": 2},
    ]
    texts = entry(dtype="str", ttl=timedelta(hours=1))
    assert distribution(texts, Counter({"b": 1, "a": 2})) == [{"value": "a", "count": 2}, {"value": "b", "count": 1}]
    assert distribution(integers, Counter({None: 4})) == []


def test_a_distribution_has_ten_bins_when_values_are_many() -> None:
    bins = distribution(entry(dtype="float"), Counter({float(number): 1 for number in range(101)}))
    assert [part["count"] for part in bins] == [10, 10, 10, 10, 10, 10, 10, 10, 10, 11]
    assert (bins[0]["from"], bins[-1]["to"]) == (0.0, 100.0)
    assert sum(part["count"] for part in distribution(entry(dtype="int"), Counter(range(1_000)))) == 1_000  # type: ignore[misc]  # counts
    assert distribution(entry(dtype="float"), Counter({0.5: 3}))[0]["count"] == 3
