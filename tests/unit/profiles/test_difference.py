"""Two definitions of a feature, side by side for the same users."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from app.features.registry import Feature, Registry
from app.profiles.ports import ComputeRow, Snapshot
from app.profiles.trial import EXAMPLES, Difference, compare
from tests.support.clock import NOW_MS, FakeClock
from tests.support.entries import entry

COUNT, AVERAGE = "SELECT user_id, 1 AS value FROM views", "SELECT user_id, 2 AS value FROM views"


class Users:
    """So many eligible users; remembers since when they were asked for."""

    def __init__(self, count: int) -> None:
        self.user_ids = [f"user-{number:05}" for number in range(count)]
        self.since_ms: set[int] = set()

    async def eligible(self, after: str, since_ms: int, limit: int, until_ms: int) -> list[str]:
        self.since_ms.add(since_ms)
        return [user_id for user_id in self.user_ids if user_id > after][:limit]


class NumberSource:
    """The number in a user's id, plus `more`; an error for the users in `failing`."""

    def __init__(self, more: object, failing: frozenset[str] = frozenset()) -> None:
        self._more = more
        self._failing = failing

    async def compute(self, clock_ms: int, asked: Sequence[ComputeRow]) -> Snapshot:
        values = [
            self._more + int(row.user_id[5:]) if isinstance(self._more, int | float) else self._more for row in asked
        ]
        errors = {(place, 0): "late" for place, row in enumerate(asked) if row.user_id in self._failing}
        rows = [[None if (place, 0) in errors else value] for place, value in enumerate(values)]
        return Snapshot(rows, [1] * len(rows), [()] * len(rows), errors)

    async def fitting(self, asked: Sequence[ComputeRow]) -> int:
        raise AssertionError

    async def attempt(self, clock_ms: int, asked: Sequence[ComputeRow]) -> Snapshot:
        raise AssertionError


async def difference(
    users: Users,
    old: object,
    new: object,
    *,
    before: Feature | None = None,
    after: Feature | None = None,
    failing: frozenset[str] = frozenset(),
    count: int = 1_000,
    seed: int = 1,
) -> Difference:
    """Compare; `old` and `new` are added to each user's number."""
    before, after = before or entry(compute=COUNT), after or entry(compute=AVERAGE)
    sources = {before.fingerprint: NumberSource(old, failing), after.fingerprint: NumberSource(new)}

    def source_of(registry: Registry) -> NumberSource:
        return sources[registry[0].fingerprint]

    return await compare(
        before,
        after,
        source_of,
        users.eligible,
        count=count,
        random=Random(seed),
        clock=FakeClock(),
        tell=lambda done: None,
    )


async def test_nothing_changes_when_both_give_the_same() -> None:
    found = await difference(Users(1_000), 0, 0)
    assert (found.users, found.changed, found.psi, found.examples) == (1_000, 0, 0.0, [])


async def test_share_quartiles_and_examples_are_shown_when_values_change() -> None:
    found = await difference(Users(400), 0, 300)
    assert (found.users, found.changed) == (400, 400)
    assert found.psi is not None
    assert found.psi > 0.25
    assert len(found.examples) == EXAMPLES
    assert found.examples[0].after == 300 + int(found.examples[0].user_id[5:])
    assert (found.changed_share, found.band) == (1.0, "major")
    assert found.before.quartiles == [100, 200, 300]


async def test_no_psi_is_given_when_the_dtype_changes() -> None:
    found = await difference(Users(200), 0, "tip", after=entry(dtype="str"))
    assert (found.psi, found.why_no_psi) == (None, "the dtype changes from int to str")
    assert found.changed == 200


async def test_no_psi_is_given_when_users_are_few() -> None:
    found = await difference(Users(3), 0, 1)
    assert found.psi is None
    assert (found.why_no_psi or "").startswith("too few users")


async def test_failures_are_counted_when_the_old_definition_fails() -> None:
    found = await difference(Users(50), 0, 0, failing=frozenset({"user-00003", "user-00004"}))
    assert (found.before.failed, found.after.failed, found.changed) == (2, 0, 2)
    assert found.examples[0].before is None


async def test_values_of_another_dtype_count_as_failures() -> None:
    found = await difference(Users(20), 0, 0.5)
    assert (found.after.failed, found.after.quartiles) == (20, [None, None, None])


async def test_nothing_changes_when_there_are_no_users() -> None:
    found = await difference(Users(0), 0, 1)
    assert (found.users, found.changed, found.changed_share, found.psi) == (0, 0, 0.0, None)


async def test_sample_depends_on_seed_and_size() -> None:
    users = Users(3_000)
    first, again, other = [await difference(users, 0, 1, count=100, seed=seed) for seed in (1, 1, 2)]
    assert first.users == other.users == 100
    assert first.examples == again.examples != other.examples


async def test_users_are_those_of_the_longer_window() -> None:
    users = Users(5)
    long = entry(window=entry().window * 3)
    await difference(users, 0, 0, after=long)
    assert users.since_ms == {NOW_MS - long.window_ms}
