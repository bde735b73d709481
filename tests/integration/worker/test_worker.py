"""The worker retries after errors, loses no event, and survives any content of the queue."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import msgspec
import pytest
from arq.connections import ArqRedis
from arq.constants import in_progress_key_prefix, job_key_prefix
from arq.worker import Retry

import app.worker as module
from app.bandit.decisions import ScoringRequest
from app.bandit.model.inputs import Context
from app.bootstrap.service import OpenService, open_service
from app.concurrency.tasks import end
from app.errors import CacheUnavailable, SettingsError, StoreUnavailable
from app.events import consume
from app.features.clock import DAY_MS, SystemClock
from app.features.events import LoggedEvent
from app.profiles.quality.report import STALE_MS
from app.profiles.rebuild import RebuildRun, scope_of
from app.settings import Settings
from app.settings.parsers import PostgresUrl
from app.stores.queue import jobs as queue_jobs
from app.stores.queue import worker as queue_worker
from app.stores.queue.client import HEALTH_KEY, QUEUE
from app.stores.queue.jobs import TIP_EVENTS
from app.stores.queue.worker import ARQ_EXTRA_S
from app.stores.sql.samples import backlog
from app.stores.valkey.embedded import EmbeddedServer
from app.worker import UNEXPECTED_TRIES, JobContext, back_off, context, work
from tests.support.bandit_process import TIPS
from tests.support.database import copy_database
from tests.support.events import admitted, payload, served
from tests.support.processes import ROOT, free_port
from tests.support.proxy import proxy
from tests.support.queue import connect
from tests.support.registry import FEATURES, REGISTRY
from tests.support.retention import night
from tests.support.servers import ask
from tests.support.traffic import now_ms
from tests.support.waiting import PATIENCE_S, eventually, eventually_async

pytestmark = pytest.mark.both_engines
START_S, STOP_S = PATIENCE_S, PATIENCE_S


class FakeLearner:
    """A learner that cannot learn from the tip `poison`, and waits at the tip `gate` until it is open."""

    def __init__(self) -> None:
        self.cured = False
        self.learned: list[str] = []
        self.waiting = 0
        self.gate = asyncio.Event()

    async def learn(self, events: Sequence[LoggedEvent]) -> None:
        tips = {event.event.tip_id for event in events}
        if "poison" in tips and not self.cured:
            raise ValueError("cannot learn from this")
        if "gate" in tips:
            self.waiting += 1
            await self.gate.wait()
        self.learned += [event.event.event_id for event in events]


@pytest.fixture
def settings(store: Path | PostgresUrl, valkey: EmbeddedServer, own_valkey: EmbeddedServer) -> Settings:
    """A cache that all tests share, and a queue of this test's own."""
    return Settings(
        features=FEATURES,
        database=store,
        cache_url=valkey.url,
        queue_url=own_valkey.url,
        worker_metrics_port=0,
        cache_timeout_ms=5_000,
    )


@pytest.fixture
async def service(settings: Settings) -> AsyncIterator[OpenService]:
    """The worker's parts, without arq."""
    async with open_service(settings, door="queue") as opened:
        yield opened


@pytest.fixture
async def client(own_valkey: EmbeddedServer) -> AsyncIterator[ArqRedis]:
    connected = connect(own_valkey.url)
    yield connected
    await connected.aclose(close_connection_pool=True)


def event(event_id: str, **changes: Any) -> dict[str, Any]:
    return payload(served("ann", now_ms(), event_id=event_id), **changes)


def run_of(service: OpenService, run_id: str, touched_ms: int) -> RebuildRun:
    """A queued rebuild of all users."""
    features = list(REGISTRY.names)
    return RebuildRun(run_id, scope_of(None), None, features, 0, "ann", touched_ms, touched_ms)


def failing(error: Exception) -> Callable[..., Any]:

    async def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def jobs(service: OpenService, name: str, outcome: str) -> float:
    """How many jobs of that name ended so."""
    labels = {"job": name, "outcome": outcome}
    return service.metrics.collectors.get_sample_value("profiles_worker_jobs_total", labels) or 0.0


def job(service: OpenService) -> JobContext:
    return {**context(service), "job_id": "job", "job_try": 1}


# --- Thin jobs: what becomes of errors


def test_back_off_doubles_up_to_a_bound() -> None:
    assert [back_off(tries) for tries in (1, 2, 3, 4, 5, 6, 50)] == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


@pytest.mark.parametrize("error", [StoreUnavailable("locked"), CacheUnavailable("away"), TimeoutError()])
async def test_job_is_retried_while_a_dependency_fails(
    service: OpenService, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(service.queue_door, "take_in", failing(error))
    ctx = job(service)
    for tries in range(1, 4 * UNEXPECTED_TRIES):
        with pytest.raises(Retry) as caught:
            await module.tip_events({**ctx, "job_try": tries}, [event("a")])
        assert caught.value.defer_score == int(back_off(tries) * 1000)
    assert jobs(service, TIP_EVENTS, "retried") == 4 * UNEXPECTED_TRIES - 1
    assert (await backlog(service.database, service.clock.now_ms())).dead_letters == 0


async def test_payload_is_buried_after_its_attempts(service: OpenService, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = job(service)
    with monkeypatch.context() as patch:
        patch.setattr(service.queue_door, "take_in", failing(StoreUnavailable("locked")))
        with pytest.raises(Retry):
            await module.tip_events({**ctx, "job_try": 50}, [event("a")])  # of no account
    monkeypatch.setattr(service.queue_door, "take_in", failing(RuntimeError("a defect")))
    for tries in range(1, UNEXPECTED_TRIES):
        with pytest.raises(Retry):
            await module.tip_events({**ctx, "job_try": 50 + tries}, [event("a")])
        assert (await backlog(service.database, service.clock.now_ms())).dead_letters == 0
    with monkeypatch.context() as patch:  # the last failure, and burying fails too
        patch.setattr(service.queue_door, "bury", failing(StoreUnavailable("locked")))
        with pytest.raises(Retry):
            await module.tip_events(ctx, [event("a")])
    await module.tip_events(ctx, [event("a")])
    (letter,) = await service.dead_letters.list(0, 10)
    assert letter.error == f"the job failed {UNEXPECTED_TRIES} times: RuntimeError('a defect')"
    assert '"event_id":"a"' in letter.payload
    assert ctx["failures"] == {}


async def test_job_stops_at_its_timeout(service: OpenService, monkeypatch: pytest.MonkeyPatch) -> None:
    never = asyncio.Event()
    monkeypatch.setattr(service.queue_door, "take_in", lambda _: never.wait())
    monkeypatch.setattr(module, "WORK_S", 0.05)
    with pytest.raises(Retry):
        await module.tip_events(job(service), [])


async def test_payload_is_stored_once_when_consumption_fails(
    service: OpenService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.consumer, "consume", failing(CacheUnavailable("away")))
    ctx = job(service)
    await module.tip_events(ctx, [event("a"), "bad"])
    await ctx["handover"].close(5)
    state = await backlog(service.database, service.clock.now_ms())
    assert (state.outbox, state.dead_letters) == (1, 1)
    assert jobs(service, TIP_EVENTS, "done") == 1


async def test_consumption_is_left_to_the_sweep_after_failures(
    service: OpenService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.consumer, "consume", failing(RuntimeError("a defect")))
    ctx = job(service)
    for _ in range(UNEXPECTED_TRIES - 1):
        with pytest.raises(Retry):
            await module.consume_events(ctx, [1])
    await module.consume_events(ctx, [1])
    assert jobs(service, queue_jobs.CONSUME, "given up") == 1


# --- Runs, which are no jobs


async def test_rebuild_fails_after_its_attempts(service: OpenService, monkeypatch: pytest.MonkeyPatch) -> None:
    await service.rebuild_runs.open(run_of(service, "run", now_ms()))
    monkeypatch.setattr(type(service.rebuild_runner), "run", failing(RuntimeError("a defect")))
    ctx = job(service)
    for _ in range(UNEXPECTED_TRIES):
        assert await service.rebuild_runs.active() == ["run"]
        with pytest.raises(RuntimeError):
            await module.rebuild(ctx)
    run = await service.rebuild_runs.get("run")
    assert run is not None
    assert run.state == "failed"
    assert run.error == f"it failed {UNEXPECTED_TRIES} times: RuntimeError('a defect')"


async def test_run_is_tried_without_limit_while_a_dependency_fails(
    service: OpenService, monkeypatch: pytest.MonkeyPatch
) -> None:
    await service.rebuild_runs.open(run_of(service, "run", now_ms()))
    ctx = job(service)
    with monkeypatch.context() as patch:
        patch.setattr(type(service.rebuild_runner), "run", failing(CacheUnavailable("away")))
        for _ in range(4 * UNEXPECTED_TRIES):
            with pytest.raises(CacheUnavailable):
                await module.rebuild(ctx)
    await module.rebuild(ctx)
    run = await service.rebuild_runs.get("run")
    assert run is not None
    assert run.state == "completed"


async def test_rebuilds_take_turns(service: OpenService, monkeypatch: pytest.MonkeyPatch) -> None:
    users = [f"user-{number}" for number in range(4)]
    await service.ingestor.ingest([served(user, now_ms()) for user in users])
    monkeypatch.setattr("app.profiles.rebuild.CHUNK", 2)
    monkeypatch.setattr(module, "TURN_S", -1.0)
    monkeypatch.setattr(type(service.rebuild_runner), "run", run := Mock(wraps=service.rebuild_runner.run))
    for number, listed in enumerate((users, users[1:])):
        await service.rebuild_runs.open(
            run_of(service, str(number), now_ms() + number)._replace(scope=scope_of(listed), user_ids=listed)
        )
    await module.rebuild(job(service))
    assert [call.args[0] for call in run.call_args_list] == ["0", "1", "0", "1", "0", "1"]
    assert [(run.state, run.done) for run in await service.rebuild_runs.newest(9)] == [
        ("completed", 3),
        ("completed", 4),
    ]


async def test_rebuild_is_completed_when_an_older_one_fails(
    service: OpenService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(service.users), "eligible", failing(StoreUnavailable("a statement took too long")))
    await service.rebuild_runs.open(run_of(service, "everyone", now_ms()))
    listed = run_of(service, "listed", now_ms() + 1)._replace(scope=scope_of(["ann"]), user_ids=["ann"])
    await service.rebuild_runs.open(listed)
    with pytest.raises(StoreUnavailable):
        await module.rebuild(job(service))
    states = {run.id: run.state for run in await service.rebuild_runs.newest(9)}
    assert states == {"listed": "completed", "everyone": "queued"}


async def test_requested_quality_is_measured(service: OpenService) -> None:
    await service.ingestor.ingest([served(f"user-{number}", now_ms()) for number in range(3)])
    service.clock = FixedClock("10:40")  # not the time of the hourly measurement
    ctx = job(service)
    await module.measure_quality(ctx)
    assert await service.quality.runs.newest(9) == []
    await service.quality.runs.open("ann", now_ms())
    for _ in range(2):
        await module.measure_quality(ctx)
    (ended,) = await service.quality.runs.newest(9)
    assert (ended.state, ended.measured) == ("completed", 3)


async def test_measurement_fails_after_its_attempts(service: OpenService, monkeypatch: pytest.MonkeyPatch) -> None:
    await service.quality.runs.open("ann", now_ms())
    monkeypatch.setattr(type(service.quality), "measure", failing(RuntimeError("a defect")))
    ctx = job(service)
    for _ in range(UNEXPECTED_TRIES):
        with pytest.raises(RuntimeError):
            await module.measure_quality(ctx)
    (ended,) = await service.quality.runs.newest(9)
    assert (ended.state, ended.error) == (
        "failed",
        f"it failed {UNEXPECTED_TRIES} times: RuntimeError('a defect')",
    )


class FixedClock(SystemClock):
    """A clock that stands still at a time of a day, such as 27:30, half past three on the next day."""

    def __init__(self, time: str) -> None:
        self._midnight_ms = now_ms() // DAY_MS * DAY_MS
        self.set(time)

    def set(self, time: str) -> None:
        hours, minutes = map(int, time.split(":"))
        self.at_ms = self._midnight_ms + (60 * hours + minutes) * 60_000

    def now_ms(self) -> int:
        return self.at_ms


async def test_quality_is_measured_once_an_hour(service: OpenService) -> None:
    clock = FixedClock("10:40")
    service.clock = clock
    times = {"10:40": 0, "10:41": 1, "10:42": 1, "10:59": 1, "11:40": 1, "11:43": 2, "11:44": 2, "14:00": 2, "14:41": 3}
    for time, measured in times.items():
        clock.set(time)
        for _ in range(2):
            await module.measure_quality(job(service))
        runs = await service.quality.runs.newest(9)
        assert [(run.requested_by, run.state) for run in runs] == [(module.HOURLY, "completed")] * measured, time


async def test_rows_are_pruned_once_a_night(service: OpenService) -> None:
    clock = FixedClock("3:16")
    service.clock = clock
    service.retention = msgspec.structs.replace(service.retention, clock=clock)
    old_ms = clock.at_ms - service.settings.retention_days * DAY_MS
    await service.consumer.log.append([[admitted(served("ann", old_ms - 1)), admitted(served("ann", old_ms + DAY_MS))]])
    for time, left in {"3:16": 2, "3:17": 1, "3:18": 1, "27:16": 1, "27:28": 1, "51:17": 0}.items():
        clock.set(time)
        await module.prune(service)
        assert await stored(service) == left, time


async def test_decisions_are_pruned_by_their_own_retention(service: OpenService) -> None:
    old_ms = now_ms() - (service.settings.decision_retention_days + 1) * DAY_MS
    for user_id in ("ann", "bob"):
        await service.bandit.scorer.score(ScoringRequest(user_id=user_id, candidates=TIPS, context=Context()))
    await service.database.write(
        lambda c: c.execute("UPDATE tip_scores SET created_at_ms = ? WHERE user_id = 'ann'", (old_ms,)), of=()
    )
    await night(service.retention)
    rows = await service.database.read(lambda c: c.execute("SELECT user_id FROM tip_scores").fetchall())
    assert rows == [("bob",)]


# --- A running worker


@asynccontextmanager
async def working(
    settings: Settings, learner: FakeLearner | None = None
) -> AsyncIterator[tuple[OpenService, asyncio.Event]]:
    """A worker in this event loop: its service, and the event that stops it. It is always stopped at the end."""
    stop = asyncio.Event()
    ready: list[OpenService] = []

    def on_ready(service: OpenService) -> None:
        service.consumer.learners = [*service.consumer.learners, (learner or FakeLearner()).learn]
        ready.append(service)

    running = asyncio.create_task(work(settings, stop, on_ready=on_ready))
    try:
        await eventually(lambda: ready or running.done(), START_S)
        if running.done():
            await running
        yield ready[0], stop
    finally:
        stop.set()
        await ended(running)


async def ended(running: asyncio.Task[None]) -> None:
    """Wait until a stopping worker has ended. A worker that does not end is cancelled, and the test fails."""
    await asyncio.wait({running}, timeout=STOP_S)
    if not running.done():
        stack = StringIO()
        running.print_stack(file=stack)
        await end([running])
        pytest.fail(f"the worker did not stop within {STOP_S} s:\n{stack.getvalue()}")
    await running


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SWEEP_EVERY_S", 0.02)
    monkeypatch.setattr(consume, "SWEEP_AGE_MS", 200)
    monkeypatch.setattr(queue_worker, "RESTART_AFTER_S", 0.02)


async def all_consumed(service: OpenService) -> bool:
    return (await backlog(service.database, service.clock.now_ms())).outbox == 0


async def stored(service: OpenService) -> int:
    count = await service.database.read(lambda c: c.execute("SELECT COUNT(*) FROM event_log").fetchone())
    return int(count[0])


async def test_no_worker_is_left_when_a_test_fails(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would continue in the event loop, and take jobs of the next worker of the same test."""
    monkeypatch.setattr(f"{__name__}.START_S", 0.0)
    with pytest.raises(AssertionError, match="not true within"):
        async with working(settings):
            pytest.fail("it cannot have started")
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_worker_is_killed_when_it_does_not_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.STOP_S", 0.01)
    running = asyncio.create_task(asyncio.Event().wait())
    with pytest.raises(pytest.fail.Exception, match="did not stop within"):
        await ended(running)  # type: ignore[arg-type]  # whatever it would have returned
    assert running.cancelled()


async def test_events_of_the_queue_are_consumed(settings: Settings, client: ArqRedis) -> None:
    learner = FakeLearner()
    async with working(settings, learner) as (service, _):
        await client.enqueue_job(TIP_EVENTS, [event("a"), event("b")])
        await eventually(lambda: len(learner.learned) == 2)
        await eventually_async(lambda: all_consumed(service))
        features = (await service.reader.read({"ann": REGISTRY.full_mask}))["ann"]
        assert features[REGISTRY.names.index("tip_volume_30d")].json == b"2"
        lag = service.metrics.collectors.get_sample_value("profiles_queue_door_lag_seconds_count")
        assert lag == 1
        assert await client.zcard(QUEUE) == 0


@pytest.mark.slow
async def test_quality_is_measured_when_requested(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW_MS", 0)  # no hourly measurement, whatever the time is
    async with working(settings) as (service, _), working(settings):

        async def completed(count: int) -> bool:
            runs = await service.quality.runs.newest(10)
            return [run.state for run in runs if run.requested_by != module.HOURLY] == ["completed"] * count

        await service.quality.runs.open("ann", now_ms())
        await eventually_async(lambda: completed(1))
        run, _ = await service.quality.runs.open("bob", now_ms())
        await service.quality.runs.begin(run.id, now_ms() - STALE_MS - 1)  # by a worker that has died
        await eventually_async(lambda: completed(2))


async def test_poison_event_becomes_a_dead_letter(settings: Settings, client: ArqRedis) -> None:
    learner = FakeLearner()
    async with working(settings, learner) as (service, _):
        await client.enqueue_job(TIP_EVENTS, [event("a"), event("bad", tip_id="poison"), event("c")])

        async def buried() -> bool:
            return (await backlog(service.database, service.clock.now_ms())).dead_letters == 1

        await eventually_async(buried)
        assert sorted(learner.learned) == ["a", "c"]
        (letter,) = await service.dead_letters.list(0, 10)
        assert (letter.attempts, letter.error) == (consume.ATTEMPTS, "ValueError: cannot learn from this")

        learner.cured = True
        await service.dead_letters.revive(letter.id)
        await eventually(lambda: "bad" in learner.learned)
        await eventually_async(lambda: all_consumed(service))


async def test_worker_continues_when_the_queue_holds_garbage(settings: Settings, client: ArqRedis) -> None:
    junk: dict[str, bytes] = {
        "pickle": pickle.dumps({"f": TIP_EVENTS}),
        "noise": os.urandom(64),
        "wrong types": queue_jobs.serialize({"f": TIP_EVENTS, "a": [[]], "k": {}, "t": "x", "et": "y"}),
        "huge": queue_jobs.serialize({"f": TIP_EVENTS, "a": ["no list"], "k": {}, "t": 2**60, "et": 2**60}),
        "unknown": queue_jobs.serialize({"f": "drop_tables", "a": [], "k": {}}),
    }
    async with working(settings) as (service, _):
        for job_id, raw in junk.items():
            await client.set(job_key_prefix + job_id, raw)
            await client.zadd(QUEUE, {job_id: now_ms()})
        await client.zadd(QUEUE, {"without a body": now_ms()})

        async def buried() -> bool:
            return (await backlog(service.database, service.clock.now_ms())).dead_letters == len(junk)

        await eventually_async(buried)
        await client.enqueue_job(TIP_EVENTS, [event("a")])
        await eventually_async(lambda: stored_is(service, 1))

        async def empty() -> bool:
            return bool(await client.zcard(QUEUE) == 0)

        await eventually_async(empty)


async def stored_is(service: OpenService, count: int) -> bool:
    return await stored(service) == count


@pytest.fixture
def other_settings(settings: Settings, migrated_template: Path, tmp_path: Path) -> Settings:
    """Another service, with a database of its own, on the same servers."""
    return replace(settings, database=copy_database(migrated_template, tmp_path / "other.db", "another database"))


@pytest.mark.slow
async def test_named_queues_keep_services_apart(
    settings: Settings, other_settings: Settings, client: ArqRedis, own_valkey: EmbeddedServer
) -> None:
    other_client = connect(own_valkey.url, "other")
    async with working(settings) as (service, _), working(replace(other_settings, queue_name="other")) as (other, _):
        for number in range(20):
            await client.enqueue_job(TIP_EVENTS, [event(f"a{number}")])
            await other_client.enqueue_job(TIP_EVENTS, [event(f"b{number}"), event(f"c{number}")])
        await eventually_async(lambda: stored_is(service, 20))
        await eventually_async(lambda: stored_is(other, 40))
    await other_client.aclose(close_connection_pool=True)


@pytest.mark.slow
async def test_two_databases_on_one_queue_are_detected(settings: Settings, other_settings: Settings) -> None:
    async with working(settings) as (service, _):
        await eventually_async(lambda: shown(service, 1))
        assert (await service.readiness())["queue"].ok
        async with working(other_settings):
            await eventually_async(lambda: shown(service, 2))
            check = (await service.readiness())["queue"]
            assert (check.ok, check.state) == (False, "degraded")
            assert "PROFILES_QUEUE_NAME" in check.detail


async def shown(service: OpenService, count: int) -> bool:
    """Whether workers of so many databases have shown themselves."""
    assert service.queue is not None
    return len(await service.queue.databases(service.clock.now_ms())) == count


@pytest.mark.slow
async def test_worker_continues_when_the_queue_returns(settings: Settings, own_valkey: EmbeddedServer) -> None:
    async with working(settings) as (service, _):
        await eventually(lambda: ask(own_valkey, "EXISTS", HEALTH_KEY))
        own_valkey.kill()
        # What comes by HTTP meanwhile is consumed all the same.
        await service.consumer.log.append([[admitted(served("ann", now_ms()), now_ms())]])
        await eventually_async(lambda: all_consumed(service))
        own_valkey.start()
        await eventually(lambda: ask(own_valkey, "EXISTS", HEALTH_KEY))
        returned = connect(own_valkey.url)
        await returned.enqueue_job(TIP_EVENTS, [event("b")])
        await eventually_async(lambda: stored_is(service, 2))
        await returned.aclose(close_connection_pool=True)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[queue_worker._Worker]:
    """arq's workers, one for each time that work was begun."""
    workers: list[queue_worker._Worker] = []
    begin = queue_worker._Worker

    def beginning(*args: Any, **jobs: Any) -> queue_worker._Worker:
        workers.append(begin(*args, **jobs))
        return workers[-1]

    monkeypatch.setattr(queue_worker, "_Worker", beginning)
    return workers


class Gate:
    """Holds every job up at the queue's door until it is open."""

    def __init__(self, service: OpenService, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waiting = 0
        self.open = asyncio.Event()
        self._take_in = service.queue_door.take_in
        monkeypatch.setattr(service.queue_door, "take_in", self._wait)

    async def _wait(self, payload: object) -> list[int]:
        self.waiting += 1
        await self.open.wait()
        return await self._take_in(payload)


async def test_crashed_job_returns_within_the_job_timeout(
    settings: Settings, client: ArqRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with working(settings) as (service, _):
        gate = Gate(service, monkeypatch)
        job = await client.enqueue_job(TIP_EVENTS, [event("a")])
        assert job is not None
        await eventually(lambda: gate.waiting)
        hidden_ms = await client.pttl(in_progress_key_prefix + job.job_id)
        assert 0 < hidden_ms <= (module.JOB_TIMEOUT_S + ARQ_EXTRA_S) * 1000
        gate.open.set()


@pytest.mark.slow
async def test_stopping_finishes_running_jobs_only(
    settings: Settings, client: ArqRedis, begun: list[queue_worker._Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = FakeLearner()
    async with working(settings, learner) as (service, stop):
        gate = Gate(service, monkeypatch)
        await client.enqueue_job(TIP_EVENTS, [event("a")])
        await eventually(lambda: gate.waiting)
        assert await client.exists(HEALTH_KEY)
        stop.set()
        await eventually(lambda: not begun[0].allow_pick_jobs)
        await client.enqueue_job(TIP_EVENTS, [event("late")])
        gate.open.set()
    assert learner.learned == ["a"]
    assert await client.zcard(QUEUE) == 1
    assert not await client.exists(HEALTH_KEY)
    async with working(settings, learner):
        await eventually(lambda: learner.learned == ["a", "late"])


@pytest.mark.slow
async def test_job_returns_when_it_outlasts_stopping(
    settings: Settings, client: ArqRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_worker, "STOP_GRACE_S", 0.05)
    learner = FakeLearner()
    async with working(settings, learner) as (service, _):
        gate = Gate(service, monkeypatch)
        await client.enqueue_job(TIP_EVENTS, [event("a")])
        await eventually(lambda: gate.waiting)
    assert learner.learned == []
    assert await client.zcard(QUEUE) == 1
    assert await client.keys(in_progress_key_prefix + "*") == []
    async with working(settings, learner) as (service, _):
        await eventually(lambda: learner.learned == ["a"])
        await eventually_async(lambda: all_consumed(service))


async def test_job_is_done_when_its_events_are_stored(
    settings: Settings, client: ArqRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STOP_GRACE_S", 0.05)
    learner = FakeLearner()
    async with working(settings, learner) as (service, _):
        await client.enqueue_job(TIP_EVENTS, [event("a", tip_id="gate")])
        await eventually(lambda: learner.waiting)
        await eventually_async(lambda: emptied(client))
        assert (await backlog(service.database, service.clock.now_ms())).outbox == 1
    assert learner.learned == []
    learner.gate.set()
    async with working(settings, learner) as (service, _):  # the sweep takes it up
        await eventually_async(lambda: all_consumed(service))
    assert learner.learned == ["a"]


async def emptied(client: ArqRedis) -> bool:
    return bool(await client.zcard(QUEUE) == 0)


@pytest.mark.slow
async def test_worker_continues_when_the_queue_was_silent(
    settings: Settings,
    own_valkey: EmbeddedServer,
    client: ArqRedis,
    begun: list[queue_worker._Worker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The queue is paused: its connections stay open, and no error is reported."""
    monkeypatch.setattr(queue_worker, "SILENT_S", 0.2)
    monkeypatch.setattr(queue_worker, "BLOCKING_S", 0.2)
    async with working(settings) as (service, _):
        await client.enqueue_job(TIP_EVENTS, [event("a")])
        await eventually_async(lambda: emptied(client))
        own_valkey.signal(signal.SIGSTOP)
        await eventually(lambda: len(begun) > 2)
        own_valkey.signal(signal.SIGCONT)
        await client.enqueue_job(TIP_EVENTS, [event("b")])
        await eventually_async(lambda: stored_is(service, 2))
        await eventually_async(lambda: all_consumed(service))


@pytest.mark.slow
async def test_worker_leaves_no_connection_when_the_queue_is_silent_in_a_transaction(
    settings: Settings, own_valkey: EmbeddedServer, client: ArqRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. arq watches the key of a job; 2. the queue is silent; 3. redis-py waits for the end of the watch when it is
    cancelled. A connection that is left shows when the garbage is collected."""
    monkeypatch.setattr(queue_worker, "SILENT_S", 0.2)
    monkeypatch.setattr(queue_worker, "BLOCKING_S", 0.2)
    async with proxy(own_valkey.socket_path) as between:
        between.hold(b"EXISTS", b"UNWATCH")
        async with working(replace(settings, queue_url=between.url)):
            await client.enqueue_job(TIP_EVENTS, [event("a")])
            await eventually(lambda: between.holding == 2)
    gc.collect()


async def test_rebuild_is_taken_up_when_it_was_requested_without_a_worker(
    settings: Settings, service: OpenService, own_valkey: EmbeddedServer
) -> None:
    """Also while the queue is away."""
    await service.ingestor.ingest([served(f"user-{number}", now_ms()) for number in range(300)])
    await service.rebuild_runs.open(run_of(service, "run", now_ms()))
    own_valkey.kill()

    async def completed() -> bool:
        run = await service.rebuild_runs.get("run")
        return run is not None and run.state == "completed" and run.done == 300

    async with working(settings), working(settings):
        await eventually_async(completed)


@pytest.mark.slow
async def test_rebuild_begins_within_a_second_of_its_request(settings: Settings) -> None:
    async with working(settings) as (service, _):
        for number in range(3):
            await service.rebuild_runs.open(run_of(service, str(number), begun_ms := now_ms()))

            async def completed(run_id: str = str(number)) -> bool:
                run = await service.rebuild_runs.get(run_id)
                return run is not None and run.state == "completed"

            await eventually_async(completed)
            run = await service.rebuild_runs.get(str(number))
            assert run is not None
            assert run.started_at_ms is not None
            assert run.started_at_ms - begun_ms < 1_000 * (module.LOOK_EVERY_S + 1)


@pytest.mark.slow
async def test_sweep_goes_on_when_it_fails(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    async with working(settings) as (service, _):
        sound = service.consumer.sweep
        for error in (StoreUnavailable("locked"), RuntimeError("a defect")):
            failures: list[Exception] = []

            async def fail(error: Exception = error, failures: list[Exception] = failures) -> int:
                failures.append(error)
                raise error

            monkeypatch.setattr(service.consumer, "sweep", fail)
            await eventually(lambda failures=failures: len(failures) > 2)  # type: ignore[misc]  # a default binds
        monkeypatch.setattr(service.consumer, "sweep", sound)
        await service.consumer.log.append([[admitted(served("ann", now_ms()), now_ms())]])
        await eventually_async(lambda: all_consumed(service))


@pytest.mark.slow
async def test_metrics_are_served_when_a_port_is_set(settings: Settings, client: ArqRedis) -> None:
    port = free_port()
    chosen = {name: getattr(settings, name) for name in ("database", "cache_url", "queue_url", "cache_timeout_ms")}
    served_there = Settings(features=FEATURES, **chosen, worker_metrics_port=port)
    async with working(served_there) as (service, _):
        await client.enqueue_job(TIP_EVENTS, [event("a")])
        await eventually_async(lambda: stored_is(service, 1))
        await eventually_async(lambda: all_consumed(service))  # counted before it is consumed
        async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE_S) as browser:
            text = (await browser.get(f"http://127.0.0.1:{port}/metrics")).text
        assert 'profiles_events_total{door="queue",outcome="accepted"} 1.0' in text
        async with working(served_there) as (another, _):  # without metrics, but of use
            await service.consumer.log.append([[admitted(served("bob", now_ms()), now_ms())]])
            await eventually_async(lambda: all_consumed(another))
    with closing(socket.create_server(("127.0.0.1", port))) as taken:
        async with working(served_there), httpx.AsyncClient(trust_env=False, timeout=PATIENCE_S) as browser:
            taken.close()  # as a process does that is replaced

            async def answers() -> bool:
                try:
                    return (await browser.get(f"http://127.0.0.1:{port}/metrics")).status_code == 200
                except httpx.ConnectError:
                    return False

            await eventually_async(answers)


@pytest.mark.slow
async def test_worker_stops_right_after_its_start(settings: Settings) -> None:
    for turns in (0, 2, 5, 8):
        async with working(settings):
            for _ in range(turns):
                turn = asyncio.Event()
                asyncio.get_running_loop().call_soon(turn.set)
                await turn.wait()


async def test_worker_refuses_to_start_without_a_server(settings: Settings) -> None:
    for name, missing in (
        ("PROFILES_CACHE_URL", Settings(features=FEATURES, database=settings.database, queue_url=settings.queue_url)),
        ("PROFILES_QUEUE_URL", Settings(features=FEATURES, database=settings.database, cache_url=settings.cache_url)),
    ):
        with pytest.raises(SettingsError, match=f"{name}: must be set"):
            await work(missing, asyncio.Event())


@pytest.mark.slow
async def test_users_of_new_events_are_checked(settings: Settings) -> None:
    async with working(settings) as (service, _):
        labels = {"after": "1s", "outcome": "empty"}  # not read yet

        async def checked() -> bool:
            await service.ingestor.ingest([served("ann", now_ms())])
            count = service.metrics.collectors.get_sample_value("profiles_consistency_checks_total", labels)
            return bool(count)

        await eventually_async(checked, step_s=0.3)


@pytest.mark.parametrize(
    ("name", "beating"), [pytest.param("arq:queue", True, marks=pytest.mark.slow), ("mine", True), ("arq:queue", False)]
)
@pytest.mark.slow
def test_arq_can_check_the_worker(own_valkey: EmbeddedServer, tmp_path: Path, name: str, beating: bool) -> None:
    if beating:
        ask(own_valkey, "SET", f"{name}:health-check", "alive")
    environment = {
        **os.environ,
        "PROFILES_QUEUE_URL": own_valkey.url,
        "PROFILES_CACHE_URL": own_valkey.url,
        "PROFILES_QUEUE_NAME": name,
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "arq", "--check", "app.worker.WorkerSettings"]
    shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (shown.returncode, "Traceback" in shown.stderr) == (0 if beating else 1, False), shown.stderr
