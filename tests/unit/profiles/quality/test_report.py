"""The distribution of live values, and the intervals of shares."""

from collections import Counter
from random import Random

import pytest

from app.features.registry import Scalar
from app.profiles.quality.report import distribution, interval, margin
from tests.support.entries import entry

DRAWS = 400


def bins(dtype: str, *values: Scalar) -> list[dict[str, object]]:
    return distribution(entry(dtype=dtype), Counter(values))


def total(found: list[dict[str, object]]) -> int:
    return sum(int(str(part["count"])) for part in found)


def test_distribution_counts_each_value_when_they_are_few_or_text() -> None:
    assert bins("int", 3, 3, 1, 1, 1, 1, 1, None) == [{"value": 1, "count": 5}, {"value": 3, "count": 2}]
    assert bins("str", "b", "a", "a", None) == [{"value": "a", "count": 2}, {"value": "b", "count": 1}]
    assert bins("int", None, None) == []


def test_distribution_has_ten_bins_when_values_are_many() -> None:
    found = bins("float", *(float(number) for number in range(101)))
    assert [part["count"] for part in found] == [10, 10, 10, 10, 10, 10, 10, 10, 10, 11]
    assert (found[0]["from"], found[-1]["to"]) == (0.0, 100.0)
    assert total(bins("int", *range(1_000))) == 1_000
    assert bins("float", 0.5, 0.5, 0.5)[0]["count"] == 3
    assert bins("float") == []
    assert total(bins("float", -1.7e308, 1.7e308, 5e-324)) == 3


@pytest.mark.parametrize(("eligible", "having"), [(2_000, 1_000), (2_000, 60), (600, 200), (100_000, 99_000)])
def test_interval_covers_the_share_in_19_of_20_draws(eligible: int, having: int) -> None:
    random = Random(f"{eligible} {having}")
    hits, widths = 0, set[float]()
    for _ in range(DRAWS):
        count = sum(number < having for number in random.sample(range(eligible), 500))
        found = interval(count, 500, eligible)
        assert found is not None
        hits += found[0] <= having / eligible <= found[1]
        widths.add(found[1] - found[0])
    assert 0.92 * DRAWS <= hits <= 0.985 * DRAWS  # two and a half standard errors around 0.95
    assert max(widths) <= 2 * margin(500, eligible) + 1e-6


def test_interval_has_no_width_when_all_users_are_measured() -> None:
    assert interval(3, 8, 8) == [0.375, 0.375]
    assert interval(1, 8, 8, 4) == [0.25, 0.25]
    assert margin(8, 8) == 0
    assert interval(0, 8, 8, 0) is None
    assert (interval(0, 0, 0), margin(0, 0)) == (None, 0)


def test_interval_is_not_empty_when_no_measured_user_counts() -> None:
    found = interval(0, 20_000, 1_000_000)
    assert found is not None
    assert found[0] == 0
    assert found[1] == pytest.approx(0.000188, abs=2e-6)
