"""Thirty days of a user: a point a day, as the SQL that serves them gives it, and none whose window has lost events."""

import json
from datetime import timedelta

import pytest

from app.features.clock import DAY_MS, rfc3339
from app.features.registry import Registry
from app.profiles.history import DAYS, Moments
from tests.support.clock import NOW_MS
from tests.support.entries import entry
from tests.support.events import served
from tests.support.retention import night
from tests.support.service import PausableService
from tests.support.service_group import ServiceGroup

pytestmark = pytest.mark.both_engines


async def test_each_point_is_the_value_of_that_day(service: PausableService) -> None:
    await service.send(*(served("ann", NOW_MS - ago * DAY_MS) for ago in (0, 3, 3, 29, 40)))
    rows = Moments(service.registry, 180, service.clock).timeline("ann", NOW_MS)
    assert [row.now_ms for row in rows] == [NOW_MS - ago * DAY_MS for ago in range(DAYS - 1, -1, -1)]
    volume = service.registry.names.index("tip_volume_30d")
    values = [json.loads(profile[volume].json) for profile in await service.reader.read_as_of(rows)]
    assert values == [2] * 19 + [1] * 7 + [3] * 3 + [4]
    live = await service.features("ann")
    assert values[-1] == live["tip_volume_30d"]


async def test_point_is_missing_before_kept_history(service: PausableService) -> None:
    registry = Registry([entry(name="wide", window=timedelta(days=40)), entry(name="narrow")])
    masks = [row.mask for row in Moments(registry, 60, service.clock).timeline("ann", NOW_MS)]
    assert masks == [0b10] * 9 + [0b11] * 21


async def test_moment_is_refused_when_its_events_were_deleted_under_a_shorter_retention(group: ServiceGroup) -> None:
    shorter = await group.open(retention_days=60)
    await shorter.send(*(served("ann", NOW_MS - ago * DAY_MS) for ago in (10, 50)))
    group.clock.advance(15 * DAY_MS)
    await night(shorter.inner.retention, confirmed=True)
    now_ms = group.clock.now_ms()
    longer = await group.open(retention_days=180)
    for _ in range(3):  # nights, in which the cutoff moves back
        moments = await longer.inner.moments()
        for days_ago in (31, 100):
            issue = moments.problem(now_ms - days_ago * DAY_MS, longer.registry.full_mask)
            assert issue is not None
            assert rfc3339(now_ms - 30 * DAY_MS) in issue.detail
        assert moments.problem(now_ms - 30 * DAY_MS, longer.registry.full_mask) is None
        await night(longer.inner.retention)


async def test_moment_is_allowed_when_the_shorter_retention_deleted_nothing(group: ServiceGroup) -> None:
    shorter = await group.open(retention_days=60)
    await shorter.send(served("ann"))
    await night(shorter.inner.retention)
    longer = await group.open(retention_days=180)
    moments = await longer.inner.moments()
    assert moments.problem(NOW_MS - 100 * DAY_MS, longer.registry.full_mask) is None
