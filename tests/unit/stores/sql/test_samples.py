"""Samples are kept for a little more than an hour, and processes agree on component states."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from app.features.clock import DAY_MS, HOUR_MS
from app.operations.component_states import COMPONENTS, OK, ComponentView
from app.operations.samples import SUMMARY_MS, Gauges, Sample
from app.stores.sql.database import Database
from app.stores.sql.samples import (
    KEPT_MS,
    LATELY_MS,
    SqlSamples,
)
from tests.support.clock import NOW_MS
from tests.support.database import column
from tests.support.samples import sample

pytestmark = pytest.mark.both_engines

AWAY = {**dict.fromkeys(COMPONENTS, OK), "cache": ComponentView("down", "away")}
WELL = dict.fromkeys(COMPONENTS, OK)


@pytest.fixture
def samples(database: Database) -> SqlSamples:
    return SqlSamples(database)


def at(seconds: float, **changes: object) -> Sample:
    """A sample `seconds` after `NOW_MS`."""
    return sample(at_ms=NOW_MS + round(seconds * 1000), **changes)


async def cache(samples: SqlSamples) -> tuple[str, float]:
    """The state of the cache, and since when, in seconds after `NOW_MS`."""
    found = (await samples.since(0)).statuses["cache"]
    return found.state, (found.since_ms - NOW_MS) / 1000


async def test_samples_are_returned_as_stored(samples: SqlSamples) -> None:
    full = at(1, counts={"hits": 1, "latency_0.5": 2, "lag_+Inf": 1}, gauges=Gauges(owed=0, outbox=3), components=AWAY)
    await samples.keep(at(2, process="é", role="worker", stopped=True))
    await samples.keep(full)
    assert (await samples.since(NOW_MS)).samples == [full, at(2, process="é", role="worker", stopped=True)]
    assert len((await samples.since(NOW_MS + 1_001)).samples) == 1


async def test_old_samples_and_samples_from_the_future_are_deleted(samples: SqlSamples, database: Database) -> None:
    for number in range(5):
        await samples.keep(at(number))
    await samples.keep(at(3 + KEPT_MS / 1000))
    assert await column(database, "SELECT at_ms FROM samples") == [
        NOW_MS + 3_000,
        NOW_MS + 4_000,
        NOW_MS + 3_000 + KEPT_MS,
    ]
    await samples.keep(at(-3 * KEPT_MS / 1000))
    assert await column(database, "SELECT COUNT(*) FROM samples") == [1]


async def test_state_changes_at_once_when_one_process_runs(samples: SqlSamples) -> None:
    await samples.keep(at(0, components=WELL))
    await samples.keep(at(10, components=WELL))
    assert await cache(samples) == ("ok", 0)
    await samples.keep(at(20, components=AWAY))
    await samples.keep(at(30, components=AWAY))
    assert await cache(samples) == ("down", 20)
    await samples.keep(at(40, components=WELL))
    assert await cache(samples) == ("ok", 40)


async def test_state_does_not_flap_when_two_processes_disagree(samples: SqlSamples) -> None:
    for second in range(0, 100, 10):
        await samples.keep(at(second, components=AWAY))
        assert await cache(samples) == ("down", 0)
        await samples.keep(at(second + 5, process="two", components=WELL))
        assert await cache(samples) == ("down", 0)
    await samples.keep(at(100, components=WELL))
    assert await cache(samples) == ("ok", 100)


async def test_stopped_process_does_not_count(samples: SqlSamples) -> None:
    await samples.keep(at(0, components=AWAY))
    await samples.keep(at(1, components={}, stopped=True))
    await samples.keep(at(2, process="two", components=WELL))
    assert await cache(samples) == ("ok", 2)


async def test_silent_process_does_not_count_after_a_while(samples: SqlSamples) -> None:
    await samples.keep(at(0, components=AWAY))
    await samples.keep(at(20, process="two", components=WELL))
    assert await cache(samples) == ("down", 0)
    await samples.keep(at(1 + LATELY_MS / 1000, process="two", components=WELL))
    assert await cache(samples) == ("ok", 1 + LATELY_MS / 1000)


@pytest.mark.parametrize("body", ["nonsense", "{}", '{"at_ms": 1, "process": "one", "role": "prophet", "seconds": 1}'])
async def test_sample_is_ignored_when_it_cannot_be_decoded(samples: SqlSamples, database_path: Path, body: str) -> None:
    with closing(sqlite3.connect(database_path, isolation_level=None)) as other:
        other.execute("INSERT INTO samples (at_ms, process, body) VALUES (?, 'other', ?)", (NOW_MS, body))
    await samples.keep(at(1, components=AWAY))
    assert [found.process for found in (await samples.since(0)).samples] == ["one"]
    assert await cache(samples) == ("down", 1)


async def test_unknown_component_is_ignored(samples: SqlSamples, database_path: Path) -> None:
    with closing(sqlite3.connect(database_path, isolation_level=None)) as other:
        other.execute("INSERT INTO component_states VALUES ('bandit', 'ok', '', 0, 0)")
    assert (await samples.since(0)).statuses == {}


async def test_ended_periods_are_summarised_once_by_role(samples: SqlSamples, database: Database) -> None:
    begun_ms = NOW_MS // SUMMARY_MS * SUMMARY_MS
    for minute in range(0, 30, 10):
        at_ms = begun_ms + minute * 60_000
        await samples.keep(sample(at_ms=at_ms, counts={"hits": 1}, gauges=Gauges(owed=minute)))
        await samples.keep(sample(at_ms=at_ms, process="two", counts={"hits": 10}))
        await samples.keep(sample(at_ms=at_ms, process="three", role="worker", counts={"lag_+Inf": 2}))
    await samples.keep(sample(at_ms=begun_ms + SUMMARY_MS + 50_000))
    assert await column(database, "SELECT COUNT(*) FROM sample_summaries") == [0], "others may be late"
    for _ in range(2):
        await samples.keep(sample(at_ms=begun_ms + SUMMARY_MS + 70_000, counts={"hits": 7}))
    api, worker, *later = await samples.summaries(begun_ms)
    assert (api.counts, api.gauges.owed, api.seconds) == ({"hits": 33}, 20, 30.0)
    assert (api.at_ms, api.role, worker.role) == (begun_ms + SUMMARY_MS - 1, "api", "worker")
    assert worker.counts == {"lag_+Inf": 6}
    assert [item.counts for item in later] == [{}, {"hits": 7}, {"hits": 7}], "not summarised yet"
    assert await column(database, "SELECT COUNT(*) FROM sample_summaries") == [2]


async def test_summaries_are_deleted_after_a_month(samples: SqlSamples, database: Database) -> None:
    for days in range(0, 45, 5):
        await samples.keep(at(days * 86_400))
        await samples.keep(at(days * 86_400 + 3_600))
    kept = await column(database, "SELECT MIN(at_ms) FROM sample_summaries")
    assert kept == [(NOW_MS + 10 * DAY_MS) // SUMMARY_MS * SUMMARY_MS + SUMMARY_MS - 1]


@pytest.mark.parametrize("ahead_ms", [HOUR_MS, 2 * DAY_MS])
async def test_figures_continue_when_the_clock_was_ahead(samples: SqlSamples, ahead_ms: int) -> None:
    begun_ms = NOW_MS // SUMMARY_MS * SUMMARY_MS
    for minutes in (0, 40):
        await samples.keep(sample(at_ms=begun_ms + ahead_ms + minutes * 60_000))
    for minutes in (1, 11, 32):
        await samples.keep(sample(at_ms=begun_ms + minutes * 60_000, counts={"hits": 1}))
    found = [item for item in await samples.summaries(begun_ms) if item.at_ms <= begun_ms + 32 * 60_000]
    assert [(item.at_ms - begun_ms, item.counts) for item in found] == [
        (SUMMARY_MS - 1, {"hits": 2}),
        (32 * 60_000, {"hits": 1}),
    ]
