"""The backlog: what was let in waits no longer than its patience, whatever comes and however fast work is done."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.concurrency.overload import LoadEstimate

PATIENCE_S, ALWAYS = 1.0, 10


def test_nothing_is_shed_before_the_first_measurement() -> None:
    backlog = LoadEstimate(lanes=2, patience_s=PATIENCE_S, always=ALWAYS)
    backlog.waiting = 1_000_000
    assert not backlog.full


@pytest.mark.parametrize(("waiting", "full"), [(0, False), (ALWAYS, False), (39, False), (41, True)])
def test_it_is_full_when_the_wait_would_be_too_long(waiting: int, full: bool) -> None:
    backlog = LoadEstimate(lanes=2, patience_s=PATIENCE_S, always=ALWAYS)
    for _ in range(100):
        backlog.worked(10, 0.5)  # 50 ms each
    backlog.waiting = waiting
    assert backlog.full is full


@pytest.mark.parametrize(("waiting", "full"), [(ALWAYS, False), (ALWAYS + 1, True)])
def test_few_may_always_wait(waiting: int, full: bool) -> None:
    backlog = LoadEstimate(lanes=1, patience_s=PATIENCE_S, always=ALWAYS)
    backlog.worked(1, 60.0)
    backlog.waiting = waiting
    assert backlog.full is full


def test_one_slow_item_is_forgotten() -> None:
    backlog = LoadEstimate(lanes=1, patience_s=PATIENCE_S, always=ALWAYS)
    backlog.worked(1, 60.0)
    backlog.waiting = 100
    assert backlog.full
    for _ in range(150):
        backlog.worked(1, 0.001)
    assert not backlog.full


@given(
    lanes=st.integers(1, 4),
    unit_s=st.floats(0.001, 0.1),
    arrivals=st.lists(st.integers(0, 400), min_size=50, max_size=150),
)
def test_admitted_work_waits_within_its_limit(lanes: int, unit_s: float, arrivals: list[int]) -> None:
    """Time goes in steps; in each, some come one by one, and the lanes do what they can."""
    backlog = LoadEstimate(lanes=lanes, patience_s=PATIENCE_S, always=ALWAYS)
    backlog.worked(1, unit_s * 5)  # and the average has time to settle
    for _ in range(40):
        backlog.worked(1, unit_s)
    step_s, left = 0.05, 0.0
    for coming in arrivals:
        for _ in range(coming):
            if not backlog.full:
                backlog.waiting += 1
        assert backlog.waiting * unit_s / lanes <= PATIENCE_S * 1.05 + (ALWAYS + 1) * unit_s
        left += step_s * lanes / unit_s
        done = min(backlog.waiting, int(left))
        left = 0.0 if done == backlog.waiting else left - done
        backlog.waiting -= done
        backlog.worked(done, done * unit_s)
