"""The consistency check finds wrong values, ignores differences that are still being resolved, and repairs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from random import Random

import pytest

from app.features.clock import DAY_MS
from app.profiles.consistency import checker
from app.profiles.consistency.checker import DELAYS, LATE_S, CheckResult, ConsistencyChecker, ConsistencyMonitor
from app.profiles.online.invalidation import Stale
from app.stores.sql.users import SqlUsers
from tests.integration.profiles.consistency.test_inspection import inspector, put
from tests.support.clock import NOW_MS, no_pause
from tests.support.events import admitted, feedback, served
from tests.support.logs import Recorder
from tests.support.service import PausableService
from tests.support.service_group import ServiceGroup

pytestmark = pytest.mark.both_engines

VOLUME = "tip_volume_30d"


def auditor(service: PausableService, pause: Callable[[float], Awaitable[None]] = no_pause) -> ConsistencyChecker:

    async def drop(stale: Stale) -> None:
        await service.invalidator.invalidate(stale)
        await service.inner.clear_local_caches()

    return ConsistencyChecker(inspector=inspector(service, pause), drop=drop)


async def consumed(service: PausableService) -> None:
    log = service.inner.consumer.log
    await log.mark_consumed([item.seq for item in await log.unconsumed(2**60, 1_000)])


def outcomes(verdicts: list[CheckResult]) -> list[str]:
    """In the order asked."""
    return [verdict.outcome for verdict in verdicts]


async def test_each_user_gets_its_own_verdict(service: PausableService, group: ServiceGroup) -> None:
    await service.send(served("ann"), served("bob"), served("cleo"))
    await consumed(service)
    await service.batch(["ann", "bob"])
    await service.drain()
    await put(service, group, VOLUME, 3, b"77")
    ann, bob, cleo = await auditor(service).check(["ann", "bob", "cleo"])
    assert outcomes([ann, bob, cleo]) == ["violation", "consistent", "empty"]
    (wrong,) = ann.wrong
    assert (wrong["feature"], wrong["fault"], wrong["held"], wrong["computed"]) == (VOLUME, "unexplained", "77", "1")
    assert wrong["newest_events"] == {"signals.tip.served": 1}


async def test_stale_value_is_a_violation_after_consumption(service: PausableService, group: ServiceGroup) -> None:
    await service.send(served("ann"))
    await put(service, group, VOLUME, 0, b"0")
    assert outcomes(await auditor(service).check(["ann"])) == ["pending"]
    await consumed(service)
    (verdict,) = await auditor(service).check(["ann"])
    assert [(wrong["feature"], wrong["fault"]) for wrong in verdict.wrong] == [(VOLUME, "stale")]


async def test_stale_value_is_a_violation_when_right_by_chance(service: PausableService, group: ServiceGroup) -> None:
    await service.send(served("ann"))
    await consumed(service)
    await put(service, group, VOLUME, 0, b"1")
    assert outcomes(await auditor(service).check(["ann"])) == ["violation"]


async def test_time_alone_is_no_violation(service: PausableService) -> None:
    await service.send(served("ann", NOW_MS - 30 * DAY_MS + 60_000), served("ann"))
    await service.features("ann")
    await service.drain()
    service.clock.advance(120_000)
    assert outcomes(await auditor(service).check(["ann"])) == ["consistent"]


async def test_difference_is_no_violation_when_gone_on_recheck(service: PausableService, group: ServiceGroup) -> None:
    await service.send(served("ann"))
    await put(service, group, VOLUME, 1, b"77")

    async def drop(_: float) -> None:
        await service.invalidator.invalidate({"ann": [VOLUME]})

    assert outcomes(await auditor(service, drop).check(["ann"])) == ["empty"]


async def test_only_users_with_an_owed_invalidation_are_unchecked(
    service: PausableService, group: ServiceGroup
) -> None:
    await service.send(served("ann"))
    await put(service, group, VOLUME, 1, b"77")
    await service.owed.owe(["bob"], NOW_MS)
    service.clock.advance(1_000)
    assert outcomes(await auditor(service).check(["ann", "bob"])) == ["violation", "unchecked"]
    await service.owed.owe(["ann"], NOW_MS)
    service.clock.advance(1_000)
    assert outcomes(await auditor(service).check(["ann", "bob"])) == ["unchecked", "unchecked"]


async def test_users_are_unchecked_when_the_cache_is_unreachable(fragile_world: ServiceGroup) -> None:
    service = await fragile_world.open()
    await service.send(served("ann"))
    fragile_world.server.kill()
    assert outcomes(await auditor(service).check(["ann", "bob"])) == ["unchecked", "unchecked"]


async def test_repair_removes_cached_and_local_values(service: PausableService, group: ServiceGroup) -> None:
    await service.send(served("ann"), feedback("ann"))
    await consumed(service)
    await service.features("ann")
    await service.drain()
    await put(service, group, VOLUME, 2, b"77")
    for _ in range(4):
        assert (await service.plain("ann"))[VOLUME] == 77  # kept near by now
    audit = auditor(service)
    assert await audit.repair(await audit.check(["ann", "bob"])) == 1
    assert (await service.plain("ann"))[VOLUME] == 1
    await service.drain()
    assert outcomes(await audit.check(["ann"])) == ["consistent"]
    assert await audit.repair(await audit.check(["ann"])) == 0


# --- the running audit


def watch(service: PausableService, users_per_s: int = 5) -> ConsistencyMonitor:
    return ConsistencyMonitor(auditor(service), users_per_s, Random(1))


def checks(service: PausableService, after: str, outcome: str) -> float:
    return service.counted("consistency_checks", after=after, outcome=outcome)


async def test_user_is_checked_after_each_delay(service: PausableService) -> None:
    watching = watch(service)
    await service.send(served("old"))
    await watching.round()  # what was there before counts for nothing
    await service.send(served("ann"))
    await consumed(service)
    await service.features("ann")
    await service.drain()
    await watching.round()
    assert not any(checks(service, name, "consistent") for name, _ in DELAYS)
    moment = 0.0
    for place, (name, delay_s) in enumerate(DELAYS):
        service.clock.advance(round((delay_s - moment) * 1000) - 1)
        await watching.round()
        assert not checks(service, name, "consistent")
        service.clock.advance(1)
        await watching.round()
        assert [checks(service, other, "consistent") for other, _ in DELAYS] == [1] * (place + 1) + [0] * (2 - place)
        moment = delay_s


async def test_monitor_counts_logs_and_repairs_a_violation(
    service: PausableService, group: ServiceGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(checker, "log", recorder)
    watching = watch(service)
    await watching.round()
    await service.send(served("ann"))
    await consumed(service)
    await put(service, group, VOLUME, 1, b"77")
    await watching.round()
    service.clock.advance(1_000)
    await watching.round()
    assert checks(service, "1s", "violation") == 1
    assert service.counted("consistency_violations", feature=VOLUME, fault="unexplained") == 1
    assert service.counted("consistency_repairs") == 1
    (line,) = recorder.of("consistency_violation")
    assert (line["feature"], line["held"], line["computed"], line["held_version"]) == (VOLUME, "77", "1", 1)
    assert (line["event_seq"], line["after"], line["newest_events"]) == (1, "1s", {"signals.tip.served": 1})
    assert "ann" not in line["user"]
    assert (await service.features("ann"))[VOLUME] == 1


async def test_monitored_users_are_bounded(service: PausableService) -> None:
    watching = watch(service, users_per_s=3)
    await watching.round()
    await service.send(*(served(f"user-{number}") for number in range(300)))
    await watching.round()
    service.clock.advance(1_000)
    await watching.round()
    assert sum(checks(service, "1s", outcome) for outcome in ("empty", "consistent", "pending")) == 3


async def test_late_check_is_skipped(service: PausableService) -> None:
    watching = watch(service)
    await watching.round()
    await service.send(served("ann"))
    await watching.round()
    service.clock.advance(round(1000 * (1.0 + LATE_S)) + 1)
    await watching.round()
    assert checks(service, "1s", "unchecked") == 1


async def test_unconsumed_events_are_found_by_user(service: PausableService) -> None:
    users = SqlUsers(service.database)
    assert await users.recent(0, 1) == []
    await service.inner.consumer.log.append([[admitted(served("ann")), admitted(served("bob"))]])
    assert [item.seq for item in await users.recent(0, 1)] == [2]
    assert await users.any_unconsumed("ann", 0)
    assert not await users.any_unconsumed("ann", 1)
    await consumed(service)
    assert not await users.any_unconsumed("ann", 0)
