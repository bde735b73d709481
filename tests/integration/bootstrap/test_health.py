"""Sampling beside a running process: it begins at once, and ends with the process."""

import asyncio
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from app.asgi import create_app
from app.bootstrap.health import sampling
from app.bootstrap.service import open_service
from app.errors import StoreUnavailable
from app.operations import samples
from app.settings import Settings
from app.settings.parsers import PostgresUrl, postgres_url
from app.stores.migrate import migrate
from app.stores.sql.database import Database
from app.stores.sql.dead_letters import SqlDeadLetters
from app.stores.sql.samples import AHEAD_MS, SqlSamples
from app.stores.sqlite.database import SqliteDatabase
from app.stores.valkey.embedded import EmbeddedServer
from app.worker import work
from tests.support.database import as_another_account, column, copy_database, log_of
from tests.support.events import admitted, served
from tests.support.postgres import StartPostgres
from tests.support.registry import FEATURES
from tests.support.waiting import PATIENCE_S, eventually_async

pytestmark = pytest.mark.both_engines
SCRAPE_TIMEOUT_S = 10.0  # by default in Prometheus


@pytest.fixture
def settings(store: Path | PostgresUrl, valkey: EmbeddedServer, own_valkey: EmbeddedServer) -> Settings:
    return Settings(
        features=FEATURES,
        database=store,
        cache_url=valkey.url,
        cache_timeout_ms=5_000,
        queue_url=own_valkey.url,
        worker_metrics_port=0,
    )


async def sampled(database: Database) -> None:
    await eventually_async(partial(kept, database))


async def kept(database: Database) -> list[tuple[str, bool]]:
    """The role of each stored sample, and whether it was the process's last."""
    return [(sample.role, sample.stopped) for sample in (await SqlSamples(database).since(0)).samples]


@pytest.fixture
def patient_last_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last sample of a process is stored, however slow the database is."""
    monkeypatch.setattr(samples, "LAST_S", PATIENCE_S)


@pytest.mark.slow
@pytest.mark.usefixtures("patient_last_sample")
async def test_application_takes_samples_while_it_runs(settings: Settings, database: Database) -> None:
    application = create_app(settings)
    async with application.lifespan():
        await sampled(database)
    assert await kept(database) == [("api", False), ("api", True)]


@pytest.mark.slow
@pytest.mark.usefixtures("patient_last_sample")
async def test_worker_takes_samples_while_it_runs(settings: Settings, database: Database) -> None:
    stop = asyncio.Event()
    working = asyncio.create_task(work(settings, stop))
    await sampled(database)
    stop.set()
    await working
    assert await kept(database) == [("worker", False), ("worker", True)]


@pytest.mark.slow
async def test_worker_gauges_are_right_after_a_sample(settings: Settings, database: Database) -> None:
    """Unlike an API's, they are not refreshed by a scrape."""
    await SqlDeadLetters(database).bury_payloads([("1", "no event")], 1)
    async with open_service(settings, door="queue") as service, sampling(service, "worker"):
        await sampled(database)
        seen = service.metrics.collectors.get_sample_value
        assert seen("profiles_dead_letters") == 1
        assert seen("profiles_rollout_stage", {"stage": "shadow"}) == 1


async def test_readiness_fails_when_the_database_file_is_replaced(settings: Settings, database_path: Path) -> None:
    second = database_path.with_name("second.db")
    async with open_service(settings, door="queue") as service:
        assert (await service.readiness())["database"].ok
        second.hardlink_to(database_path)
        check = (await service.readiness())["database"]
        assert (check.ok, check.vital, check.state) == (False, False, "degraded")
        assert "its file has 2 names (hard links)" in check.detail
        await asyncio.to_thread(database_path.unlink)
        check = (await service.readiness())["database"]
        assert (check.ok, check.vital) == (False, True)
        assert check.detail.startswith("its file was removed")
        second.rename(database_path)
        assert (await service.readiness())["database"].ok


async def test_readiness_fails_when_the_database_is_read_only(
    settings: Settings, migrated_template: Path, reachable: Path
) -> None:
    path = copy_database(migrated_template, reachable / "profiles.db", "of another account")
    async with open_service(replace(settings, database=path), door="queue") as service:
        with as_another_account(path):
            check = (await service.readiness())["database"]
            assert (check.ok, check.state) == (False, "degraded")
            assert check.detail == "the account of this process may not write to its files"
            with pytest.raises(StoreUnavailable, match="may not write to"):
                await SqliteDatabase.open(path, readers=1)
        assert (await service.readiness())["database"].ok


async def test_events_ahead_of_the_clock_are_counted(settings: Settings, database: Database) -> None:
    async with open_service(settings, door="queue") as service:
        now_ms = service.clock.now_ms()
        moments = (now_ms, now_ms + AHEAD_MS - 60_000, now_ms + AHEAD_MS + 60_000, now_ms + 40 * 86_400_000)
        await log_of(database).append([[admitted(served("ann", moment)) for moment in moments]])
        await service.refresh_gauges()
        assert service.metrics.collectors.get_sample_value("profiles_events_ahead") == 2


async def test_rollout_gauges_are_kept_when_the_database_fails(settings: Settings, database: Database) -> None:
    async with open_service(settings, door="queue") as service:
        await database.write(lambda c: c.execute("UPDATE rollout SET stage = 'ramp', share = 0.25"), of=())
        await service.refresh_gauges()
        await database.write(lambda c: c.execute("ALTER TABLE rollout RENAME TO rollout_away"), of=())
        await service.refresh_gauges()
        seen = service.metrics.collectors.get_sample_value
        assert seen("profiles_rollout_share_ratio") == 0.25
        assert [seen("profiles_rollout_stage", {"stage": stage}) for stage in ("shadow", "ramp")] == [0, 1]
        assert seen("profiles_dead_letters") == 0, "the others are told of all the same"
        await database.write(lambda c: c.execute("ALTER TABLE rollout_away RENAME TO rollout"), of=())
        await database.write(lambda c: c.execute("UPDATE rollout SET stage = 'rolled back', share = 0"), of=())
        await service.refresh_gauges()
        assert seen("profiles_rollout_stage", {"stage": "rolled back"}) == 1


async def test_challenger_has_no_share_when_there_is_none(settings: Settings, database: Database) -> None:
    await database.write(lambda c: c.execute("UPDATE rollout SET stage = 'ramp', share = 0.25"), of=())
    async with open_service(replace(settings, shadow=False), door="queue") as service:
        await service.refresh_gauges()
        assert service.metrics.collectors.get_sample_value("profiles_rollout_share_ratio") == 0
        assert service.metrics.collectors.get_sample_value("profiles_rollout_stage", {"stage": "ramp"}) == 1


@pytest.mark.slow
async def test_gauges_are_withdrawn_in_time_when_the_database_is_silent(
    start_postgres: StartPostgres, valkey: EmbeddedServer
) -> None:
    server = start_postgres()
    url = postgres_url(server.url(tcp=True))
    migrate(url)
    settings = Settings(features=FEATURES, database=url, cache_url=valkey.url, queue_url=valkey.url)
    async with open_service(settings, door="http") as service:
        await service.refresh_gauges()
        seen = service.metrics.collectors.get_sample_value
        assert seen("profiles_unconsumed_events") == 0
        server.signal(signal.SIGSTOP)
        try:
            async with asyncio.timeout(SCRAPE_TIMEOUT_S):
                await service.refresh_gauges()
        finally:
            server.signal(signal.SIGCONT)
        assert seen("profiles_unconsumed_events") is None
        assert seen("profiles_queue_depth") == 0


@pytest.mark.slow
async def test_every_component_has_a_state_after_the_first_sample(settings: Settings, database: Database) -> None:
    async with open_service(settings, door="queue") as service, sampling(service, "worker"):
        await sampled(database)
    found = await column(database, "SELECT component || ' ' || state FROM component_states ORDER BY component")
    assert found == ["cache ok", "database ok", "features ok", "queue ok", "service degraded", "worker down"]


async def test_former_timeline_is_no_other_database(settings: Settings) -> None:
    async with open_service(settings, door="queue") as service:
        assert service.queue is not None
        name, *rest = service.database.id.split(":")
        system, *others = rest or ["", "", ""]
        former = ":".join([name, system, "000000FF", *others[1:]]) if rest else name
        for database_id, ok in ((former, True), (f"other:{system}:000000FF", False)):
            await service.queue.show_database(database_id, service.clock.now_ms())
            assert (await service.readiness())["queue"].ok == ok


async def test_process_name_differs_at_every_start(settings: Settings) -> None:
    names = set()
    for _ in range(2):
        async with open_service(settings, door="http") as service:
            names.add(service.process)
    assert len(names) == 2
