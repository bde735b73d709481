"""Thirty days of a user: a point a day, as the SQL that serves them gives it, and none over half a window."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest

from app.features.clock import DAY_MS
from app.features.registry import Registry
from app.profiles.history import DAYS, Moments
from tests.support.clock import NOW_MS
from tests.support.entries import entry
from tests.support.events import served
from tests.support.service import PausableService

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
