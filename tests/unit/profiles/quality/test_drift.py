"""Drift: common bins hold every user once, and the figure behaves as a divergence must."""

import itertools
import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.features.registry import Dtype, Scalar
from app.profiles.quality.drift import CommonBin, band, common_bins, psi, quantiles, too_few

counts = st.integers(0, 10_000)
pairs = st.lists(st.tuples(counts, counts), min_size=1, max_size=30).filter(
    lambda found: any(now for now, _ in found) and any(before for _, before in found)
)
numbers = st.lists(st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)), max_size=40)
integers = st.lists(st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)), max_size=60)


def counted(*values: Scalar) -> Counter[Scalar]:
    return Counter(values)


def bins(*found: tuple[int, int]) -> list[CommonBin]:
    """Bins of so many users now and before."""
    return [CommonBin(now, before) for now, before in found]


@given(pairs)
def test_figure_is_never_negative_and_the_same_either_way(found: list[tuple[int, int]]) -> None:
    figure = psi(bins(*found))
    assert figure >= 0
    assert math.isfinite(figure)
    assert psi(bins(*((before, now) for now, before in found))) == pytest.approx(figure)


@given(st.lists(counts, min_size=1, max_size=30).filter(any), st.integers(1, 50))
def test_figure_is_zero_when_the_shares_are_equal(found: list[int], times: int) -> None:
    assert psi(bins(*((count, count * times) for count in found))) == pytest.approx(0, abs=1e-12)


@given(pairs)
def test_figure_ignores_the_order_of_bins(found: list[tuple[int, int]]) -> None:
    assert psi(bins(*reversed(found))) == pytest.approx(psi(bins(*found)))


def test_figure_is_as_by_hand() -> None:
    by_hand = 0.2 * math.log(0.7 / 0.5) - 0.2 * math.log(0.3 / 0.5)
    assert psi(bins((700, 500), (300, 500))) == pytest.approx(by_hand, rel=1e-3)
    assert psi(bins((1000, 0), (0, 1000))) > 10


def test_figure_grows_when_a_population_moves_away() -> None:
    moved = [psi(bins((500 - step, 500), (500 + step, 500))) for step in range(0, 500, 50)]
    assert all(less < more for less, more in itertools.pairwise(moved))


@pytest.mark.parametrize(
    ("figure", "word"), [(0.0, "stable"), (0.0999, "stable"), (0.1, "moderate"), (0.25, "moderate"), (0.2501, "major")]
)
def test_bands_are_the_usual_ones(figure: float, word: str) -> None:
    assert band(figure) == word


def test_there_is_no_figure_when_users_are_few() -> None:
    assert "99 now and 5,000 before" in (too_few(bins((99, 2_500), (0, 2_500))) or "")
    assert "chance alone" in (too_few(bins(*[(10, 10)] * 21)) or "")
    assert too_few(bins(*[(100, 100)] * 21)) is None
    assert too_few(bins((500, 500), *[(0, 0)] * 30)) is None


def total(found: list[CommonBin]) -> tuple[int, int]:
    return sum(part.now for part in found), sum(part.before for part in found)


@given(now=numbers, before=numbers)
def test_every_user_is_in_one_bin_when_values_are_floats(now: list[float | None], before: list[float | None]) -> None:
    found = common_bins("float", counted(*now), counted(*before))
    assert total(found) == (len(now), len(before))
    ranges = [part for part in found if part.kind == "range"]
    assert len(ranges) <= 12
    for left, right in itertools.pairwise(ranges):
        assert left.end == right.start


@given(now=integers, before=integers)
def test_every_user_is_in_one_bin_when_values_are_integers(now: list[int | None], before: list[int | None]) -> None:
    found = common_bins("int", counted(*now), counted(*before))
    assert total(found) == (len(now), len(before))


@given(st.lists(st.sampled_from(["a", "b", "c", None]), max_size=30), st.lists(st.text(max_size=2), max_size=60))
def test_every_user_is_in_one_bin_when_values_are_texts(now: list[str | None], before: list[str]) -> None:
    assert total(common_bins("str", counted(*now), counted(*before))) == (len(now), len(before))


@pytest.mark.parametrize("dtype", ["float", "int"])
def test_every_user_is_in_one_bin_when_there_are_many(dtype: Dtype) -> None:
    chance = random.Random(3)
    kind = int if dtype == "int" else float
    now = [kind(chance.lognormvariate(8, 2)) for _ in range(5_000)]
    before = [kind(chance.lognormvariate(8, 1)) for _ in range(300)] + [None]
    found = common_bins(dtype, counted(*now), counted(*before))
    assert total(found) == (5_000, 301)
    assert [part.kind for part in found].count("null") == 1


def test_bins_have_round_edges_and_open_ends() -> None:
    shares = [number / 1_000 for number in range(1_001)]
    found = common_bins("float", counted(*shares[:500]), counted(*shares[500:]))
    assert [(part.start, part.end) for part in found[:2]] == [(0.0, 0.1), (0.1, 0.2)]
    assert len(found) == 10
    assert found[-1].end == 1.0
    skewed = [*(float(number) for number in range(200)), 1e9]
    found = common_bins("float", counted(*skewed), counted(*skewed))
    assert (found[0].start, found[-1].start, found[-1].end) == (0.0, 180.0, None)


def test_few_integers_and_null_have_a_bin_each() -> None:
    found = common_bins("int", counted(7, 8, 8, None), counted(10))
    assert [(part.kind, part.value, part.now, part.before) for part in found] == [
        ("value", 7, 1, 0),
        ("value", 8, 2, 0),
        ("value", 9, 0, 0),
        ("value", 10, 0, 1),
        ("null", None, 1, 0),
    ]
    assert all(part.start == round(part.start or 0) for part in common_bins("int", counted(*range(90)), counted()))


@pytest.mark.parametrize("most", [30, 45, 49, 50, 99, 100, 500])
def test_upper_edge_of_a_bin_is_exclusive(most: int) -> None:
    found = common_bins("int", counted(*range(most + 1)), counted())
    for part in found:
        assert part.start is not None
        last = most if part.end is None else part.end - 1
        assert part.now == min(most, last) - part.start + 1


def test_quantiles_are_of_the_nearest_rank() -> None:
    assert quantiles([], (0.5, 1.0)) == [None, None]
    assert quantiles([7], (0.0, 0.5, 1.0)) == [7, 7, 7]
    assert quantiles(range(100, 0, -1), (0.5, 0.9, 0.99, 1.0)) == [51, 91, 100, 100]
