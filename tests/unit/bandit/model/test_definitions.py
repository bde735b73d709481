"""Declared features: what a request may contain, its bounded factors, and the formulas that a spec's hash covers."""

from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import NODEFAULT, Meta

from app.bandit.model.definitions import (
    CANDIDATE_FEATURES,
    FLAG,
    Feature,
    Text,
    columns,
    formulas,
    hashed,
    listed,
    log_share,
    soft_sign,
    struct,
)

URGENT = Feature("urgent", bool, {"urgent": FLAG}, False)
EFFORT = Feature("effort_minutes", Annotated[float, Meta(ge=0)] | None, {"effort": log_share(480, "minutes")})
MOOD = Feature("mood", float, {"mood": soft_sign("m")}, 1.0)
KIND = Feature("kind", Literal["call", "errand"] | None, listed("kind", "call", "errand"))
PROJECT = Feature("project", Text | None, hashed("project", 16))
ALL = [URGENT, EFFORT, MOOD, KIND, PROJECT]
Declared = struct(ALL)
texts = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=128)


def factors(**given: Any) -> dict[str, float]:
    """The factors, by name, of what a client sends."""
    sent = msgspec.json.decode(msgspec.json.encode(given), type=Declared)
    names = [name for name, _ in formulas(ALL)]
    return {name: column[0] for name, column in zip(names, columns(ALL, [sent]), strict=True)}


def test_absent_features_have_their_defaults() -> None:
    found = factors()
    assert found.pop("mood") == 0.5
    assert len(found) == 20
    assert not any(found.values())
    assert msgspec.json.encode(Declared()) == b"{}"


def test_factors_follow_the_transforms() -> None:
    found = factors(urgent=True, effort_minutes=480, mood=-3, kind="errand", project="home")
    assert (found["urgent"], found["effort"], found["mood"]) == (1, 1, -0.75)
    assert (found["kind_call"], found["kind_errand"]) == (0, 1)
    assert [name for name, value in found.items() if name.startswith("project") and value] == ["project_12"]


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({"urgent": None}, "urgent"),  # its default is not null
        ({"urgent": 1}, "urgent"),
        ({"effort_minutes": -1}, "effort_minutes"),
        ({"kind": "letter"}, "kind"),
        ({"project": "x" * 129}, "project"),
        ({"project": "a\nb"}, "project"),
    ],
)
def test_invalid_values_are_named(given: dict[str, Any], path: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=rf"at `\$\.{path}`"):
        msgspec.convert(given, Declared)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "urgent": st.booleans(),
            "effort_minutes": st.none() | st.floats(0, allow_infinity=False),
            "mood": st.floats(allow_nan=False, allow_infinity=False),
            "kind": st.sampled_from(["call", "errand", None]),
            "project": st.none() | texts,
        },
    )
)
def test_factors_are_bounded(given: dict[str, Any]) -> None:
    found = factors(**given)
    assert all(-1 <= value <= 1 for value in found.values())
    assert sum(value for name, value in found.items() if name.startswith("kind")) == (given.get("kind") is not None)
    hashes = sum(value for name, value in found.items() if name.startswith("project"))
    assert hashes == (given.get("project") is not None)


def test_formulas_cover_what_changes_a_factor() -> None:
    changed = [
        KIND._replace(default="call"),
        KIND._replace(factors=listed("kind", "call", "letter")),
        PROJECT,
        PROJECT._replace(factors=hashed("project", 17)),
        EFFORT,
        EFFORT._replace(factors={"effort": log_share(481, "minutes")}),
    ]
    found = [frozenset(formulas([feature])) for feature in (KIND, *changed)]
    assert len(set(found)) == len(found)


def test_only_the_first_features_are_required() -> None:
    assert [feature.name for feature in CANDIDATE_FEATURES if feature.default is NODEFAULT] == [
        "is_overdue",
        "task_age_days",
        "priority",
    ]
