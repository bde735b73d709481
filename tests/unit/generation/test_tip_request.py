"""Profile traits: words for allowed features only, and no number but the hour."""

import math
import re
from collections.abc import Mapping

import pytest
from hypothesis import given

from app.features.registry import Scalar
from app.generation.tip_request import ALLOWED, Mood, Traits, described, traits_of
from tests.support.registry import REGISTRY
from tests.support.tip_requests import FEATURES, HABITS


def test_allowed_features_are_in_the_registry() -> None:
    assert set(ALLOWED) <= set(REGISTRY.names)


WORDS: list[tuple[Mapping[str, Scalar] | None, str]] = [
    (None, ""),
    ({}, ""),
    (dict.fromkeys(ALLOWED), ""),
    ({"email": "ada@example.com", "snooze_rate_30d": 0.9}, ""),
    (HABITS, "usually completes tips; hardly ever dismisses tips; most active around 9:00"),
    ({"completion_rate_30d": 0.6}, "usually completes tips"),
    ({"completion_rate_30d": 0.59}, "sometimes completes tips"),
    ({"completion_rate_30d": 0.35}, "sometimes completes tips"),
    ({"completion_rate_30d": 0.34}, "seldom completes tips"),
    ({"completion_rate_30d": 0}, "seldom completes tips"),
    ({"dismiss_rate_30d": 0.4}, "often dismisses tips"),
    ({"dismiss_rate_30d": 0.2}, ""),
    ({"dismiss_rate_30d": 0.09}, "hardly ever dismisses tips"),
    ({"mean_dwell_ms_30d": 2_999.0}, "reads tips briefly"),
    ({"mean_dwell_ms_30d": 3_000.0}, ""),
    ({"mean_dwell_ms_30d": 15_000.0}, "reads tips at length"),
    ({"preferred_hour": 0}, "most active around 0:00"),
    ({"preferred_hour": 23}, "most active around 23:00"),
    ({"tip_volume_30d": 0}, "new to tips"),
    ({"tip_volume_30d": 100}, "has seen many tips"),
    ({"tip_volume_30d": 0, "completion_rate_30d": 0.9}, "usually completes tips"),
    ({"tip_volume_30d": 2, "completion_rate_30d": 1.0, "dismiss_rate_30d": 0.0}, "new to tips"),
]


def test_traits_follow_the_values() -> None:
    for features, words in WORDS:
        assert described(traits_of(features)) == words, features


def test_value_out_of_range_gives_no_trait() -> None:
    for rate in (-0.1, 1.1, math.nan, math.inf, 10**400, "0.9", True, None):
        for hour in (-1, 24, -(10**400), "9", True):
            given: dict[str, Scalar] = {"completion_rate_30d": rate, "dismiss_rate_30d": rate, "preferred_hour": hour}
            assert traits_of(given) == Traits(), given


@given(FEATURES)
def test_traits_contain_no_number_but_the_hour(features: dict[str, Scalar] | None) -> None:
    traits = traits_of(features)
    numbers = re.findall(r"[0-9]+(?::00)?", described(traits))
    assert numbers == ([] if traits.hour is None else [f"{traits.hour}:00"])


@pytest.mark.parametrize(
    ("traits", "mood"),
    [
        (Traits(), "unknown"),
        (Traits(hour=9, tips="many"), "unknown"),
        (Traits(completes="usually"), "finisher"),
        (Traits(completes="sometimes", dismisses="hardly ever"), "mixed"),
        (Traits(completes="seldom"), "hesitant"),
        (Traits(completes="usually", dismisses="often"), "wary"),
    ],
)
def test_mood_follows_the_traits(traits: Traits, mood: Mood) -> None:
    assert traits.mood == mood
