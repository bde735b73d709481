"""Which features are computed now: pauses that double, attempts that end them, and what admins have disabled."""

import json

import pytest

from app.features.registry import Registry
from app.profiles.availability import FAILED_USERS, FIRST_PAUSE_S, LONGEST_PAUSE_S, FeatureAvailability
from tests.support.clock import NOW_MS, FakeClock
from tests.support.entries import entry

REGISTRY = Registry([entry(name="one"), entry(name="two"), entry(name="three")])


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def features(clock: FakeClock) -> FeatureAvailability:
    return FeatureAvailability(REGISTRY, clock)


def waited(features: FeatureAvailability, clock: FakeClock) -> int:
    """Milliseconds until an attempt is due."""
    passed = 0
    while (due := features.due()) is None:
        clock.advance(500)
        passed += 500
    assert due[0] == 1
    return passed


def test_everything_is_available_at_first(features: FeatureAvailability) -> None:
    assert (features.unavailable, features.troubles(), features.due()) == (0, [], None)


def test_feature_is_paused_at_once_when_it_is_slow(features: FeatureAvailability) -> None:
    features.pause(1, "ann", "too slow", slow=True)
    assert features.unavailable == 0b10
    assert features.disabled == 0
    assert features.reason(1) == "too slow"
    assert [(item.feature, item.reason, item.since_ms) for item in features.troubles()] == [("two", "too slow", NOW_MS)]
    assert features.due() is None


def test_feature_is_paused_when_it_fails_for_users_in_a_row(features: FeatureAvailability) -> None:
    for number in range(FAILED_USERS - 1):
        features.failed(1, f"user-{number}", "overflow")
    features.failed(1, "user-0", "overflow")  # the same user again
    assert features.unavailable == 0
    assert features.troubles()[0].reason == "overflow"
    features.failed(1, "another", "overflow")
    assert features.unavailable == 0b10


def test_failures_are_forgotten_when_a_value_is_computed(features: FeatureAvailability) -> None:
    features.failed(1, "ann", "overflow")
    features.failed(1, "bob", "overflow")
    features.succeeded(1)
    assert features.troubles() == []
    features.failed(1, "cid", "overflow")
    assert features.unavailable == 0


def test_pause_doubles_up_to_a_bound_when_attempts_fail(features: FeatureAvailability, clock: FakeClock) -> None:
    features.pause(1, "ann", "too slow", slow=True)
    pauses = []
    for _ in range(12):
        pauses.append(waited(features, clock) / 1000)
        features.pause(1, "ann", "too slow", slow=True)
    doubled = [FIRST_PAUSE_S * 2**number for number in range(12)]
    assert pauses == [min(LONGEST_PAUSE_S, pause) for pause in doubled]


def test_pause_does_not_double_when_all_values_are_late(features: FeatureAvailability, clock: FakeClock) -> None:
    for user_id in ("ann", "bob", "cid"):
        features.pause(1, user_id, "too slow", slow=True)
    assert waited(features, clock) == FIRST_PAUSE_S * 1000


def test_one_attempt_is_made_at_a_time(features: FeatureAvailability, clock: FakeClock) -> None:
    features.pause(1, "ann", "too slow", slow=True)
    clock.advance(1_000)
    assert features.due() == (1, "ann")
    clock.advance(1_000_000)
    assert features.due() is None
    features.resume(1)
    assert (features.unavailable, features.troubles()) == (0, [])


def test_pause_goes_on_when_an_older_read_succeeds(features: FeatureAvailability) -> None:
    features.pause(1, "ann", "too slow", slow=True)
    features.succeeded(1)  # it was being computed for another user
    assert features.unavailable == 0b10


def test_failing_feature_is_tried_with_the_last_user(features: FeatureAvailability, clock: FakeClock) -> None:
    for user_id in ("ann", "bob", "cid"):
        features.failed(1, user_id, "overflow")
    features.withheld(1, "dan")
    clock.advance(1_000)
    assert features.due() == (1, "dan")


def test_slow_feature_is_tried_with_the_user_it_was_slow_for(features: FeatureAvailability, clock: FakeClock) -> None:
    features.pause(1, "ann", "too slow", slow=True)
    features.withheld(1, "dan")
    features.withheld(2, "dan")
    clock.advance(1_000)
    assert features.due() == (1, "ann")


def test_disabled_features_are_those_the_switches_name(clock: FakeClock) -> None:
    rows: list[tuple[str, str, str, int]] = []
    features = FeatureAvailability(REGISTRY, clock, lambda: json.dumps(rows))
    assert features.disabled_features() == {}
    rows += [("three", "ops", "a bug", NOW_MS), ("unknown", "ops", "", NOW_MS)]
    assert features.disabled == features.unavailable == 0b100
    assert features.reason(2) == "disabled by ops at 2026-04-25T12:00:00.000Z: a bug"
    assert [item.feature for item in features.disabled_features().values()] == ["three"]
    rows[:] = [("one", "ops", "", NOW_MS)]
    assert features.disabled == 0b1
    assert features.reason(0) == "disabled by ops at 2026-04-25T12:00:00.000Z"
    rows.clear()
    assert (features.disabled, features.disabled_features()) == (0, {})
    assert features.troubles() == []


def test_disabled_is_the_reason_when_a_feature_also_fails(clock: FakeClock) -> None:
    features = FeatureAvailability(REGISTRY, clock, lambda: json.dumps([("one", "ops", "", NOW_MS)]))
    features.pause(0, "ann", "too slow", slow=True)
    assert features.reason(0).startswith("disabled by ops")


def test_disabled_feature_is_not_tried() -> None:
    clock, switches = FakeClock(), ["[]"]
    availability = FeatureAvailability(REGISTRY, clock, lambda: switches[0])
    for index in (0, 1):
        availability.pause(index, "ann", "it takes too long", slow=True)
    clock.advance(int(FIRST_PAUSE_S * 1000))
    switches[0] = json.dumps([[REGISTRY.names[0], "ada", "too slow", 0]])
    assert [item.feature for item in availability.troubles()] == [REGISTRY.names[1]]
    assert (availability.due(), availability.due()) == ((1, "ann"), None)
    switches[0] = "[]"
    assert [item.feature for item in availability.troubles()] == list(REGISTRY.names[:2])
    assert availability.due() == (0, "ann")
