"""Runs: one at a time, each a report, and the last few kept."""

from __future__ import annotations

import asyncio

import pytest

from app.errors import StoreUnavailable
from app.profiles.quality.report import KEPT, STALE_MS, QualityRun, readable_report
from tests.integration.profiles.quality.fixture import QualityFixture
from tests.support.clock import NOW_MS
from tests.support.events import served
from tests.support.service import PausableService

pytestmark = pytest.mark.both_engines

AMPLE_S = 60


@pytest.fixture
async def fixture(service: PausableService) -> QualityFixture:
    await service.send(*(served(f"user-{number}") for number in range(8)))
    return QualityFixture(service)


async def newest(fixture: QualityFixture) -> QualityRun:
    return (await fixture.runs.newest(1))[0]


async def test_run_leaves_a_report(fixture: QualityFixture) -> None:
    run, new = await fixture.runs.open("ann", NOW_MS)
    assert (run.state, run.requested_by, run.measured, new) == ("queued", "ann", 0, True)
    await fixture.quality.carry_out(run.id, AMPLE_S)
    ended = await fixture.runs.newest_completed()
    assert ended is not None
    assert (ended.id, ended.state, ended.measured, ended.error) == (run.id, "completed", 8, None)
    found = readable_report(ended)
    assert found is not None
    assert (found.eligible, found.features["tip_volume_30d"].missing) == (8, 8)
    fixture.service.source.statements.clear()
    await fixture.quality.carry_out(run.id, AMPLE_S)  # it has ended
    assert fixture.service.source.statements == []


async def test_run_starts_over_after_a_crash(fixture: QualityFixture) -> None:
    run, _ = await fixture.runs.open("ann", NOW_MS)
    assert await fixture.runs.begin(run.id, NOW_MS)
    assert (await newest(fixture)).state == "running"
    fixture.service.clock.advance(STALE_MS + 1)
    await fixture.quality.carry_out(run.id, AMPLE_S)
    ended = await newest(fixture)
    assert (ended.state, ended.started_at_ms, ended.measured) == ("completed", NOW_MS + STALE_MS + 1, 8)


async def test_run_is_measured_by_one_worker(fixture: QualityFixture) -> None:
    run, _ = await fixture.runs.open("ann", NOW_MS)
    assert await fixture.runs.begin(run.id, NOW_MS)
    for now_ms in (NOW_MS - STALE_MS, NOW_MS, NOW_MS + STALE_MS):
        assert not await fixture.runs.begin(run.id, now_ms)
    await fixture.quality.carry_out(run.id, AMPLE_S)
    assert fixture.service.source.statements == []
    assert await fixture.runs.begin(run.id, NOW_MS - STALE_MS - 1), "the clock was set back"


async def test_run_is_measured_again_at_once_after_an_error(
    fixture: QualityFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = await fixture.runs.open("ann", NOW_MS)

    async def fail(*_: object) -> None:
        raise StoreUnavailable("locked")

    with monkeypatch.context() as patch:
        patch.setattr(fixture.service.source, "compute", fail)
        with pytest.raises(StoreUnavailable):
            await fixture.quality.carry_out(run.id, AMPLE_S)
    assert (await newest(fixture)).state == "queued"
    await fixture.quality.carry_out(run.id, AMPLE_S)
    assert (await newest(fixture)).state == "completed"


async def test_cancelled_run_stays_cancelled_when_the_database_is_away(
    fixture: QualityFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = await fixture.runs.open("ann", NOW_MS)

    async def fail(*_: object) -> None:
        raise StoreUnavailable("locked")

    monkeypatch.setattr(fixture.runs, "release", fail)
    fixture.service.source.before.stop()
    measuring = asyncio.create_task(fixture.quality.carry_out(run.id, AMPLE_S))
    await fixture.service.source.before.reached()
    measuring.cancel()
    with pytest.raises(asyncio.CancelledError):
        await measuring


async def test_run_fails_when_the_draw_takes_too_long(fixture: QualityFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    eligible = fixture.users.eligible

    async def slow(*asked: object) -> object:
        fixture.service.clock.advance(1_000)
        return await eligible(*asked)  # type: ignore[arg-type]

    monkeypatch.setattr(fixture.users, "eligible", slow)
    run, _ = await fixture.runs.open("ann", NOW_MS)
    await fixture.quality.carry_out(run.id, 0.5)
    ended = await newest(fixture)
    assert (ended.state, ended.measured) == ("failed", 0)
    assert "8" in str(ended.error)
    assert fixture.service.source.statements == []
    _, new = await fixture.runs.open("bob", NOW_MS)
    assert new


async def test_one_run_is_active_at_a_time(fixture: QualityFixture) -> None:
    first, _ = await fixture.runs.open("ann", NOW_MS)
    again, new = await fixture.runs.open("bob", NOW_MS + 1)
    assert (again, new) == (first, False)
    await fixture.quality.carry_out(first.id, AMPLE_S)
    second, new = await fixture.runs.open("bob", NOW_MS + 2)
    assert (second.id > first.id, new) == (True, True)


async def test_ended_run_is_not_measured(fixture: QualityFixture) -> None:
    run, _ = await fixture.runs.open("ann", NOW_MS)
    assert await fixture.runs.finish(run.id, "failed", NOW_MS, error="given up") is True
    await fixture.quality.carry_out(run.id, AMPLE_S)
    ended = await newest(fixture)
    assert (ended.state, ended.error) == ("failed", "given up")
    assert await fixture.runs.finish(run.id, "completed", NOW_MS, body="{}") is False


async def test_last_reports_and_newest_good_one_are_kept(fixture: QualityFixture) -> None:
    good, _ = await fixture.runs.open("ann", NOW_MS)
    await fixture.quality.carry_out(good.id, AMPLE_S)
    for _ in range(KEPT + 5):
        run, _ = await fixture.runs.open("ann", NOW_MS)
        await fixture.runs.finish(run.id, "failed", NOW_MS, error="no")
    kept = await fixture.runs.newest(100)
    assert len(kept) == KEPT + 1
    assert kept[-1].id == good.id
    assert all(run.body is None for run in kept)
    completed = await fixture.runs.newest_completed()
    assert completed is not None
    assert completed.id == good.id


async def test_report_of_another_release_is_none(fixture: QualityFixture) -> None:
    run, _ = await fixture.runs.open("ann", NOW_MS)
    await fixture.runs.finish(run.id, "completed", NOW_MS, body='{"of": "another release"}')
    completed = await fixture.runs.newest_completed()
    assert completed is not None
    assert readable_report(completed) is None
