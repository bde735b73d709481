"""The users behind a number: all of a state, in bounded pieces that follow on each other."""

from __future__ import annotations

import pytest

import app.profiles.quality.measurement as module
from app.errors import UnknownFeature
from app.features.clock import DAY_MS
from app.profiles.consistency.inspection import Inspector
from app.profiles.quality.measurement import Sought
from tests.integration.profiles.quality.fixture import QualityFixture
from tests.integration.profiles.quality.test_measurement import put
from tests.support.clock import NOW_MS
from tests.support.events import served
from tests.support.service import PausableService
from tests.support.service_group import ServiceGroup

pytestmark = pytest.mark.both_engines

USERS = [f"user-{number:02d}" for number in range(12)]


@pytest.fixture
async def fixture(service: PausableService, group: ServiceGroup, monkeypatch: pytest.MonkeyPatch) -> QualityFixture:
    """Of the volume, four users are fresh, two stale and six missing; of the rate, four are null."""
    monkeypatch.setattr(module, "SEARCH_PAGE", 5)
    await service.send(*(served(user) for user in USERS), served("old", NOW_MS - 31 * DAY_MS))
    await service.batch(USERS[:4])
    await service.drain()
    for user in USERS[4:6]:
        await put(group, service, user, "tip_volume_30d", seq=0)
    return QualityFixture(service)


async def found_in_pieces(fixture: QualityFixture, feature: str, sought: Sought, limit: int) -> list[str]:
    found: list[str] = []
    after: str | None = ""
    while after is not None:
        piece = await fixture.quality.find_users(feature, sought, after, limit)
        assert piece.users is not None
        assert len(piece.users) <= limit
        found += [look.user_id for look in piece.users]
        after = piece.next_after
    return found


@pytest.mark.parametrize("limit", [1, 3, 5, 100])
@pytest.mark.parametrize("most", [1, 7, 5_000])
async def test_every_user_of_a_state_is_found_once(
    fixture: QualityFixture, monkeypatch: pytest.MonkeyPatch, limit: int, most: int
) -> None:
    monkeypatch.setattr(module, "MOST_SCANNED", most)
    volume = "tip_volume_30d"
    assert await found_in_pieces(fixture, volume, "fresh", limit) == USERS[:4]
    assert await found_in_pieces(fixture, volume, "stale", limit) == USERS[4:6]
    assert await found_in_pieces(fixture, volume, "missing", limit) == USERS[6:]
    assert await found_in_pieces(fixture, volume, "null", limit) == []
    assert await found_in_pieces(fixture, "completion_rate_30d", "null", limit) == USERS[:4]


async def test_page_ends_when_its_time_is_over(fixture: QualityFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = fixture.inspector.inspect

    async def slow(*asked: object, compute: bool) -> object:
        fixture.service.clock.advance(700)
        return await inner(*asked, compute=compute)  # type: ignore[arg-type]

    monkeypatch.setattr(Inspector, "inspect", lambda _, *asked, **how: slow(*asked, **how))
    piece = await fixture.quality.find_users("tip_volume_30d", "missing", "", 100)
    assert (piece.scanned, piece.next_after) == (10, USERS[9])


async def test_unknown_feature_is_refused(fixture: QualityFixture) -> None:
    with pytest.raises(UnknownFeature):
        await fixture.quality.find_users("nope", "fresh", "", 5)


async def test_no_users_are_listed_when_the_cache_is_away(fragile_world: ServiceGroup) -> None:
    service = await fragile_world.open()
    await service.send(served("ann"))
    fragile_world.server.kill()
    piece = await QualityFixture(service).quality.find_users("tip_volume_30d", "missing", "", 5)
    assert (piece.users, piece.next_after) == (None, None)
