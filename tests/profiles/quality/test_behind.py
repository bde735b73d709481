"""The users behind a number: everyone of a state, in bounded pieces that follow on each other."""

from __future__ import annotations

import pytest

import app.profiles.quality.drilldown as module
from app.errors import UnknownFeature
from app.features.clock import DAY_MS
from app.profiles.quality.drilldown import Sought
from tests.profiles.quality.office import Office
from tests.profiles.quality.test_survey import put
from tests.profiles.world import World
from tests.support.clock import NOW_MS
from tests.support.events import served
from tests.support.service import Service

USERS = [f"user-{number:02d}" for number in range(12)]


@pytest.fixture
async def office(service: Service, world: World, monkeypatch: pytest.MonkeyPatch) -> Office:
    """Of the volume, four users are fresh, two stale and six missing; of the rate, four are null."""
    monkeypatch.setattr(module, "PAGE", 5)
    await service.send(*(served(user) for user in USERS), served("old", NOW_MS - 31 * DAY_MS))
    await service.batch(USERS[:4])
    await service.drain()
    for user in USERS[4:6]:
        await put(world, service, user, "tip_volume_30d", seq=0)
    return Office(service)


async def everyone(office: Office, feature: str, sought: Sought, limit: int) -> list[str]:
    """All pieces, one after the other."""
    found: list[str] = []
    after: str | None = ""
    while after is not None:
        piece = await office.behind.find(feature, sought, after, limit)
        assert piece.looks is not None
        assert len(piece.looks) <= limit
        found += [look.user_id for look in piece.looks]
        after = piece.next_after
    return found


@pytest.mark.parametrize("limit", [1, 3, 5, 100])
@pytest.mark.parametrize("most", [1, 7, 5_000])
async def test_everyone_of_a_state_is_found_once_whatever_the_pieces(
    office: Office, monkeypatch: pytest.MonkeyPatch, limit: int, most: int
) -> None:
    monkeypatch.setattr(module, "MOST_SCANNED", most)
    volume = "tip_volume_30d"
    assert await everyone(office, volume, "fresh", limit) == USERS[:4]
    assert await everyone(office, volume, "stale", limit) == USERS[4:6]
    assert await everyone(office, volume, "missing", limit) == USERS[6:]
    assert await everyone(office, volume, "null", limit) == []
    assert await everyone(office, "completion_rate_30d", "null", limit) == USERS[:4]


async def test_a_piece_ends_when_its_time_is_over(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = office.meter.freshness

    async def slow(*asked: object) -> object:
        office.service.clock.advance(700)
        return await inner(*asked)  # type: ignore[arg-type]

    monkeypatch.setattr(office.meter, "freshness", slow)
    piece = await office.behind.find("tip_volume_30d", "missing", "", 100)
    assert (piece.scanned, piece.next_after) == (10, USERS[9])


async def test_an_unknown_feature_is_refused(office: Office) -> None:
    with pytest.raises(UnknownFeature):
        await office.behind.find("nope", "fresh", "", 5)


async def test_nobody_is_claimed_when_the_cache_is_away(fragile_world: World) -> None:
    service = await fragile_world.open()
    await service.send(served("ann"))
    fragile_world.server.kill()
    piece = await Office(service).behind.find("tip_volume_30d", "missing", "", 5)
    assert (piece.looks, piece.next_after) == (None, None)
