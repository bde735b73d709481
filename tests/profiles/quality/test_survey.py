"""The survey: figures that tie out, values that are those of the reads, and memory that does not grow."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import app.profiles.quality.scan as module
from app.errors import CacheUnavailable, StoreUnavailable
from app.features.clock import DAY_MS
from app.features.events import TipEvent
from app.features.registry import Registry
from app.profiles.codec import Value, encode
from app.profiles.consistency.inspection import CellFreshness
from app.profiles.ports import Cell
from app.profiles.quality.report import QualityReport, report
from app.profiles.quality.scan import Survey
from app.stores.valkey.cache import key
from tests.profiles.quality.office import Office
from tests.profiles.world import World
from tests.support import reference
from tests.support.clock import NOW_MS
from tests.support.database import wipe
from tests.support.entries import entry
from tests.support.events import admitted, feedback, served
from tests.support.registry import REGISTRY
from tests.support.servers import ask
from tests.support.service import Service

WEEK_MS = 7 * DAY_MS
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT user_id, i AS value FROM views, n"
held = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def office(service: Service, monkeypatch: pytest.MonkeyPatch) -> Office:
    monkeypatch.setattr(module, "PAGE", 3)
    return Office(service)


async def walked(office: Office, survey: Survey | None = None) -> Survey:
    """A survey at its end."""
    survey = survey or await office.surveyor.begin()
    async for _ in office.surveyor.pages(survey):
        pass
    return survey


async def measured(office: Office) -> QualityReport:
    """A report."""
    return report(await walked(office), office.service.registry, office.service.clock.now_ms())


def ties_out(found: QualityReport) -> None:
    """What is true of every report."""
    for figures in found.features.values():
        assert figures.eligible == found.eligible
        drift = figures.drift
        assert sum(part.now for part in drift.bins) + sum(part.before for part in drift.bins) + drift.failed == (
            found.eligible + found.eligible_before
        )
        assert (drift.psi is None) == (drift.band is None) == (drift.why_not is not None)
        if not found.measured:
            assert (figures.fresh, figures.missing, figures.stale, figures.ages_ms) == (None,) * 4
            continue
        assert figures.fresh is not None
        assert figures.missing is not None
        assert figures.stale is not None
        assert figures.fresh + figures.missing + figures.stale == figures.eligible


async def put(world: World, service: Service, user: str, feature: str, seq: int) -> None:
    """Put a value past the protocol."""
    now_ms = service.clock.now_ms()
    epoch, _ = await service.cache.inner.read([Cell(user, feature)])
    value = Value(service.registry.named(feature).fingerprint.encode(), seq, now_ms, now_ms + 60_000, b"1")
    ask(world.server, "SET", key(epoch, Cell(user, feature)), encode(value))


async def test_figures_tie_out_when_cells_are_fresh_missing_and_stale(office: Office, world: World) -> None:
    service = office.service
    await service.send(*(served(user) for user in ("ann", "bob", "cyd", "dee")), served("old", NOW_MS - 31 * DAY_MS))
    await service.send(feedback("ann"))
    await service.batch(["ann", "bob", "old"])
    await service.drain()
    await put(world, service, "cyd", "tip_volume_30d", seq=1)
    found = await measured(office)
    ties_out(found)
    assert (found.eligible, found.eligible_before, found.measured) == (4, 1, True)
    volume = found.features["tip_volume_30d"]
    assert (volume.fresh, volume.missing, volume.stale) == (2, 1, 1)
    rate = found.features["completion_rate_30d"]
    assert (rate.fresh, rate.missing, rate.stale, rate.null_share) == (2, 2, 0, 0.5)
    assert found.features["tip_volume_30d"].distribution == [{"value": 1, "count": 3}]


events = st.lists(
    st.tuples(
        st.sampled_from([f"user-{number}" for number in range(8)]),
        st.integers(0, 45 * DAY_MS),
        st.sampled_from(["served", "completed", "dismissed", "snoozed"]),
        st.one_of(st.none(), st.integers(0, 1_000)),
    ),
    max_size=40,
)
moves = st.lists(st.tuples(st.sampled_from(["read", "drop", "stale", "event"]), st.integers(0, 7)), max_size=12)


def built(facts: Sequence[tuple[str, int, str, int | None]], now_ms: int) -> list[TipEvent]:
    """As events."""
    return [
        served(user, now_ms - ago) if kind == "served" else feedback(user, now_ms - ago, kind, dwell_ms=dwell)
        for user, ago, kind, dwell in facts
    ]


@held
@given(facts=events, steps=moves)
async def test_figures_tie_out_whatever_has_happened(
    office: Office, world: World, facts: list[tuple[str, int, str, int | None]], steps: list[tuple[str, int]]
) -> None:
    service = office.service
    await wipe(service.database)
    if facts:
        await service.send(*built(facts, service.clock.now_ms()))
    for step, number in steps:
        user, feature = f"user-{number}", REGISTRY.names[number % len(REGISTRY)]
        if step == "read":
            await service.features(user)
            await service.drain()
        elif step == "drop":
            await service.cache.inner.drop([Cell(user, feature)])
        elif step == "stale":
            await put(world, service, user, feature, seq=0)
        else:
            await service.send(served(user, service.clock.now_ms()))
    found = await measured(office)
    ties_out(found)
    members = await office.surveyor._population.members("", office.surveyor._spans(service.clock.now_ms()), 99)
    assert found.eligible == sum(member.now for member in members)


@held
@given(facts=events)
async def test_values_are_those_of_a_read_of_each_user_at_both_moments(
    office: Office, facts: list[tuple[str, int, str, int | None]]
) -> None:
    service = office.service
    now_ms = service.clock.now_ms()
    stored = [admitted(event, now_ms) for event in built(facts, now_ms)]
    await wipe(service.database)
    if stored:
        await service.ingestor._log.append([stored])
    survey = await walked(office)
    for moment_ms, side in ((now_ms, "now"), (now_ms - WEEK_MS, "before")):
        users = {fact.event.user_id for fact in stored if moment_ms - 30 * DAY_MS <= fact.occurred_at_ms <= moment_ms}
        plain = [reference.profile(stored, user, moment_ms) for user in users]
        for name, figures in survey.features.items():
            sketch = getattr(figures, side)
            wanted = Counter(values[name] for values in plain)
            assert sketch.nulls == wanted.pop(None, 0)
            assert dict(sketch.counts()) == {float(value or 0): count for value, count in wanted.items()}


async def test_values_need_no_cache_when_it_goes_away_during_the_walk(
    fragile_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAGE", 3)
    service = await fragile_world.open()
    office = Office(service)
    await service.send(*(served(f"user-{number}") for number in range(8)))
    survey = await office.surveyor.begin()
    async for _ in office.surveyor.pages(survey):
        if survey.walked == 3:
            fragile_world.server.kill()
    found = report(survey, REGISTRY, service.clock.now_ms())
    ties_out(found)
    assert (found.eligible, found.measured) == (8, False)
    assert [part.now for part in found.features["tip_volume_30d"].drift.bins] == [8]


@pytest.mark.parametrize(("silences", "measured"), [(1, True), (module.TRIES - 1, True), (module.TRIES, False)])
async def test_the_cache_may_be_silent_for_a_moment_during_the_walk(
    office: Office, monkeypatch: pytest.MonkeyPatch, silences: int, measured: bool
) -> None:
    await office.service.send(*(served(f"user-{number}") for number in range(8)))
    inner = office.meter.freshness
    left = silences

    async def look(user_ids: Sequence[str]) -> list[CellFreshness]:
        nonlocal left
        if "user-3" in user_ids and left:
            left -= 1
            raise CacheUnavailable("silent")
        return await inner(user_ids)

    monkeypatch.setattr(office.meter, "freshness", look)
    survey = await walked(office)
    assert (survey.measured, survey.eligible) == (measured, 8)
    ties_out(report(survey, REGISTRY, NOW_MS))
    assert office.rests.count(module.TRY_AGAIN_S) == min(silences, module.TRIES - 1)


async def test_nobody_waits_for_a_cache_that_is_away_from_the_beginning(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    await office.service.send(*(served(f"user-{number}") for number in range(8)))
    monkeypatch.setattr(type(office.service.cache), "available", False)
    assert (await walked(office)).measured is False
    assert module.TRY_AGAIN_S not in office.rests


async def test_a_walk_goes_on_as_it_was_when_it_is_stored_after_each_page(office: Office) -> None:
    await office.service.send(*(served(f"user-{number}", NOW_MS - number * DAY_MS) for number in range(36)))
    await office.service.batch([f"user-{number}" for number in range(10)])
    await office.service.drain()
    whole = await walked(office)
    stored = await office.surveyor.begin()
    while True:
        before = stored.walked
        async for _ in office.surveyor.pages(stored):
            break
        if stored.walked == before:
            break
        stored = msgspec.json.decode(msgspec.json.encode(stored), type=Survey)
    assert stored == whole
    assert (whole.walked, whole.total, whole.eligible, whole.eligible_before) == (36, 36, 31, 29)


async def test_a_page_counts_once_when_it_has_to_be_tried_again(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    await office.service.send(*(served(f"user-{number}") for number in range(5)))
    survey = await office.surveyor.begin()

    async def locked(*_: object) -> None:
        raise StoreUnavailable("locked")

    with monkeypatch.context() as patch:
        patch.setattr(office.service.source, "compute", locked)
        with pytest.raises(StoreUnavailable):
            await walked(office, survey)
    assert survey == await office.surveyor.begin()
    assert (await walked(office, survey)).eligible == 5


async def test_the_walk_rests_after_each_page(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    await office.service.send(*(served(f"user-{number}") for number in range(7)))
    clock = office.service.clock
    inner = office.service.source.compute

    async def slow(*asked: object) -> object:
        clock.advance(40)
        return await inner(*asked)  # type: ignore[arg-type]

    monkeypatch.setattr(office.service.source, "compute", slow)
    await walked(office)
    assert office.rests == pytest.approx([0.04 * module.REST] * 3)


async def test_a_stored_walk_does_not_grow_with_the_users(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE", 500)
    chance = random.Random(5)

    async def size(first: int, last: int) -> int:
        await office.service.send(
            *(
                feedback(f"user-{number}", NOW_MS - chance.randrange(DAY_MS), dwell_ms=chance.randrange(86_400_000))
                for number in range(first, last)
            )
        )
        return len(msgspec.json.encode(await walked(office)))

    few = await size(0, 1_500)
    assert await size(1_500, 4_000) < 1.5 * few < 60_000


async def test_a_value_of_another_type_is_in_no_bin_and_counted(world: World) -> None:
    faulty = entry(name="faulty", compute="SELECT user_id, MAX(tip_id) AS value FROM views GROUP BY user_id")
    service = await world.open(Registry([faulty]))
    await service.send(served("ann"), served("bob"))
    found = await measured(Office(service))
    drift = found.features["faulty"].drift
    assert (drift.failed, drift.band, drift.psi, drift.bins) == (2, "failed", None, [])
    assert drift.why_not == "2 values could not be computed: the SQL gave text where int is declared"


async def test_slow_feature_is_computed_for_one_page_only(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE", 3)
    service = await world.open(Registry([entry(name="slow", compute=ENDLESS), entry(name="sound")]))
    monkeypatch.setattr(service.plain_source, "_timeout_s", 0.05)
    await service.send(*(served(f"user-{number}") for number in range(9)))
    office = Office(service)
    found = await measured(office)
    assert [{row.mask for row in asked} for asked in service.source.statements] == [{0b11}, {0b10}, {0b10}]
    drift = found.features["slow"].drift
    assert (drift.failed, drift.why_not) == (
        9,
        "9 values could not be computed: the SQL took longer than 50 ms for one user",
    )
    assert found.features["sound"].drift.failed == 0


async def test_there_is_no_drift_figure_when_the_history_is_short(office: Office) -> None:
    await office.service.send(*(served(f"user-{number}", NOW_MS - 10 * DAY_MS) for number in range(120)))
    drift = (await measured(office)).features["tip_volume_30d"].drift
    assert drift.psi is None
    assert drift.why_not is not None
    assert "the history begins at 2026-04-15" in drift.why_not


async def test_drift_is_stable_when_nothing_changes_and_major_when_much_does(office: Office) -> None:
    steady = [served(f"user-{n:03d}", NOW_MS - d * DAY_MS) for n in range(150) for d in (1, 9, 20, 36, 38)]
    await office.service.send(*steady)
    drift = (await measured(office)).features["tip_volume_30d"].drift
    assert (drift.psi, drift.band) == (0, "stable")
    await office.service.send(*(served(f"user-{n:03d}", NOW_MS - DAY_MS) for n in range(100)))
    drift = (await measured(office)).features["tip_volume_30d"].drift
    assert drift.band == "major"
