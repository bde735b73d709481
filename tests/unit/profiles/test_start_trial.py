"""The start of a process that serves: each feature is computed for stored users before anything is announced."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from app.bootstrap.service import OpenService, open_service
from app.errors import RegistryError
from app.features.contract import Contract
from app.features.registry import Feature, Registry
from app.features.schema import mirror_of
from app.settings import Settings
from app.stores.sql.registries import SqlRegistries
from app.stores.sqlite.database import SqliteDatabase
from app.stores.sqlite.event_log import SqliteEventLog
from app.stores.sqlite.features import compile_registry
from tests.support.entries import ENDLESS, entry
from tests.support.events import admitted, feedback, served
from tests.support.traffic import now_ms
from tests.support.waiting import eventually

SOUND = entry(name="sound")
OVERFLOW = "SELECT user_id, SUM(9223372036854775807) AS value FROM views GROUP BY user_id"
MISTYPED = "SELECT user_id, 0.5 AS value FROM views GROUP BY user_id"
faults = pytest.mark.parametrize(
    ("compute", "reason"),
    [
        pytest.param(ENDLESS, "the SQL took longer than 1,000 ms for one user", id="endless", marks=pytest.mark.slow),
        pytest.param(OVERFLOW, "the SQL failed: integer overflow", id="overflow"),
        pytest.param(MISTYPED, "the SQL gave float 0.5 where int is", id="mistyped"),
    ],
)


def start(path: Path, *entries: Feature, door: str = "http") -> AbstractAsyncContextManager[OpenService]:
    registry = compile_registry(Registry([SOUND, *entries]))
    settings = Settings(database=path, statement_timeout_ms=1_000)
    return open_service(settings, door=door, contract=Contract(registry=registry, mirror=mirror_of(registry)))


@pytest.fixture
async def stored(database: SqliteDatabase, event_log: SqliteEventLog) -> SqliteDatabase:
    await event_log.append([[admitted(served("ann", now_ms())) for _ in range(2)]])
    return database


@faults
async def test_process_does_not_start_when_a_new_definition_fails(
    stored: SqliteDatabase, compute: str, reason: str
) -> None:
    with pytest.raises(RegistryError, match=f"feature 'faulty': a trial with 1 stored users failed: {reason}"):
        async with start(stored.path, entry(name="faulty", compute=compute)):
            pass
    assert await SqlRegistries(stored).announced() == []


@faults
async def test_process_starts_degraded_when_a_served_definition_fails(
    database: SqliteDatabase, event_log: SqliteEventLog, compute: str, reason: str
) -> None:
    faulty = entry(name="faulty", compute=compute)
    async with start(database.path, faulty):
        pass
    await event_log.append([[admitted(served("ann", now_ms())) for _ in range(2)]])
    async with start(database.path, faulty) as service:
        assert service.computation.availability.unavailable == 0b10
        check = (await service.readiness())["features"]
        assert (check.ok, check.vital, check.state) == (False, False, "degraded")
        assert f"faulty: {reason}" in check.detail
        profile = (await service.reader.read({"ann": 0b11}))["ann"]
        assert profile[0].json == b"2"
        assert (profile[1].json, reason in (profile[1].error or "")) == (b"null", True)


@pytest.mark.slow
async def test_feature_is_served_again_when_its_data_allow_it(
    database: SqliteDatabase, event_log: SqliteEventLog
) -> None:
    faulty = entry(name="faulty", compute=OVERFLOW)
    async with start(database.path, faulty):
        pass
    await event_log.append(
        [[admitted(served("ann", now_ms())) for _ in range(2)], [admitted(feedback("bob", now_ms()))]]
    )
    async with start(database.path, faulty) as service:
        availability = service.computation.availability
        assert availability.unavailable == 0b10
        profile = (await service.reader.read({"bob": 0b10}))["bob"]  # tried next with a user for whom it does not fail
        assert profile[1].error is not None

        def resumed() -> bool:
            service.computation.try_again()
            return availability.unavailable == 0

        await eventually(resumed)
        assert (await service.readiness())["features"].ok


async def test_costs_are_measured_when_users_are_stored(stored: SqliteDatabase) -> None:
    async with start(stored.path, entry(name="faulty")) as service:
        assert service.costs.keys() == {0, 1}
        assert all(cost > 0 for cost in service.costs.values())


async def test_nothing_is_measured_when_no_user_is_stored(database: SqliteDatabase) -> None:
    async with start(database.path) as service:
        assert service.costs == {}


async def test_disabled_feature_is_not_tried(stored: SqliteDatabase) -> None:
    await SqlRegistries(stored).switch("faulty", "ops", "", now_ms(), on=False)
    async with start(stored.path, entry(name="faulty", compute=ENDLESS)) as service:
        assert service.costs.keys() == {0}
        assert service.computation.availability.troubles() == []


async def test_command_tries_nothing_and_announces_no_registry(stored: SqliteDatabase) -> None:
    async with start(stored.path, entry(name="faulty", compute=ENDLESS), door="command") as service:
        assert service.costs == {}
        assert await service.registries.announced() == []
