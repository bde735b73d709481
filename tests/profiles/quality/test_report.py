"""The distribution of live values, as it has always been told."""

from __future__ import annotations

from app.profiles.quality.report import distribution
from app.profiles.quality.sketch import Sketch
from tests.profiles.quality.test_sketch import sketch
from tests.support.entries import entry


def counted(found: list[dict[str, object]]) -> int:
    """Values in all bins."""
    return sum(int(str(part["count"])) for part in found)


def test_a_distribution_counts_each_value_when_they_are_few_or_text() -> None:
    integers = entry(dtype="int")
    assert distribution(integers, sketch(3, 3, 1, 1, 1, 1, 1, None)) == [
        {"value": 1, "count": 5},
        {"value": 3, "count": 2},
    ]
    texts = entry(dtype="str")
    assert distribution(texts, sketch("b", "a", "a")) == [{"value": "a", "count": 2}, {"value": "b", "count": 1}]
    assert distribution(integers, sketch(None, None)) == []


def test_a_distribution_has_ten_bins_when_values_are_many() -> None:
    bins = distribution(entry(dtype="float"), sketch(*(float(number) for number in range(101))))
    assert [part["count"] for part in bins] == [10, 10, 10, 10, 10, 10, 10, 10, 10, 11]
    assert (bins[0]["from"], bins[-1]["to"]) == (0.0, 100.0)
    assert counted(distribution(entry(dtype="int"), sketch(*range(1_000)))) == 1_000
    assert distribution(entry(dtype="float"), sketch(0.5, 0.5, 0.5))[0]["count"] == 3
    assert distribution(entry(dtype="float"), Sketch()) == []
