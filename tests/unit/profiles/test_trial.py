"""A trial of features on stored users: what each costs, and the first fault of each."""

from collections.abc import Sequence

import pytest

from app.features.registry import Registry
from app.profiles.ports import ComputeRow, Snapshot
from app.profiles.trial import Trial, try_features
from tests.support.clock import FakeClock
from tests.support.entries import entry

REGISTRY = Registry([entry(name="sound"), entry(name="faulty"), entry(name="mistyped", dtype="float")])


class TimedSource:
    """Each statement takes four milliseconds; `faulty` fails for bob, `mistyped` gives a text for cid."""

    def __init__(self, clock: FakeClock, *, overdue: bool = False) -> None:
        self._clock = clock
        self._overdue = overdue
        self.asked: list[int] = []

    async def compute(self, clock_ms: int, asked: Sequence[ComputeRow]) -> Snapshot:
        self._clock.advance(4)
        self.asked.append(asked[0].mask)
        rows = [[1, None, "x" if row.user_id == "cid" else 1] for row in asked]
        failing = asked[0].mask & 0b10
        errors = {(place, 1): "late" for place, row in enumerate(asked) if row.user_id == "bob" and failing}
        count = len(rows)
        return Snapshot(rows, [1] * count, [()] * count, errors, 0b10 if errors and self._overdue else 0)

    async def fitting(self, asked: Sequence[ComputeRow]) -> int:
        raise AssertionError

    async def attempt(self, clock_ms: int, asked: Sequence[ComputeRow]) -> Snapshot:
        raise AssertionError


async def test_each_feature_is_tried_alone_when_users_are_stored() -> None:
    clock = FakeClock()
    source = TimedSource(clock)
    found = await try_features(source, REGISTRY, 0b111, ["ann", "bob", "cid", "dan"], clock)
    assert source.asked == [0, 0b001, 0b010, 0b100]  # the first one parses the statement, at the cost of no feature
    assert [item._replace(us_per_user=None) for item in found] == [
        Trial(0, None),
        Trial(1, None, "bob", "late"),
        Trial(2, None, "cid", "the SQL gave text where float is declared"),
    ]
    assert [item.us_per_user for item in found] == pytest.approx([1_000, 1_000, 1_000])


async def test_feature_has_no_cost_when_it_takes_too_long() -> None:
    clock = FakeClock()
    (found,) = await try_features(TimedSource(clock, overdue=True), REGISTRY, 0b010, ["ann", "bob"], clock)
    assert found == Trial(1, None, "bob", "late")


async def test_nothing_is_computed_when_no_user_is_stored() -> None:
    clock = FakeClock()
    source = TimedSource(clock)
    assert await try_features(source, REGISTRY, 0b101, [], clock) == [Trial(0, None), Trial(2, None)]
    assert source.asked == []


@pytest.mark.parametrize(
    ("raw", "shown"),
    [(b"", "more than one row, or a blob,"), (1.5, "float 1.5"), (1 << 70, f"int {1 << 70}"), ("secret text", "text")],
)
def test_value_of_another_dtype_is_described_without_its_text(raw: object, shown: str) -> None:
    assert REGISTRY[0].value_of(raw) == (None, f"the SQL gave {shown} where int is declared")
