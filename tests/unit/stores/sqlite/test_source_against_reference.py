"""The five features in SQL equal a simple implementation in Python."""

import random
from datetime import timedelta

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from app.events.ports import Admitted
from app.features.events import Action, TipFeedback, TipServed
from app.features.registry import Registry, indices
from app.profiles.online.compute import Computation
from app.profiles.ports import END_OF_TIME_MS, ComputeRow
from app.stores.sqlite.database import SqliteDatabase
from app.stores.sqlite.event_log import SqliteEventLog
from app.stores.sqlite.features import SqliteSource, compile_registry
from app.telemetry import Metrics
from tests.support import reference
from tests.support.clock import NOW_MS, FakeClock
from tests.support.database import wipe
from tests.support.entries import entry
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

property_settings = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def expected(stored: list[Admitted], asked: ComputeRow, now_ms: int) -> dict[str, reference.Value]:
    """The values of the reference for a row."""
    live = asked.now_ms is None or asked.version is not None
    seen = stored[: asked.version]  # the first event has the number 1
    whole = reference.profile(seen, asked.user_id, now_ms, asked.known_ms, live=live)
    return {REGISTRY[index].name: whole[REGISTRY[index].name] for index in indices(asked.mask)}


def same(left: dict[str, reference.Value], right: dict[str, reference.Value]) -> bool:
    """Whether values and types are equal: 1 is not 1.0."""
    return left == right and [type(left[name]) for name in left] == [type(right[name]) for name in left]


async def store(database: SqliteDatabase, stored: list[Admitted]) -> Computation:
    await wipe(database)
    await SqliteEventLog(database).append([stored])
    return Computation(SqliteSource(database, REGISTRY), REGISTRY, FakeClock(), Metrics(), 2, random.Random(1))


async def assert_equal(database: SqliteDatabase, stored: list[Admitted], asked: list[ComputeRow]) -> None:
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
    database: SqliteDatabase, stored: list[Admitted], asked: list[ComputeRow]
) -> None:
    await assert_equal(database, stored, asked)


@property_settings
@given(stored=st.lists(facts(), max_size=20), asked=st.dictionaries(st.sampled_from(USERS), masks, min_size=1))
@example(stored=[admitted(feedback("ann", NOW_MS + DAY_MS))], asked={"ann": REGISTRY.full_mask})
async def test_live_features_equal_the_reference_when_events_lie_ahead(
    database: SqliteDatabase, stored: list[Admitted], asked: dict[str, int]
) -> None:
    computation = await store(database, stored)
    computed = await computation.live(asked)
    for user_id, mask in asked.items():
        values = {REGISTRY[index].name: msgspec.json.decode(value.json) for index, value in computed[user_id].items()}
        assert same(values, expected(stored, ComputeRow(user_id, mask), NOW_MS))


LATE = [admitted(served("ann", NOW_MS - 40 * DAY_MS))]  # older than everything that is stored, and than the window
SAME_MS = [admitted(feedback("ann", NOW_MS - 5, dwell_ms=7)) for _ in range(9)]
AHEAD = [admitted(feedback("ann", NOW_MS + 400))]  # stored by a process whose clock is ahead


@property_settings
@given(stored=st.lists(facts(), max_size=12), at_ms=moments)
@example(stored=[], at_ms=NOW_MS)
@example(stored=LATE, at_ms=NOW_MS)
@example(stored=SAME_MS, at_ms=NOW_MS)
@example(stored=SAME_MS + AHEAD + LATE, at_ms=NOW_MS)
async def test_value_is_right_until_it_expires(database: SqliteDatabase, stored: list[Admitted], at_ms: int) -> None:
    """At every moment at which the reference's value can change before the expiry, and a millisecond around it."""
    await store(database, stored)
    source = SqliteSource(database, REGISTRY)
    computation = Computation(source, REGISTRY, FakeClock(at_ms), Metrics(), 2, random.Random(1))
    asked = dict.fromkeys(USERS, REGISTRY.full_mask)
    computed = await computation.live(asked)
    snapshot = await source.compute(at_ms, [ComputeRow(user_id, REGISTRY.full_mask) for user_id in USERS])
    edges = [fact.occurred_at_ms + reference.THIRTY_DAYS_MS + delta for fact in stored for delta in (-1, 0, 1)]
    for user_id, leaves_ms in zip(USERS, snapshot.leaves_ms, strict=True):
        for index, value in computed[user_id].items():
            name, expires_at_ms = REGISTRY[index].name, value.expires_at_ms
            assert expires_at_ms is not None
            assert at_ms < expires_at_ms <= min(at_ms + REGISTRY[index].ttl_ms, leaves_ms[index])
            for moment in {at_ms, leaves_ms[index] - 1, *edges}:
                if at_ms <= moment < leaves_ms[index]:
                    assert reference.profile(stored, user_id, moment, live=True)[name] == msgspec.json.decode(
                        value.json
                    )
            relation = TipServed if name == "tip_volume_30d" else TipFeedback
            counted = [
                fact.occurred_at_ms
                for fact in stored
                if fact.event.user_id == user_id
                and isinstance(fact.event, relation)
                and fact.occurred_at_ms > at_ms - reference.THIRTY_DAYS_MS
            ]
            assert leaves_ms[index] == min(counted, default=END_OF_TIME_MS - reference.THIRTY_DAYS_MS) + (
                reference.THIRTY_DAYS_MS
            )


async def test_windows_of_features_are_apart(database: SqliteDatabase) -> None:
    day = entry(
        name="day", compute="SELECT user_id, COUNT(*) AS value FROM views GROUP BY user_id", window=timedelta(1)
    )
    both = entry(
        name="both",
        compute="""
            SELECT user_id, COUNT(*) AS value FROM (SELECT user_id FROM views UNION ALL SELECT user_id FROM feedback)
        """,
        window=timedelta(days=2),
    )
    registry = compile_registry(Registry([day, both, *REGISTRY]))
    await store(
        database, [admitted(served("ann", NOW_MS - 3_600_000)), admitted(feedback("ann", NOW_MS - 100_000_000))]
    )
    snapshot = await SqliteSource(database, registry).compute(NOW_MS, [ComputeRow("ann", registry.full_mask)])
    of_view, of_feedback = NOW_MS - 3_600_000, NOW_MS - 100_000_000
    expected_ms = [of_view + DAY_MS, of_feedback + 2 * DAY_MS, *[of_feedback + 30 * DAY_MS] * 4, of_view + 30 * DAY_MS]
    assert list(snapshot.leaves_ms[0]) == expected_ms


def completed(at_ms: int, offset_min: int = 0) -> Admitted:
    return admitted(feedback("ann", at_ms, offset_min=offset_min))


async def profile_of(database: SqliteDatabase, stored: list[Admitted], now_ms: int = NOW_MS) -> dict[str, object]:
    computation = await store(database, stored)
    (outcomes,) = await computation.moments([ComputeRow("ann", REGISTRY.full_mask, now_ms)])
    return {REGISTRY[index].name: msgspec.json.decode(value.json) for index, value in outcomes.items()}


@pytest.mark.parametrize(
    ("delta_ms", "counted"),
    [(0, 1), (-1, 1), (1, 0), (-30 * DAY_MS, 0), (-30 * DAY_MS - 1, 0), (-30 * DAY_MS + 1, 1)],
)
async def test_window_is_exact_to_the_millisecond(database: SqliteDatabase, delta_ms: int, counted: int) -> None:
    at_ms = NOW_MS + delta_ms
    values = await profile_of(database, [admitted(served("ann", at_ms)), completed(at_ms)])
    assert values["tip_volume_30d"] == counted
    assert values["completion_rate_30d"] == (1.0 if counted else None)


@pytest.mark.parametrize(
    ("offset_min", "hour"),
    [(0, 23), (60, 0), (30, 0), (29, 23), (-1410, 0), (345, 5), (330, 5), (-210, 20), (840, 13), (-720, 11)],
)
async def test_preferred_hour_is_local(database: SqliteDatabase, offset_min: int, hour: int) -> None:
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
async def test_preferred_hour_is_decided_by(database: SqliteDatabase, reason: str) -> None:
    stored, hour = COMPLETIONS[reason]
    assert (await profile_of(database, stored))["preferred_hour"] == hour


async def test_profile_has_defaults_when_a_user_has_no_event(database: SqliteDatabase) -> None:
    assert await profile_of(database, []) == {
        "completion_rate_30d": None,
        "dismiss_rate_30d": None,
        "mean_dwell_ms_30d": None,
        "preferred_hour": None,
        "tip_volume_30d": 0,
    }


async def test_mean_dwell_ignores_unknown_times(database: SqliteDatabase) -> None:
    stored = [admitted(feedback("ann", NOW_MS, "snoozed", dwell_ms=dwell)) for dwell in (None, 0, 5, None)]
    values = await profile_of(database, stored)
    assert values["mean_dwell_ms_30d"] == 2.5
    assert values["completion_rate_30d"] == 0.0
    assert values["preferred_hour"] is None
    unknown = [admitted(feedback("ann", NOW_MS, "snoozed"))]
    assert (await profile_of(database, unknown))["mean_dwell_ms_30d"] is None


async def test_late_event_counts_by_its_event_time(database: SqliteDatabase) -> None:
    late = admitted(feedback("ann", NOW_MS - 10 * DAY_MS, "dismissed"), received_at_ms=NOW_MS)
    computation = await store(database, [late])
    full, then = REGISTRY.full_mask, NOW_MS - 5 * DAY_MS
    asked = [ComputeRow("ann", full, then), ComputeRow("ann", full, then, then), ComputeRow("ann", full, then, NOW_MS)]
    known, unknown, known_later = [outcomes[1].json for outcomes in await computation.moments(asked)]
    assert (known, unknown, known_later) == (b"1.0", b"null", b"1.0")


@pytest.mark.slow
async def test_features_equal_the_reference_with_thousands_of_events(database: SqliteDatabase) -> None:
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
