"""Runs of rebuilds: piece by piece, on from where they were, cancelled, and one of a scope at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import NamedTuple
from unittest.mock import AsyncMock

import pytest

import app.profiles.rebuild as module
from app.errors import CacheUnavailable, StoreUnavailable
from app.features.clock import DAY_MS
from app.profiles.online.cache_protocol import decode
from app.profiles.ports import Cell
from app.profiles.rebuild import KEPT, RebuildRepository, RebuildRun, RebuildRunner, scope_of
from tests.support.clock import NOW_MS
from tests.support.events import served
from tests.support.registry import REGISTRY
from tests.support.servers import ask
from tests.support.service import PausableService
from tests.support.service_group import ServiceGroup

pytestmark = pytest.mark.both_engines

FOR_EVER = 1e9


class RunsFixture(NamedTuple):
    """A service, its repository of runs, and the runner."""

    service: PausableService
    book: RebuildRepository
    runner: RebuildRunner

    async def eligible(self, count: int) -> list[str]:
        """So many users with an event, ids in order."""
        users = [f"user-{number:03d}" for number in range(count)]
        await self.service.send(*(served(user) for user in users))
        return users

    async def opened(
        self, run_id: str = "run", users: Sequence[str] | None = None, features: Sequence[str] = REGISTRY.names
    ) -> RebuildRun | None:
        """Ask for a run; None, or the active one of that scope."""
        run = RebuildRun(
            id=run_id,
            scope=scope_of(users),
            user_ids=list(users) if users is not None else None,
            features=list(features),
            state="queued",
            done=0,
            total=await self.runner.total(users, REGISTRY.full_mask),
            position="",
            requested_by="ann",
            created_at_ms=NOW_MS,
            started_at_ms=None,
            touched_at_ms=NOW_MS,
            finished_at_ms=None,
            error=None,
        )
        return await self.book.open(run)

    async def look(self, run_id: str = "run") -> RebuildRun:
        run = await self.book.get(run_id)
        assert run is not None
        return run

    async def live(self, users: Collection[str]) -> set[str]:
        """Those of the users of whom every feature is cached."""
        held = await self.service.held(*users)
        missing = {cell.user_id for cell, raw in held.items() if decode(raw) is None}
        return set(users) - missing

    async def values(self, users: Collection[str]) -> dict[Cell, bytes | None]:
        """The cached values as JSON."""
        held = {cell: decode(raw) for cell, raw in (await self.service.held(*users)).items()}
        return {cell: value.json if value is not None else None for cell, value in held.items()}


@pytest.fixture
async def fixture(service: PausableService) -> RunsFixture:
    return RunsFixture(service, service.inner.rebuild_runs, service.inner.rebuild_runner)


async def test_all_eligible_users_are_rebuilt(fixture: RunsFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 4)
    users = await fixture.eligible(10)
    await fixture.service.send(served("long ago", NOW_MS - 31 * DAY_MS))
    assert await fixture.opened() is None
    assert await fixture.runner.run("run", FOR_EVER) is True
    run = await fixture.look()
    assert (run.state, run.done, run.total, run.error) == ("completed", 10, 10, None)
    assert run.finished_at_ms == fixture.service.clock.now_ms()
    assert await fixture.live(users) == set(users)
    assert await fixture.live(["long ago"]) == set()


async def test_only_listed_users_are_rebuilt(fixture: RunsFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 2)
    users = await fixture.eligible(6)
    await fixture.opened(users=[*users[3:], "never heard of"], features=["tip_volume_30d"])
    assert await fixture.runner.run("run", FOR_EVER) is True
    run = await fixture.look()
    assert (run.state, run.done, run.total) == ("completed", 4, 4)
    held = await fixture.service.held(*users, "never heard of")
    live = {(cell.user_id, cell.feature) for cell, raw in held.items() if decode(raw) is not None}
    assert live == {(user, "tip_volume_30d") for user in [*users[3:], "never heard of"]}


async def test_run_continues_where_another_worker_stopped(
    fixture: RunsFixture, group: ServiceGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 3)
    users = await fixture.eligible(8)
    await fixture.opened()
    assert await fixture.runner.run("run", -1) is False  # a piece, and no time for more
    run = await fixture.look()
    assert (run.state, run.done, run.position) == ("running", 3, users[7]), "one part, and three of its users"
    assert await fixture.live(users) == set(users[:3])

    other = await group.open()
    assert await other.inner.rebuild_runner.run("run", FOR_EVER) is True
    assert (await fixture.look()).done == 8
    computed = [user for statement in other.source.statements for user, *_ in statement]
    assert computed == users[3:]


async def test_values_equal_those_of_one_worker_when_a_worker_is_killed(
    fixture: RunsFixture, group: ServiceGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 2)
    monkeypatch.setattr(module, "PART", 4)
    users = await fixture.eligible(10)
    await fixture.opened()
    fixture.service.source.before.stop()
    killed = await group.started(fixture.runner.run("run", FOR_EVER))
    await fixture.service.source.before.reached()
    monkeypatch.setattr(type(fixture.book), "release", AsyncMock())  # it dies before it can release its part
    killed.cancel()
    others = [await group.open(), await group.open()]
    await asyncio.gather(*(other.inner.rebuild_runner.run("run", FOR_EVER) for other in others))
    assert ((await fixture.look()).state, (await fixture.look()).done) == ("running", 6)
    group.clock.advance(module.STALE_MS + 1)
    assert await others[0].inner.rebuild_runner.run("run", FOR_EVER) is True
    assert ((await fixture.look()).state, (await fixture.look()).done) == ("completed", 10)
    shared = await fixture.values(users)
    fixture.service.go()
    await fixture.service.rebuild(*users)
    assert await fixture.values(users) == shared


async def test_cancelled_run_stops_at_the_next_piece(fixture: RunsFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 3)
    users = await fixture.eligible(9)
    await fixture.opened()
    await fixture.runner.run("run", -1)
    assert await fixture.book.finish("run", "cancelled", NOW_MS + 5, None) is True
    assert await fixture.runner.run("run", FOR_EVER) is True
    run = await fixture.look()
    assert (run.state, run.done, run.finished_at_ms) == ("cancelled", 3, NOW_MS + 5)
    assert await fixture.live(users) == set(users[:3])
    assert await fixture.book.finish("run", "cancelled", NOW_MS, None) is False


async def test_run_stays_cancelled_during_its_last_piece(fixture: RunsFixture, group: ServiceGroup) -> None:
    await fixture.eligible(2)
    await fixture.opened()
    fixture.service.source.before.stop()
    running = await group.started(fixture.runner.run("run", FOR_EVER))
    await fixture.service.source.before.reached()
    await fixture.book.finish("run", "cancelled", NOW_MS, None)
    fixture.service.go()
    assert await running is True
    run = await fixture.look()
    assert (run.state, run.done) == ("cancelled", 0)


async def test_run_is_refused_when_its_scope_is_active(fixture: RunsFixture) -> None:
    await fixture.eligible(1)
    assert await fixture.opened("first") is None
    active = await fixture.opened("second")
    assert active is not None
    assert active.id == "first"
    assert await fixture.opened("third", users=["b", "a"]) is None
    assert await fixture.opened("fourth", users=["a", "b"]) is not None
    assert await fixture.opened("fifth", users=["a"]) is None
    await fixture.runner.run("first", FOR_EVER)
    assert await fixture.opened("second") is None


async def test_nothing_is_done_when_there_is_no_such_run(fixture: RunsFixture) -> None:
    assert await fixture.runner.run("no such run", FOR_EVER) is True


async def test_run_fails_when_this_release_knows_none_of_its_features(fixture: RunsFixture) -> None:
    await fixture.eligible(1)
    await fixture.opened(features=["of_another_release"])
    assert await fixture.runner.run("run", FOR_EVER) is True
    run = await fixture.look()
    assert (run.state, run.error) == ("failed", "this release knows none of of_another_release")


async def test_error_of_a_run_names_features_that_were_not_computed(
    fixture: RunsFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 2)
    await fixture.eligible(4)
    await fixture.opened()
    await fixture.service.switch("preferred_hour", on=False)
    assert await fixture.runner.run("run", -1) is False
    await fixture.service.switch("preferred_hour", on=True)
    assert await fixture.runner.run("run", FOR_EVER) is True
    run = await fixture.look()
    assert (run.state, run.done) == ("completed", 4)
    assert (run.error or "").startswith("preferred_hour was not computed for some users: disabled by ada")


async def test_error_of_a_run_says_when_values_were_not_stored(
    fragile_world: ServiceGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = await fragile_world.open()
    fixture = RunsFixture(service, service.inner.rebuild_runs, service.inner.rebuild_runner)
    await fixture.eligible(2)
    await fixture.opened()
    ask(fragile_world.server, "CONFIG", "SET", "maxmemory-policy", "noeviction")
    ask(fragile_world.server, "CONFIG", "SET", "maxmemory", 1)
    assert await fixture.runner.run("run", FOR_EVER) is True
    run = await fixture.look()
    assert (run.state, run.done) == ("completed", 2)
    assert run.error == "the cache did not store some values, so reads compute them"


async def test_run_is_retried_when_the_cache_is_unreachable(
    fixture: RunsFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fixture.eligible(3)
    await fixture.opened()
    with monkeypatch.context() as patch:
        patch.setattr(type(fixture.service.cache), "available", False)
        with pytest.raises(CacheUnavailable):
            await fixture.runner.run("run", FOR_EVER)
    assert ((await fixture.look()).state, (await fixture.look()).done) == ("running", 0)
    assert await fixture.runner.run("run", FOR_EVER) is True
    assert (await fixture.look()).state == "completed"


async def test_run_is_retried_when_the_database_fails(fixture: RunsFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    await fixture.eligible(3)
    await fixture.opened()

    async def locked(*_: object) -> None:
        raise StoreUnavailable("locked")

    with monkeypatch.context() as patch:
        patch.setattr(fixture.service.source, "compute", locked)
        with pytest.raises(StoreUnavailable):
            await fixture.runner.run("run", FOR_EVER)
    assert await fixture.runner.run("run", FOR_EVER) is True
    assert (await fixture.look()).done == 3


async def test_open_runs_are_found(fixture: RunsFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 1)
    await fixture.eligible(2)
    await fixture.opened("queued")
    await fixture.opened("ended", users=["a"])
    await fixture.runner.run("ended", FOR_EVER)
    await fixture.opened("running", users=["a", "b"])
    assert not await fixture.runner.run("running", -1)
    assert await fixture.book.active() == ["queued", "running"]


async def test_last_ended_runs_and_every_active_run_are_kept(fixture: RunsFixture) -> None:
    await fixture.opened("active")
    for number in range(KEPT + 5):
        await fixture.opened(f"run-{number}", users=["ann"])
        assert await fixture.book.finish(f"run-{number}", "completed", NOW_MS + number, None)
    kept = {run.id for run in await fixture.book.newest(2 * KEPT)}
    assert kept == {"active", *(f"run-{number}" for number in range(5, KEPT + 5))}
