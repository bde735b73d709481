"""Specs: bounded transforms, a hash that covers all of them, and a prior precision derived from the bounds."""

import math
from base64 import b64encode
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import NODEFAULT

from app.bandit.model import inputs
from app.bandit.model.definitions import NEW_PRECISION, VERSIONS
from app.bandit.model.inputs import (
    PROFILE_FEATURES,
    SPEC_V1,
    SPEC_V2,
    SPECS,
    Candidate,
    Context,
    Input,
    Profile,
    Spec,
    packed,
)
from tests.support.registry import REGISTRY
from tests.support.score_requests import MORNING, PROFILE, candidates, contexts, numbers, profiles, tip

TIP = tip("a", is_overdue=True, task_age_days=10.0, priority=3.0)
OLD = SPEC_V1.size
GROWN_WITHIN = 1000  # decisions
VECTORS = msgspec.json.decode((Path(__file__).parent / "vectors.json").read_bytes())
HASHES = {
    1: "8d5f60760b330b03ccd8e8002672687e2da86c0124b51eb4e74bf5916e6c3a93",
    2: "dd4bd9b905e81fe314a0ff986a76f4e3b6f76d11cccbab17fec6650e6248d35b",
}


def test_v2_begins_with_v1() -> None:
    assert (SPEC_V1.size, SPEC_V2.size) == (6, 25)
    assert SPEC_V1.names == ("intercept", "is_overdue", "task_age", "priority", "hour_cos", "hour_sin")
    assert SPEC_V2.names[:OLD] == SPEC_V1.names
    assert SPEC_V2.names[OLD] == "profile_present"
    assert SPEC_V2.names[OLD + 1 : OLD + 4] == (
        "completion_x_is_overdue",
        "completion_x_task_age",
        "completion_x_priority",
    )
    assert len(set(SPEC_V2.names)) == SPEC_V2.size
    assert SPEC_V1.prefix_of(SPEC_V2)
    assert not SPEC_V2.prefix_of(SPEC_V1)


def test_a_spec_is_added_and_never_edited() -> None:
    # Statistics and decisions are stored with these hashes. A new spec adds a line to `HASHES`.
    assert {spec.version: spec.hash for spec in SPECS.values()} == HASHES


@pytest.mark.parametrize("stored", VECTORS)
def test_stored_requests_give_the_vectors_of_the_release_that_stored_them(stored: dict[str, Any]) -> None:
    request = stored["request"]
    tips = msgspec.convert(request["candidates"], list[Candidate])
    context = msgspec.convert({"at": request["at"]}, Context)
    for spec, name in ((SPEC_V1, "v1"), (SPEC_V2, "v2")):
        assert b64encode(packed(spec.phi(tips, context, request["profile"]))).decode() == stored[name]


def test_later_versions_require_nothing_of_older_clients() -> None:
    for version in VERSIONS[1:]:
        for feature in (*version.candidate, *version.context):
            assert feature.default is not NODEFAULT
            assert msgspec.convert(feature.default, feature.type) == feature.default


@pytest.mark.parametrize(
    "changed",
    [
        msgspec.structs.replace(SPEC_V1, id="others"),
        msgspec.structs.replace(SPEC_V1, version=3),
        msgspec.structs.replace(SPEC_V1, pooled=True),
        msgspec.structs.replace(SPEC_V1, inputs=SPEC_V1.inputs[::-1]),
        msgspec.structs.replace(SPEC_V1, inputs=SPEC_V1.inputs[:-1]),
        msgspec.structs.replace(SPEC_V1, inputs=(Input("other"), *SPEC_V1.inputs[1:])),
        msgspec.structs.replace(SPEC_V1, inputs=(Input("intercept", precision=2.0), *SPEC_V1.inputs[1:])),
        msgspec.structs.replace(SPEC_V1, inputs=(Input("intercept", shared="dwell"), *SPEC_V1.inputs[1:])),
    ],
)
def test_hash_changes_with_any_part_of_the_spec(changed: Spec) -> None:
    assert changed.hash != SPEC_V1.hash


@pytest.mark.parametrize(("factors", "name"), [("CANDIDATE_FACTORS", "priority"), ("SHARED_FACTORS", "hour_cos")])
def test_hash_changes_with_a_formula(factors: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, factors, {**getattr(inputs, factors), name: "something else"})
    assert msgspec.structs.replace(SPEC_V1).hash != SPEC_V1.hash


def test_phi_follows_the_formulas() -> None:
    at = datetime(2026, 3, 2, 9, 30, 36, tzinfo=timezone(timedelta(hours=5)))
    hour = 9 + 30 / 60 + 36 / 3600
    age = math.log(11) / math.log(366)
    candidate = [1.0, age, 0.75]
    completion = (0.8 * 40 + 1) / 43 - 1 / 3
    dismissal = (0.1 * 40 + 1) / 43 - 1 / 3
    dwell = math.log(9001) / math.log(86_400_001) - 0.5
    volume = math.log(41) / math.log(1001) - 0.5
    apart = 2 * math.pi * (hour - 8) / 24
    of_profile = [completion, dismissal, dwell, volume, math.cos(apart), math.sin(apart)]
    expected = [
        1.0,
        *candidate,
        math.cos(2 * math.pi * hour / 24),
        math.sin(2 * math.pi * hour / 24),
        1.0,
        *(left * right for left in of_profile for right in candidate),
    ]
    (phi,) = SPEC_V2.phi([TIP], Context(at), PROFILE)
    np.testing.assert_allclose(phi, expected, rtol=1e-12, atol=1e-15)


def test_time_of_day_is_local() -> None:
    noon = datetime(2026, 3, 2, 12, tzinfo=UTC)
    (here,) = SPEC_V1.phi([TIP], Context(noon), None)
    (there,) = SPEC_V1.phi([TIP], Context(noon.astimezone(timezone(timedelta(hours=6)))), None)
    np.testing.assert_allclose(here[4:], [-1, 0], atol=1e-12)
    np.testing.assert_allclose(there[4:], [0, -1], atol=1e-12)


def test_time_inputs_are_zero_without_a_time() -> None:
    (phi,) = SPEC_V2.phi([TIP], Context(None), PROFILE)
    named = dict(zip(SPEC_V2.names, phi, strict=True))
    assert [value for name, value in named.items() if name.startswith("hour")] == [0.0] * 8
    assert named["completion_x_priority"] != 0


@pytest.mark.parametrize(
    "profile",
    [None, {}, dict.fromkeys(PROFILE_FEATURES), {"streak": 4}, {"completion_rate_30d": "high"}, {"x": 1, "y": None}],
)
def test_new_block_is_zero_without_a_known_feature(profile: Profile) -> None:
    phi = SPEC_V2.phi([TIP, tip("b", is_overdue=False)], MORNING, profile)
    assert not phi[:, OLD:].any()
    assert phi[:, :OLD].any()


@pytest.mark.parametrize("name", PROFILE_FEATURES)
def test_only_interactions_of_a_null_feature_are_zero(name: str) -> None:
    (full,) = SPEC_V2.phi([TIP], MORNING, PROFILE)
    (without,) = SPEC_V2.phi([TIP], MORNING, {**PROFILE, name: None})
    assert without[OLD] == 1.0
    zero = {
        "completion_rate_30d": ["completion"],
        "dismiss_rate_30d": ["dismissal"],
        "mean_dwell_ms_30d": ["dwell"],
        "preferred_hour": ["hour_distance_cos", "hour_distance_sin"],
        "tip_volume_30d": ["volume"],
    }[name]
    for place, entry in enumerate(SPEC_V2.inputs[OLD + 1 :], OLD + 1):
        assert full[place] != 0
        if entry.shared in zero:
            assert without[place] == 0
        elif name != "tip_volume_30d" or entry.shared not in ("completion", "dismissal"):
            assert without[place] == full[place]


@pytest.mark.parametrize("volume", [{}, {"tip_volume_30d": None}, {"tip_volume_30d": 0}])
def test_rate_counts_as_of_ten_tips_without_a_volume(volume: dict[str, int | None]) -> None:
    (without,) = SPEC_V2.phi([TIP], MORNING, {"completion_rate_30d": 1.0, **volume})
    (ten,) = SPEC_V2.phi([TIP], MORNING, {"completion_rate_30d": 1.0, "tip_volume_30d": 10})
    place = SPEC_V2.names.index("completion_x_is_overdue")
    assert without[place] == ten[place] == pytest.approx(11 / 13 - 1 / 3)


def test_profile_is_present_when_the_volume_is_zero() -> None:
    (phi,) = SPEC_V2.phi([TIP], MORNING, {"completion_rate_30d": None, "tip_volume_30d": 0})
    named = dict(zip(SPEC_V2.names, phi, strict=True))
    assert named["profile_present"] == 1
    assert named["volume_x_is_overdue"] == -0.5


def test_profile_features_are_numeric_features_of_the_registry() -> None:
    dtypes = {entry.name: entry.dtype for entry in REGISTRY}
    assert {dtypes[name] for name in PROFILE_FEATURES} == {"float", "int"}


@example([TIP], MORNING, {**PROFILE, "preferred_hour": -1.7e308, "mean_dwell_ms_30d": -5.0, "tip_volume_30d": -3})
@example([TIP], MORNING, {**PROFILE, "completion_rate_30d": 1e6, "dismiss_rate_30d": -1e6})
@given(st.lists(candidates, min_size=1, max_size=4), contexts, profiles)
def test_phi_is_bounded_and_begins_with_v1(tips: list[Candidate], context: Context, profile: Profile) -> None:
    phi = SPEC_V2.phi(tips, context, profile)
    assert phi.shape == (len(tips), SPEC_V2.size)
    assert phi.flags.c_contiguous
    assert (np.abs(phi) <= 1).all()  # false for NaN, too
    assert (phi[:, :OLD] == SPEC_V1.phi(tips, context, profile)).all()
    # The bounds that `NEW_PRECISION` is derived from.
    x, z = np.square(phi[:, :OLD]).sum(axis=1), np.square(phi[:, OLD:]).sum(axis=1)
    assert (x <= 5 + 1e-12).all()
    assert (z <= 49 / 30 * x + 1e-12).all()


@given(st.booleans(), st.tuples(numbers, numbers), st.tuples(st.floats(0), st.floats(0)))
def test_candidate_inputs_are_monotone(
    is_overdue: bool, priorities: tuple[float, float], ages: tuple[float, float]
) -> None:
    less, more = (tip("a", is_overdue, a, p) for p, a in zip(sorted(priorities), sorted(ages), strict=True))
    low, high = SPEC_V1.phi([less, more], Context(), None)
    assert (low <= high + 1e-15).all()  # up to rounding: 1 + p is rounded from 2^53 on


def worst_case() -> tuple[Candidate, Profile]:
    """The candidate and profile with the largest |z|² / |x|²: every factor at its bound."""
    profile = {
        "completion_rate_30d": 1.0,
        "dismiss_rate_30d": 1.0,
        "mean_dwell_ms_30d": 86_400_000.0,
        "preferred_hour": 8,
        "tip_volume_30d": 10**9,
    }
    return tip("", is_overdue=True, task_age_days=1e6, priority=1e9), profile


Learned = list[tuple[Candidate, Context, int]]  # each learned that many times


def deviation_ratio(precision: float, learned: Learned, asked: Candidate, context: Context, profile: Profile) -> float:
    """The factor by which the new block raises a score's standard deviation just after growth."""
    s = np.eye(OLD)
    for seen, when, times in learned:
        (x,) = SPEC_V1.phi([seen], when, None)
        s += times * np.outer(x, x)
    (phi,) = SPEC_V2.phi([asked], context, profile)
    x, z = phi[:OLD], phi[OLD:]
    variance = float(x @ np.linalg.solve(s, x))
    return math.sqrt(variance + float(z @ z) / precision) / math.sqrt(variance)


def test_new_block_adds_ten_percent_to_the_deviation_in_the_worst_case() -> None:
    worst, profile = worst_case()
    added = deviation_ratio(NEW_PRECISION, [(worst, MORNING, GROWN_WITHIN)], worst, MORNING, profile)
    assert 1.0995 < added <= 1.1
    assert deviation_ratio(NEW_PRECISION * 0.99, [(worst, MORNING, GROWN_WITHIN)], worst, MORNING, profile) > 1.1
    assert 0 <= NEW_PRECISION - 49 / 30 * (1 + 5 * GROWN_WITHIN) / 0.21 < 0.01 * NEW_PRECISION
    assert set(SPEC_V2.precisions[OLD:]) == {NEW_PRECISION}


@given(
    st.lists(st.tuples(candidates, contexts, st.integers(0, GROWN_WITHIN // 4)), max_size=4),
    candidates,
    contexts,
    profiles,
    st.booleans(),
)
def test_new_block_adds_at_most_ten_percent_to_the_deviation(
    learned: Learned, asked: Candidate, context: Context, profile: Profile, again: bool
) -> None:
    if again and learned:
        asked, context = learned[0][:2]
    assert deviation_ratio(NEW_PRECISION, learned, asked, context, profile) <= 1.1 + 1e-9
