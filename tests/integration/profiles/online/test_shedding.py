"""Overload: a read that would wait too long is shed at once, an admitted read is answered, hits are unaffected."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from app.concurrency.overload import AT_ONCE, OverloadQueue
from app.errors import Overloaded
from app.profiles.online import compute as module
from app.profiles.online.cache_protocol import Profile
from app.profiles.online.compute import CAP, MOMENTS_ALWAYS
from app.profiles.online.request_batching import GROUP_CAP
from app.profiles.ports import ComputeRow
from tests.support.clock import NOW_MS
from tests.support.events import served
from tests.support.service import NEAR_AFTER, READERS, PausableService
from tests.support.service_group import ServiceGroup
from tests.support.waiting import eventually

SLOW_S = 5  # what a statement takes where a test says that it is slow


async def overwhelmed(service: PausableService, group: ServiceGroup) -> list[asyncio.Task[dict[str, Profile]]]:
    """Statements are slow, and so many users wait for one that another one would wait too long."""
    slow = await group.stopped_at(service.source.before, service.features("first"))
    service.clock.advance(SLOW_S * 1000)
    service.source.before.go()
    await slow
    await service.drain()
    service.source.before.stop()
    waiting: list[asyncio.Task[dict[str, Profile]]] = []
    begun = len(service.source.statements)
    for number in range(READERS + 1):  # a statement for each reader, and one that has not begun
        users = {f"waits {number} {user}": service.registry.full_mask for user in range(CAP)}
        waiting.append(await group.started(service.reader.read(users)))
        if number < READERS:
            await eventually(partial(_begun, service, begun + number + 1))
    await eventually(lambda: service.computation.overloaded)
    return waiting


def _begun(service: PausableService, statements: int) -> bool:
    return len(service.source.statements) == statements


async def test_cold_read_is_shed_and_hit_answered_under_overload(service: PausableService, group: ServiceGroup) -> None:
    await service.send(served("ann"))
    expected = await service.features("ann")
    await service.drain()
    waiting = await overwhelmed(service, group)
    statements, misses = len(service.source.statements), service.counted("cache_misses")

    with pytest.raises(Overloaded) as caught:
        await service.features("cold")
    assert caught.value.kind == "reads"
    hit, cold = await asyncio.gather(service.features("ann"), service.features("cold"), return_exceptions=True)
    assert hit == expected
    assert isinstance(cold, Overloaded), "it shared the group of the hit"
    assert len(service.source.statements) == statements
    assert service.counted("cache_misses") == misses, "what was not looked up any further was not missed"

    service.go()
    assert all(isinstance(answer, dict) for answer in await asyncio.gather(*waiting))
    assert (await service.features("cold"))["tip_volume_30d"] == 0, "when nobody waits any more"


async def test_read_is_shed_when_the_cache_is_unreachable(
    service: PausableService, group: ServiceGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = await overwhelmed(service, group)
    monkeypatch.setattr(type(service.cache), "available", property(lambda _: False))
    degraded = service.counted("degraded_reads", reason="unavailable")
    with pytest.raises(Overloaded):
        await service.features("cold")
    assert service.counted("degraded_reads", reason="unavailable") == degraded
    monkeypatch.undo()
    service.go()
    await asyncio.gather(*waiting)


async def test_admitted_batch_is_finished_under_overload(
    service: PausableService, group: ServiceGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = [f"batch {number}" for number in range(2 * GROUP_CAP)]
    first = await group.stopped_at(service.source.before, service.batch(users))
    monkeypatch.setattr(type(service.computation), "overloaded", property(lambda _: True))
    service.source.before.go()
    assert len(await first) == len(users)
    with pytest.raises(Overloaded):
        await service.batch(["another"])


class Late(OverloadQueue):
    asked: int = 0

    async def wait(self) -> bool:
        self.asked += 1
        return False


async def test_local_hit_skips_theoverload_queue(service: PausableService, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(NEAR_AFTER):
        await service.plain("near")
        await service.drain()
    await service.features("held by the cache")
    await service.drain()
    late = Late(1.0)
    monkeypatch.setattr(service.reader, "overload_queue", late)
    monkeypatch.setattr(type(service.computation), "overloaded", property(lambda _: True))
    assert (await service.plain("near"))["tip_volume_30d"] == 0
    assert late.asked == 0
    hits = service.counted("cache_hits")
    for read in (service.plain, service.features):
        with pytest.raises(Overloaded):
            await read("held by the cache")
    assert (late.asked, service.counted("cache_hits")) == (2, hits)


async def test_patient_request_skips_theoverload_queue(
    service: PausableService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.reader, "overload_queue", Late(1.0))
    monkeypatch.setattr(type(service.computation), "overloaded", property(lambda _: True))
    profiles = await service.reader.read({"cold": service.registry.full_mask}, patient=True)
    assert service.decoded(profiles["cold"])["tip_volume_30d"] == 0


async def test_waiting_request_is_answered_when_the_reader_closes(
    service: PausableService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(service.computation), "overloaded", property(lambda _: True))
    never = asyncio.Event()

    async def pause(seconds: float) -> None:
        await (never.wait() if seconds else asyncio.sleep(0))

    monkeypatch.setattr(service.reader, "overload_queue", OverloadQueue(1.0, pause=pause))
    reads = [asyncio.create_task(service.features(f"cold {number}")) for number in range(AT_ONCE + 1)]
    await eventually(lambda: sum(read.done() for read in reads) == AT_ONCE)
    await service.reader.close()
    answers = await asyncio.gather(*reads, return_exceptions=True)
    assert all(isinstance(answer, Overloaded) for answer in answers)


async def test_waiting_read_is_answered_when_there_is_room(
    service: PausableService, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Relief(OverloadQueue):
        async def wait(self) -> bool:
            monkeypatch.undo()
            return await super().wait()

    monkeypatch.setattr(service.reader, "overload_queue", Relief(1.0))
    monkeypatch.setattr(type(service.computation), "overloaded", property(lambda _: True))
    assert (await service.features("cold"))["tip_volume_30d"] == 0


async def test_rebuild_is_not_shed(service: PausableService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(service.computation), "overloaded", property(lambda _: True))
    assert (await service.rebuild("ann"))["ann"]["tip_volume_30d"] == 0


@pytest.mark.slow
async def test_past_reads_are_shed_and_leave_a_reader_free(service: PausableService, group: ServiceGroup) -> None:
    mask = service.registry.full_mask
    rows = [ComputeRow("ann", mask, NOW_MS, None)] * CAP * (MOMENTS_ALWAYS + 1)
    first = await group.stopped_at(service.source.before, service.reader.read_as_of(rows[:CAP]))
    service.clock.advance(int(1000 * module.MOMENTS_PATIENCE_S))
    service.source.before.go()
    await first

    held = await group.stopped_at(service.source.before, service.reader.read_as_of(rows))
    second = await group.started(service.reader.read_as_of(rows[:1]))
    assert not service.computation.history_overloaded(), "a small one waits for one slice of each"
    with pytest.raises(Overloaded) as caught:
        await service.reader.read_as_of(rows)
    assert caught.value.kind == "history"
    begun = len(service.source.statements)
    live = await group.started(service.features("cold"))
    await eventually(lambda: len(service.source.statements) == begun + 1)
    assert [asked.user_id for asked in service.source.statements[-1]] == ["cold"]

    service.go()
    assert len(await held) == len(rows)
    assert len(await second) == 1
    await live
    assert not service.computation.history_overloaded()
