"""The five features in SQL equal a simple implementation in Python."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from app.events.ports import Admitted
from app.features.events import Action
from app.features.registry import indices
from app.profiles.online.compute import Computation
from app.profiles.ports import ComputeRow
from app.stores.sqlite.database import Database
from app.stores.sqlite.event_log import SqliteEventLog
from app.stores.sqlite.source import SqliteSource
from app.telemetry import Metrics
from tests.support import reference
from tests.support.clock import NOW_MS, FakeClock
from tests.support.database import wipe
from tests.support.events import admitted, feedback, served
from tests.support.registry import REGISTRY

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
USERS = ("ann", "bob", "Zoë …")
ACTIONS = tuple(Action)
# Whole hours, half hours and quarters of both signs, and the extremes of time zones and of the format.
OFFSETS = (0, 60, 120, 330, 345, 525, 840, -60, -210, -300, -570, -720, 1439, -1439)

moments = st.one_of(
    st.sampled_from([NOW_MS + delta for delta in (-1, 0, 1)]),
    st.sampled_from([NOW_MS - 30 * DAY_MS + delta for delta in (-1, 0, 1)]),
    # Few hours and whole ones, so that counts and last times tie.
    st.integers(1, 6).map(lambda hours: NOW_MS - hours * HOUR_MS),
    st.integers(-31 * DAY_MS, DAY_MS).map(lambda delta: NOW_MS + delta),
)
dwells = st.one_of(st.none(), st.integers(0, 86_400_000))


@st.composite
def facts(draw: st.DrawFn) -> Admitted:
    user_id, at_ms, offset_min = draw(st.sampled_from(USERS)), draw(moments), draw(st.sampled_from(OFFSETS))
    received_at_ms = draw(st.one_of(st.just(at_ms), moments))
    if draw(st.integers(0, 3)) == 0:
        return admitted(served(user_id, at_ms, offset_min=offset_min), received_at_ms)
    action = draw(st.sampled_from(ACTIONS))
    event = feedback(user_id, at_ms, action, dwell_ms=draw(dwells), offset_min=offset_min)
    return admitted(event, received_at_ms)


masks = st.one_of(st.just(REGISTRY.full_mask), st.integers(0, REGISTRY.full_mask))
users = st.sampled_from([*USERS, "unknown"])
rows = st.one_of(
    st.builds(ComputeRow, users, masks, moments, st.one_of(st.none(), moments), st.none()),
    st.builds(ComputeRow, users, masks, moments, st.none(), st.integers(0, 25)),
)

property_settings = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def expected(stored: list[Admitted], asked: ComputeRow, now_ms: int) -> dict[str, reference.Value]:
    """The values of the reference for a row."""
    live = asked.now_ms is None or asked.version is not None
    seen = stored[: asked.version]  # the first event has the number 1
    whole = reference.profile(seen, asked.user_id, now_ms, asked.known_ms, live=live)
    return {REGISTRY[index].name: whole[REGISTRY[index].name] for index in indices(asked.mask)}


def same(left: dict[str, reference.Value], right: dict[str, reference.Value]) -> bool:
    """Whether values and types are equal: 1 is not 1.0."""
    return left == right and [type(left[name]) for name in left] == [type(right[name]) for name in left]


async def store(database: Database, stored: list[Admitted]) -> Computation:
    await wipe(database)
    await SqliteEventLog(database).append([stored])
    return Computation(SqliteSource(database, REGISTRY), REGISTRY, FakeClock(), Metrics(), 2, random.Random(1))


async def assert_equal(database: Database, stored: list[Admitted], asked: list[ComputeRow]) -> None:
    """Assert that every row equals the reference."""
    computation = await store(database, stored)
    (first,) = await database.row("SELECT COALESCE(MIN(seq), 1) FROM event_log")
    answers = await computation.moments(
        [row if row.version is None else row._replace(version=first - 1 + row.version) for row in asked]
    )
    for row, outcomes in zip(asked, answers, strict=True):
        assert all(outcome.error is None for outcome in outcomes.values())
        values = {REGISTRY[index].name: msgspec.json.decode(value.json) for index, value in outcomes.items()}
        assert row.now_ms is not None
        wanted = expected(stored, row, row.now_ms)
        assert same(values, wanted), (row, values, wanted)


@property_settings
@given(stored=st.lists(facts(), max_size=25), asked=st.lists(rows, min_size=1, max_size=12))
async def test_features_equal_the_reference_at_any_moments(
    database: Database, stored: list[Admitted], asked: list[ComputeRow]
) -> None:
    await assert_equal(database, stored, asked)


@property_settings
@given(stored=st.lists(facts(), max_size=20), asked=st.dictionaries(st.sampled_from(USERS), masks, min_size=1))
@example(stored=[admitted(feedback("ann", NOW_MS + DAY_MS))], asked={"ann": REGISTRY.full_mask})
async def test_live_features_equal_the_reference_when_events_lie_ahead(
    database: Database, stored: list[Admitted], asked: dict[str, int]
) -> None:
    computation = await store(database, stored)
    computed = await computation.live(asked)
    for user_id, mask in asked.items():
        values = {REGISTRY[index].name: msgspec.json.decode(value.json) for index, value in computed[user_id].items()}
        assert same(values, expected(stored, ComputeRow(user_id, mask), NOW_MS))


def completed(at_ms: int, offset_min: int = 0) -> Admitted:
    return admitted(feedback("ann", at_ms, offset_min=offset_min))


async def profile_of(database: Database, stored: list[Admitted], now_ms: int = NOW_MS) -> dict[str, object]:
    computation = await store(database, stored)
    (outcomes,) = await computation.moments([ComputeRow("ann", REGISTRY.full_mask, now_ms)])
    return {REGISTRY[index].name: msgspec.json.decode(value.json) for index, value in outcomes.items()}


@pytest.mark.parametrize(
    ("delta_ms", "counted"),
    [(0, 1), (-1, 1), (1, 0), (-30 * DAY_MS, 0), (-30 * DAY_MS - 1, 0), (-30 * DAY_MS + 1, 1)],
)
async def test_window_is_exact_to_the_millisecond(database: Database, delta_ms: int, counted: int) -> None:
    at_ms = NOW_MS + delta_ms
    values = await profile_of(database, [admitted(served("ann", at_ms)), completed(at_ms)])
    assert values["tip_volume_30d"] == counted
    assert values["completion_rate_30d"] == (1.0 if counted else None)


@pytest.mark.parametrize(
    ("offset_min", "hour"),
    [(0, 23), (60, 0), (30, 0), (29, 23), (-1410, 0), (345, 5), (330, 5), (-210, 20), (840, 13), (-720, 11)],
)
async def test_preferred_hour_is_local(database: Database, offset_min: int, hour: int) -> None:
    half_past_eleven = NOW_MS - 12 * HOUR_MS - HOUR_MS // 2  # 23:30 UTC of the day before
    assert (await profile_of(database, [completed(half_past_eleven, offset_min)]))["preferred_hour"] == hour


AT_NINE, AT_EIGHT = NOW_MS - 3 * HOUR_MS, NOW_MS - 4 * HOUR_MS
COMPLETIONS = {
    "last completion": (
        [
            completed(AT_NINE - DAY_MS),
            completed(AT_EIGHT),
            completed(AT_NINE - 2 * DAY_MS),
            completed(AT_EIGHT - 5 * DAY_MS),
        ],
        8,
    ),
    "smaller hour": ([completed(NOW_MS, offset_min) for offset_min in (120, -60, 60)], 11),
    "more completions": ([completed(NOW_MS), completed(NOW_MS - HOUR_MS), completed(NOW_MS - HOUR_MS - DAY_MS)], 11),
}


@pytest.mark.parametrize("reason", COMPLETIONS)
async def test_preferred_hour_is_decided_by(database: Database, reason: str) -> None:
    stored, hour = COMPLETIONS[reason]
    assert (await profile_of(database, stored))["preferred_hour"] == hour


async def test_profile_has_defaults_when_a_user_has_no_event(database: Database) -> None:
    assert await profile_of(database, []) == {
        "completion_rate_30d": None,
        "dismiss_rate_30d": None,
        "mean_dwell_ms_30d": None,
        "preferred_hour": None,
        "tip_volume_30d": 0,
    }


async def test_mean_dwell_ignores_unknown_times(database: Database) -> None:
    stored = [admitted(feedback("ann", NOW_MS, "snoozed", dwell_ms=dwell)) for dwell in (None, 0, 5, None)]
    values = await profile_of(database, stored)
    assert values["mean_dwell_ms_30d"] == 2.5
    assert values["completion_rate_30d"] == 0.0
    assert values["preferred_hour"] is None
    unknown = [admitted(feedback("ann", NOW_MS, "snoozed"))]
    assert (await profile_of(database, unknown))["mean_dwell_ms_30d"] is None


async def test_late_event_counts_by_its_event_time(database: Database) -> None:
    late = admitted(feedback("ann", NOW_MS - 10 * DAY_MS, "dismissed"), received_at_ms=NOW_MS)
    computation = await store(database, [late])
    full, then = REGISTRY.full_mask, NOW_MS - 5 * DAY_MS
    asked = [ComputeRow("ann", full, then), ComputeRow("ann", full, then, then), ComputeRow("ann", full, then, NOW_MS)]
    known, unknown, known_later = [outcomes[1].json for outcomes in await computation.moments(asked)]
    assert (known, unknown, known_later) == (b"1.0", b"null", b"1.0")


@pytest.mark.slow
async def test_features_equal_the_reference_with_thousands_of_events(database: Database) -> None:
    chance = random.Random(20260425)
    users = [f"user-{number}" for number in range(40)]
    stored: list[Admitted] = []
    for _ in range(8_000):
        user_id, offset_min = chance.choice(users), chance.choice(OFFSETS)
        at_ms = NOW_MS - chance.randrange(40 * DAY_MS)
        if chance.random() < 0.4:
            stored.append(admitted(served(user_id, at_ms, offset_min=offset_min), at_ms + chance.randrange(DAY_MS)))
        else:
            dwell_ms = chance.choice([None, chance.randrange(86_400_001)])
            event = feedback(user_id, at_ms, chance.choice(ACTIONS), dwell_ms=dwell_ms, offset_min=offset_min)
            stored.append(admitted(event, at_ms + chance.randrange(DAY_MS)))
    ago = [None, NOW_MS - 7 * DAY_MS]
    asked = [
        ComputeRow(user_id, chance.randrange(1, REGISTRY.full_mask + 1), NOW_MS - days * DAY_MS, known_ms)
        for user_id in [*users, "unknown"]
        for days in (0, 12)
        for known_ms in ago
    ]
    await assert_equal(database, stored, asked)
