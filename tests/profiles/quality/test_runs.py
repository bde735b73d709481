"""Runs of the survey: one at a time, on from where they were, and the last few reports kept."""

from __future__ import annotations

import pytest

import app.profiles.quality.scan as survey_module
from app.features.registry import Registry
from app.profiles.quality import runs
from app.profiles.quality.report import QualityReport
from app.profiles.quality.runs import FORGOTTEN_MS, KEPT, QualityRun, readable_report
from tests.profiles.quality.office import Office
from tests.profiles.world import World
from tests.support.clock import NOW_MS
from tests.support.events import served
from tests.support.registry import REGISTRY
from tests.support.service import Service

FOR_EVER = 1e9


@pytest.fixture
async def office(service: Service, monkeypatch: pytest.MonkeyPatch) -> Office:
    monkeypatch.setattr(survey_module, "PAGE", 3)
    await service.send(*(served(f"user-{number}") for number in range(8)))
    return Office(service)


async def look(office: Office, run_id: int) -> QualityRun:
    """How a run is."""
    run = await office.book.get(run_id)
    assert run is not None
    return run


def report_of(run: QualityRun) -> QualityReport:
    """What it found."""
    found = readable_report(run)
    assert found is not None
    return found


async def test_a_run_leaves_a_report(office: Office) -> None:
    run, new = await office.book.open("ann", NOW_MS)
    assert (run.state, run.requested_by, run.total, new) == ("queued", "ann", None, True)
    assert await office.runner.run(run.id, FOR_EVER) is True
    ended = await look(office, run.id)
    assert (ended.state, ended.done, ended.total, ended.error) == ("completed", 8, 8, None)
    found = report_of(ended)
    assert (found.eligible, found.features["tip_volume_30d"].missing) == (8, 8)
    assert await office.book.newest_completed() == ended
    assert await office.runner.run(run.id, FOR_EVER) is True  # it has ended


async def test_a_run_goes_on_where_it_was_when_somebody_else_takes_it_up(office: Office) -> None:
    run, _ = await office.book.open("ann", NOW_MS)
    assert await office.runner.run(run.id, -1) is False  # a page, and no time for more
    assert ((await look(office, run.id)).state, (await look(office, run.id)).done) == ("running", 3)
    office.service.source.statements.clear()
    assert await Office(office.service).runner.run(run.id, FOR_EVER) is True
    computed = [user for statement in office.service.source.statements for user, *_ in statement]
    assert computed == [f"user-{number}" for number in range(3, 8)]
    assert report_of(await look(office, run.id)).eligible == 8


async def test_a_run_begins_anew_when_it_was_forgotten(office: Office) -> None:
    run, _ = await office.book.open("ann", NOW_MS)
    await office.runner.run(run.id, -1)
    office.service.clock.advance(FORGOTTEN_MS + 1)
    await office.runner.run(run.id, FOR_EVER)
    found = report_of(await look(office, run.id))
    assert (found.eligible, found.measured_at_ms) == (8, NOW_MS + FORGOTTEN_MS + 1)


async def test_a_run_begins_anew_when_another_release_takes_it_up(office: Office, world: World) -> None:
    run, _ = await office.book.open("ann", NOW_MS)
    await office.runner.run(run.id, -1)
    other = await world.open(Registry(list(REGISTRY)[:2]))
    await Office(other).runner.run(run.id, FOR_EVER)
    found = report_of(await look(office, run.id))
    assert (found.eligible, list(found.features)) == (8, list(REGISTRY.names[:2]))


async def test_one_run_is_active_at_a_time(office: Office) -> None:
    first, _ = await office.book.open("ann", NOW_MS)
    again, new = await office.book.open("bob", NOW_MS + 1)
    assert (again, new) == (first, False)
    await office.runner.run(first.id, FOR_EVER)
    second, new = await office.book.open("bob", NOW_MS + 2)
    assert (second.id > first.id, new) == (True, True)


async def test_progress_is_told_while_a_run_goes_on(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "TELL_EVERY_S", -1)
    run, _ = await office.book.open("ann", NOW_MS)
    seen: list[tuple[int, int | None]] = []

    async def rest(_: float) -> None:
        now = await look(office, run.id)
        seen.append((now.done, now.total))

    monkeypatch.setattr(office.surveyor, "_pause", rest)
    await office.runner.run(run.id, FOR_EVER)
    assert seen == [(3, 8), (6, 8), (8, 8)]


async def test_a_run_stops_when_it_was_ended_meanwhile(office: Office) -> None:
    run, _ = await office.book.open("ann", NOW_MS)
    await office.runner.run(run.id, -1)
    assert await office.book.finish(run.id, "failed", NOW_MS, None, "given up") is True
    assert await office.runner.run(run.id, FOR_EVER) is True
    ended = await look(office, run.id)
    assert (ended.state, ended.error, ended.body) == ("failed", "given up", None)
    assert await office.book.finish(run.id, "completed", NOW_MS, "{}", None) is False


async def test_only_the_last_reports_are_kept_and_always_the_newest_good_one(office: Office) -> None:
    good, _ = await office.book.open("ann", NOW_MS)
    await office.runner.run(good.id, FOR_EVER)
    for _ in range(KEPT + 5):
        run, _ = await office.book.open("ann", NOW_MS)
        await office.book.finish(run.id, "failed", NOW_MS, None, "no")
    kept = await office.book.newest(100)
    assert len(kept) == KEPT + 1
    assert kept[-1].id == good.id
    assert all(run.body is None for run in kept)
    newest = await office.book.newest_completed()
    assert newest is not None
    assert newest.id == good.id


async def test_active_runs_are_found_when_nobody_touched_them(office: Office) -> None:
    run, _ = await office.book.open("ann", NOW_MS)
    assert await office.book.untouched(NOW_MS, NOW_MS) == []
    assert await office.book.untouched(NOW_MS + 1, NOW_MS + 1) == [run.id]
    assert await office.book.untouched(NOW_MS - 2, NOW_MS - 1) == [run.id], "the clock was set back"
    await office.runner.run(run.id, FOR_EVER)
    assert await office.book.untouched(NOW_MS + 1_000_000, NOW_MS + 1_000_000) == []


async def test_a_report_is_none_when_another_release_wrote_it(office: Office) -> None:
    run, _ = await office.book.open("ann", NOW_MS)
    await office.book.finish(run.id, "completed", NOW_MS, '{"of": "another release"}', None)
    assert readable_report(await look(office, run.id)) is None
