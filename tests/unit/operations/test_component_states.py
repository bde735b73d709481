"""States of components: from readiness, over several processes, and with their start."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.operations.component_states import (
    COMPONENTS,
    OK,
    UNSEEN_MS,
    ComponentStatus,
    State,
    component_views,
    updated_statuses,
    worst_views,
)
from app.operations.component_states import ComponentView as View
from app.operations.component_states import ReadinessCheck as Check
from tests.support.clock import NOW_MS

WELL = {
    "database": Check(True, "", vital=True),
    **dict.fromkeys(("invalidations", "cache", "queue", "worker", "features"), Check(True, "")),
}
VIEWS = st.builds(View, st.sampled_from(["ok", "degraded", "down", "unknown"]), st.sampled_from(["", "a", "b"]))


def states(**changed: Check) -> dict[str, State]:
    return {name: view.state for name, view in component_views({**WELL, **changed}).items()}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, {}),
        ({"cache": Check(False, "away")}, {"service": "degraded", "cache": "down"}),
        ({"cache": Check(False, "read-only", state="degraded")}, {"service": "degraded", "cache": "degraded"}),
        ({"invalidations": Check(False, "1 owed", state="degraded")}, {"service": "degraded", "cache": "degraded"}),
        ({"worker": Check(False, "none")}, {"service": "degraded", "worker": "down"}),
        ({"features": Check(False, "x fails", state="degraded")}, {"service": "degraded", "features": "degraded"}),
        ({"database": Check(False, "gone", vital=True)}, {"service": "down", "database": "down"}),
    ],
)
def test_states_follow_readiness(changed: dict[str, Check], expected: dict[str, State]) -> None:
    assert states(**changed) == {**dict.fromkeys(COMPONENTS, "ok"), **expected}


def test_component_is_unknown_when_it_was_not_asked() -> None:
    found = component_views({"database": Check(False, "gone", vital=True)})
    assert {name: view.state for name, view in found.items()} == {
        **dict.fromkeys(COMPONENTS, "unknown"),
        "service": "down",
        "database": "down",
    }


def test_cache_is_down_whatever_it_is_owed() -> None:
    failed = {"cache": Check(False, "away"), "invalidations": Check(False, "9", state="degraded")}
    assert component_views({**WELL, **failed})["cache"] == View("down", "away")


@given(views=st.permutations([{"cache": OK}, {"cache": View("down", "away")}, {"cache": View("degraded", "full")}, {}]))
def test_worst_state_of_all_processes_counts(views: list[dict[str, View]]) -> None:
    assert worst_views(views) == {"cache": View("down", "away")}


def test_known_state_replaces_an_unknown_one() -> None:
    unknown = {"worker": View("unknown", "the queue does not answer")}
    assert worst_views([unknown, {"worker": OK}]) == {"worker": OK}
    assert worst_views([{"worker": OK}, unknown]) == {"worker": OK}


def test_state_keeps_its_start_while_it_lasts() -> None:
    before = {"cache": ComponentStatus("cache", "down", "away", NOW_MS - 90_000, NOW_MS - 10_000)}
    (same,) = updated_statuses(before, {"cache": View("down", "still away")}, NOW_MS)
    assert same == ComponentStatus("cache", "down", "still away", NOW_MS - 90_000, NOW_MS)
    (other,) = updated_statuses(before, {"cache": OK}, NOW_MS)
    assert other == ComponentStatus("cache", "ok", "", NOW_MS, NOW_MS)


def test_state_starts_again_after_a_gap() -> None:
    before = {"cache": ComponentStatus("cache", "ok", "", 0, NOW_MS - UNSEEN_MS - 1)}
    (found,) = updated_statuses(before, {"cache": OK}, NOW_MS)
    assert found.since_ms == NOW_MS


@given(views=st.lists(VIEWS, min_size=1, max_size=12))
def test_start_is_that_of_the_run_of_equal_states(views: list[View]) -> None:
    held: dict[str, ComponentStatus] = {}
    for number, view in enumerate(views):
        held = {item.component: item for item in updated_statuses(held, {"cache": view}, number * 10_000)}
    run = 0
    while run < len(views) and views[-1 - run].state == views[-1].state:
        run += 1
    assert held["cache"].since_ms == (len(views) - run) * 10_000
