"""The measurement: figures that tie out, values that are those of the reads, and a uniform sample in bounded time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import app.profiles.quality.measurement as module
from app.errors import StoreUnavailable
from app.features.clock import DAY_MS
from app.features.events import TipEvent
from app.features.registry import Registry
from app.profiles.consistency.inspection import Inspection, Inspector
from app.profiles.online.cache_protocol import FeatureValue, encode
from app.profiles.ports import Cell, ComputeRow
from app.profiles.quality.report import QualityReport
from app.stores.valkey.cache import key
from tests.integration.profiles.quality.fixture import QualityFixture
from tests.support import reference
from tests.support.clock import NOW_MS
from tests.support.database import wipe
from tests.support.entries import entry
from tests.support.events import admitted, feedback, served
from tests.support.registry import REGISTRY
from tests.support.servers import ask
from tests.support.service import PausableService
from tests.support.service_group import ServiceGroup

pytestmark = pytest.mark.both_engines

WEEK_MS = 7 * DAY_MS
ENDLESS = """
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)
SELECT user_id, COUNT(*) AS value FROM views, n GROUP BY user_id
"""
held = settings(max_examples=settings().max_examples // 4, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def fixture(service: PausableService, monkeypatch: pytest.MonkeyPatch) -> QualityFixture:
    monkeypatch.setattr(module, "PAGE", 3)
    return QualityFixture(service)


def ties_out(found: QualityReport) -> None:
    assert found.measured <= found.eligible
    assert found.measured_before <= found.eligible_before
    for figures in found.features.values():
        assert (figures.eligible, figures.measured) == (found.eligible, found.measured)
        drift = figures.drift
        assert sum(part.now for part in drift.bins) + sum(part.before for part in drift.bins) + drift.failed == (
            found.measured + found.measured_before
        )
        assert (drift.psi is None) == (drift.band is None) == (drift.why_not is not None)
        if not found.cache_answered:
            assert (figures.fresh, figures.missing, figures.stale, figures.ages_ms, figures.intervals) == (None,) * 5
            continue
        assert figures.fresh is not None
        assert figures.missing is not None
        assert figures.stale is not None
        assert figures.fresh + figures.missing + figures.stale == figures.measured
        assert figures.intervals is not None
        for count, interval in ((figures.fresh, figures.intervals.fresh), (figures.stale, figures.intervals.stale)):
            if interval is not None:
                low, high = interval
                assert low <= count / figures.measured <= high
                assert found.measured < found.eligible or low == high


async def put(group: ServiceGroup, service: PausableService, user: str, feature: str, seq: int) -> None:
    """Put a value past the protocol."""
    now_ms = service.clock.now_ms()
    epoch, _ = await service.cache.inner.read([Cell(user, feature)])
    value = FeatureValue(service.registry.named(feature).fingerprint.encode(), seq, now_ms, now_ms + 60_000, b"1")
    ask(group.server, "SET", key(epoch, Cell(user, feature)), encode(value))


async def test_figures_tie_out_for_each_state(fixture: QualityFixture, group: ServiceGroup) -> None:
    service = fixture.service
    await service.send(*(served(user) for user in ("ann", "bob", "cyd", "dee")), served("old", NOW_MS - 31 * DAY_MS))
    await service.send(feedback("ann"))
    await service.batch(["ann", "bob", "old"])
    await service.drain()
    await put(group, service, "cyd", "tip_volume_30d", seq=1)
    found = await fixture.quality.measure()
    ties_out(found)
    assert (found.eligible, found.eligible_before, found.cache_answered) == (4, 1, True)
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
    return [
        served(user, now_ms - ago) if kind == "served" else feedback(user, now_ms - ago, kind, dwell_ms=dwell)
        for user, ago, kind, dwell in facts
    ]


@held
@given(facts=events, steps=moves)
async def test_figures_tie_out_for_any_history(
    fixture: QualityFixture,
    group: ServiceGroup,
    facts: list[tuple[str, int, str, int | None]],
    steps: list[tuple[str, int]],
) -> None:
    service = fixture.service
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
            await put(group, service, user, feature, seq=0)
        else:
            await service.send(served(user, service.clock.now_ms()))
    found = await fixture.quality.measure()
    ties_out(found)
    now_ms = service.clock.now_ms()
    assert found.eligible == found.measured == await fixture.users.count_eligible(now_ms - 30 * DAY_MS)


@held
@given(facts=events)
async def test_values_equal_reads_at_both_times(
    fixture: QualityFixture, facts: list[tuple[str, int, str, int | None]]
) -> None:
    service = fixture.service
    now_ms = service.clock.now_ms()
    stored = [admitted(event, now_ms) for event in built(facts, now_ms)]
    await wipe(service.database)
    if stored:
        await service.ingestor.log.append([stored])
    found = await fixture.quality.measure()
    for moment_ms, side in ((now_ms, "now"), (now_ms - WEEK_MS, "before")):
        users = {fact.event.user_id for fact in stored if moment_ms - 30 * DAY_MS <= fact.occurred_at_ms <= moment_ms}
        plain = [reference.profile(stored, user, moment_ms) for user in users]
        for name, figures in found.features.items():
            counts = {(part.kind, part.value): getattr(part, side) for part in figures.drift.bins}
            wanted = Counter(values[name] for values in plain)
            assert counts.get(("null", None), 0) == wanted.pop(None, 0)
            if REGISTRY.named(name).dtype == "int":  # few enough for a bin each
                assert {part: count for part, count in counts.items() if part[0] == "value" and count} == {
                    ("value", value): count for value, count in wanted.items()
                }
            else:
                assert sum(getattr(part, side) for part in figures.drift.bins if part.kind != "null") == wanted.total()


async def test_values_are_measured_when_the_cache_fails(
    fragile_world: ServiceGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAGE", 3)
    service = await fragile_world.open()
    await service.send(*(served(f"user-{number}") for number in range(8)))
    measuring = await fragile_world.stopped_at(service.source.after, QualityFixture(service).quality.measure())
    fragile_world.server.kill()
    service.go()
    found = await measuring
    ties_out(found)
    assert (found.measured, found.cache_answered) == (8, False)
    assert [part.now for part in found.features["tip_volume_30d"].drift.bins] == [8]


@pytest.mark.parametrize(("silences", "answered"), [(1, True), (module.TRIES - 1, True), (module.TRIES, False)])
async def test_short_silence_of_the_cache_is_bridged(
    fixture: QualityFixture, monkeypatch: pytest.MonkeyPatch, silences: int, answered: bool
) -> None:
    await fixture.service.send(*(served(f"user-{number}") for number in range(8)))
    inner = fixture.inspector.inspect
    left = silences

    meanwhile = False

    async def look(user_ids: Sequence[str]) -> list[Inspection]:
        nonlocal left, meanwhile
        found = await inner(user_ids, compute=False)
        if meanwhile and left:
            left -= 1
            return [inspection._replace(cache="away") for inspection in found]
        meanwhile = True
        return found

    monkeypatch.setattr(Inspector, "inspect", lambda _, user_ids, **__: look(user_ids))
    found = await fixture.quality.measure()
    assert (found.cache_answered, found.measured) == (answered, 8)
    ties_out(found)
    assert fixture.pauses.count(module.TRY_AGAIN_S) == min(silences, module.TRIES - 1)


async def test_measurement_does_not_wait_for_an_unreachable_cache(
    fixture: QualityFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fixture.service.send(*(served(f"user-{number}") for number in range(8)))
    monkeypatch.setattr(type(fixture.service.cache), "available", False)
    assert (await fixture.quality.measure()).cache_answered is False
    assert module.TRY_AGAIN_S not in fixture.pauses


async def test_next_measurement_is_made_when_one_fails(
    fixture: QualityFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fixture.service.send(*(served(f"user-{number}") for number in range(5)))

    async def locked(*_: object) -> None:
        raise StoreUnavailable("locked")

    with monkeypatch.context() as patch:
        patch.setattr(fixture.service.source, "compute", locked)
        with pytest.raises(StoreUnavailable):
            await fixture.quality.measure()
    assert (await fixture.quality.measure()).measured == 5


async def test_measurement_does_not_pause_when_late(fixture: QualityFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    await fixture.service.send(*(served(f"user-{number}") for number in range(9)))
    inner = fixture.service.source.compute

    async def slow(*asked: object) -> object:
        fixture.service.clock.advance(1_000)
        return await inner(*asked)  # type: ignore[arg-type]

    monkeypatch.setattr(fixture.service.source, "compute", slow)
    # A third of the users may take 1.5 s, and takes 1 s; the pauses take no time by this clock.
    await fixture.quality.measure(budget_s=4.5 / module.PACE)
    assert [pause for pause in fixture.pauses if pause] == pytest.approx([0.5, 1.0, 1.5])


async def test_request_needs_a_measurement_begun_after_it(fixture: QualityFixture, group: ServiceGroup) -> None:
    service = fixture.service
    await service.send(served("ann"))
    first = await group.stopped_at(service.source.after, fixture.quality.measure())
    await service.send(served("abe"))
    later = await group.started(fixture.quality.measure())
    service.go()
    assert (await first).eligible == 1
    assert (await later).eligible == 2


async def test_sample_is_measured_when_users_are_many(fixture: QualityFixture) -> None:
    users = [f"user-{number:03}" for number in range(200)]
    await fixture.service.send(*(served(user, NOW_MS - days * DAY_MS) for user in users for days in (1, 20)))
    await fixture.service.batch(users[:100])
    await fixture.service.drain()
    fixture.quality.sample = 50
    found = await fixture.quality.measure()
    ties_out(found)
    assert (found.eligible, found.measured, found.eligible_before, found.measured_before) == (200, 50, 200, 50)
    assert found.margin == pytest.approx(0.12, abs=0.01)
    figures = found.features["tip_volume_30d"]
    assert figures.intervals is not None
    assert figures.intervals.fresh is not None
    low, high = figures.intervals.fresh
    assert 0 < low < 0.5 < high < 1
    assert figures.stale == 0
    again = await QualityFixture(fixture.service).quality.measure()
    assert (again.measured, again.margin) == (200, 0)


async def test_fewer_users_are_measured_when_time_runs_out(
    fixture: QualityFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = [f"user-{number:02}" for number in range(40)]
    await fixture.service.send(*(served(user, NOW_MS - days * DAY_MS) for user in users for days in (1, 20)))
    inner = fixture.service.source.compute
    computed: set[str] = set()

    async def slow(now_ms: int, asked: Sequence[ComputeRow]) -> object:
        fixture.service.clock.advance(1_000)
        computed.update(row.user_id for row in asked if row.now_ms == NOW_MS)
        return await inner(now_ms, asked)

    monkeypatch.setattr(fixture.service.source, "compute", slow)
    found = await fixture.quality.measure(budget_s=3.5)
    ties_out(found)
    assert (found.eligible, found.measured, found.measured_before) == (40, 12, 12)
    assert computed != set(users[:12])  # in random order: otherwise they would be no sample
    assert (await fixture.quality.measure(budget_s=0)).measured == 3


async def test_measurement_pauses_after_each_page(fixture: QualityFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    await fixture.service.send(*(served(f"user-{number}") for number in range(7)))
    clock = fixture.service.clock
    inner = fixture.service.source.compute

    async def slow(*asked: object) -> object:
        clock.advance(40)
        return await inner(*asked)  # type: ignore[arg-type]

    monkeypatch.setattr(fixture.service.source, "compute", slow)
    await fixture.quality.measure()
    assert [pause for pause in fixture.pauses if pause] == pytest.approx([0.04 * module.REST] * 3)


async def test_draw_pauses_for_its_share_of_the_budget(
    fixture: QualityFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fixture.service.send(*(served(f"user-{number}") for number in range(9)))
    clock, eligible, compute = fixture.service.clock, fixture.users.eligible, fixture.service.source.compute

    async def slow_page(*asked: object) -> object:
        clock.advance(1_000)
        return await eligible(*asked)  # type: ignore[arg-type]

    async def slow(*asked: object) -> object:
        clock.advance(40)
        return await compute(*asked)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "DRAW_PAGE", 3)
    monkeypatch.setattr(fixture.users, "eligible", slow_page)
    monkeypatch.setattr(fixture.service.source, "compute", slow)
    await fixture.quality.measure(budget_s=4 / module.DRAW_SHARE)
    # The time that the draw took does not shorten the pauses after it.
    assert [pause for pause in fixture.pauses if pause] == pytest.approx([3, 2, 1, *[0.04 * module.REST] * 3])


async def test_value_of_another_type_is_in_no_bin_and_counted(group: ServiceGroup) -> None:
    faulty = entry(name="faulty", compute="SELECT user_id, MAX(tip_id) AS value FROM views GROUP BY user_id")
    service = await group.open(Registry([faulty]))
    await service.send(served("ann"), served("bob"))
    found = await QualityFixture(service).quality.measure()
    drift = found.features["faulty"].drift
    assert (drift.failed, drift.band, drift.psi, drift.bins) == (2, "failed", None, [])
    assert drift.why_not == "2 values could not be computed: the SQL gave text where int is declared"


@pytest.mark.slow
async def test_slow_feature_is_computed_for_one_page_only(group: ServiceGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE", 3)
    registry = Registry([entry(name="slow", compute=ENDLESS), entry(name="sound")])
    service = await group.open(registry, statement_timeout_ms=1_000)
    await service.send(*(served(f"user-{number}") for number in range(9)))
    fixture = QualityFixture(service)
    found = await fixture.quality.measure()
    assert [{row.mask for row in asked} for asked in service.source.statements] == [{0b11}, {0b10}, {0b10}]
    drift = found.features["slow"].drift
    assert (drift.failed, drift.why_not) == (
        9,
        "9 values could not be computed: the SQL took longer than 1,000 ms for one user",
    )
    assert found.features["sound"].drift.failed == 0


async def test_there_is_no_drift_figure_when_the_history_is_short(fixture: QualityFixture) -> None:
    await fixture.service.send(*(served(f"user-{number}", NOW_MS - 10 * DAY_MS) for number in range(120)))
    drift = (await fixture.quality.measure()).features["tip_volume_30d"].drift
    assert drift.psi is None
    assert drift.why_not is not None
    assert "the history begins at 2026-04-15" in drift.why_not


async def test_drift_is_stable_when_nothing_changes_and_major_when_much_does(fixture: QualityFixture) -> None:
    steady = [served(f"user-{n:03d}", NOW_MS - d * DAY_MS) for n in range(150) for d in (1, 9, 20, 36, 38)]
    await fixture.service.send(*steady)
    drift = (await fixture.quality.measure()).features["tip_volume_30d"].drift
    assert (drift.psi, drift.band) == (0, "stable")
    await fixture.service.send(*(served(f"user-{n:03d}", NOW_MS - DAY_MS) for n in range(100)))
    drift = (await fixture.quality.measure()).features["tip_volume_30d"].drift
    assert drift.band == "major"


async def test_sample_is_uniform_among_eligible_users(fixture: QualityFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"user-{number}" for number in range(8)]
    await fixture.service.send(*(served(name, NOW_MS - DAY_MS) for name in (*names[:5], *names[:5])))
    await fixture.service.send(*(feedback(name, NOW_MS - DAY_MS) for name in names[3:]))
    await fixture.service.send(served("too-old", NOW_MS - 3 * DAY_MS), served("too-new", NOW_MS))
    monkeypatch.setattr(module, "DRAW_PAGE", 3)
    span, pause, clock = (NOW_MS - 2 * DAY_MS, NOW_MS - 1), fixture.quality.pause, fixture.service.clock
    random, times, first = Random(7), Counter[str](), Counter[str]()
    for _ in range(400):
        total, drawn = await module.draw(fixture.users.eligible, span, 3, random, pause, clock)
        assert (total, len(set(drawn))) == (8, 3)
        times.update(drawn)
        first.update(drawn[:1])
    # Each is drawn 150 times (standard deviation 9.7) and stands first 50 times (6.6).
    assert times.keys() == first.keys() == set(names)
    assert all(abs(count - 150) < 4 * 9.7 for count in times.values()), times
    assert all(abs(count - 50) < 4 * 6.6 for count in first.values()), first
    same = [await module.draw(fixture.users.eligible, span, 9, Random(1), pause, clock) for _ in range(2)]
    assert same[0] == same[1]
    assert sorted(same[0][1]) == names
