"""One measurement for all who ask at a time, and never one that began before they asked."""

from __future__ import annotations

import asyncio

import pytest

from app.errors import StoreUnavailable
from tests.profiles.quality.office import Office
from tests.profiles.world import World
from tests.support.events import served
from tests.support.service import Service


@pytest.fixture
def office(service: Service) -> Office:
    return Office(service)


async def test_callers_share_one_when_they_ask_together(office: Office) -> None:
    await office.service.send(served("ann"))
    found = await asyncio.gather(*(office.measurement.measure() for _ in range(5)))
    assert len({id(report) for report in found}) == 1
    assert len(office.service.source.statements) == 1


async def test_who_comes_later_is_not_answered_by_what_began_before(office: Office, world: World) -> None:
    service = office.service
    await service.send(served("ann"))
    first = await world.stopped_at(service.source.after, office.measurement.measure())
    await service.send(served("abe"))  # whom the walk has passed already
    later = [await world.started(office.measurement.measure()) for _ in range(3)]
    service.go()
    assert (await first).eligible == 1
    found = await asyncio.gather(*later)
    assert [report.eligible for report in found] == [2, 2, 2]
    assert len({id(report) for report in found}) == 1


async def test_the_others_are_answered_when_one_goes_away(office: Office, world: World) -> None:
    service = office.service
    await service.send(served("ann"))
    gone = await world.stopped_at(service.source.after, office.measurement.measure())
    stays = await world.started(office.measurement.measure())
    gone.cancel()
    service.go()
    assert (await stays).eligible == 1


async def test_the_next_is_measured_when_one_fails(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    await office.service.send(served("ann"))

    async def locked(*_: object) -> None:
        raise StoreUnavailable("locked")

    with monkeypatch.context() as patch:
        patch.setattr(office.service.source, "compute", locked)
        with pytest.raises(StoreUnavailable):
            await office.measurement.measure()
    assert (await office.measurement.measure()).eligible == 1


async def test_what_is_under_way_ends_when_the_process_does(office: Office, world: World) -> None:
    await office.service.send(served("ann"))
    running = await world.stopped_at(office.service.source.after, office.measurement.measure())
    await office.measurement.close()
    with pytest.raises(asyncio.CancelledError):
        await running
