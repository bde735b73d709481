"""Sketches: exact while values are few, right to 1 % when they are many, and never larger than they may be."""

from __future__ import annotations

import math
import random
from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.profiles.quality.sketch import ERROR, EXACT, HUGE, TINY, Sketch

SHARES = (0.0, 0.5, 0.9, 0.99, 1.0)
finite = st.floats(allow_nan=False, allow_infinity=False)
values = st.one_of(st.none(), finite, st.integers(-(2**63), 2**63 - 1))


def sketch(*added: float | str | None) -> Sketch:
    """A sketch of these."""
    made = Sketch()
    for value in added:
        made.add(value)
    return made


def nearest_rank(numbers: list[float], share: float) -> float:
    """By the plainest means."""
    return sorted(numbers)[min(len(numbers) - 1, int(share * len(numbers)))]


def close(found: float, number: float) -> bool:
    """To within the error that is promised."""
    found, number = (min(max(value, -HUGE), HUGE) for value in (found, number))
    return abs(found - number) <= ERROR * 1.0001 * abs(number) + TINY


def test_quantiles_are_of_the_nearest_rank_when_values_are_few() -> None:
    assert sketch().quantiles((0.5, 1.0)) == [None, None]
    assert sketch(7).quantiles((0.0, 0.5, 1.0)) == [7, 7, 7]
    assert sketch(*range(1, 101)).quantiles((0.5, 0.9, 0.99, 1.0)) == [51, 91, 100, 100]


@given(st.lists(values, max_size=50))
def test_counts_are_exact_when_values_are_few(added: list[float | int | None]) -> None:
    made = sketch(*added)
    known = [float(value) for value in added if value is not None]
    assert (made.known, made.nulls, made.total) == (len(known), len(added) - len(known), len(added))
    assert (made.low, made.high) == ((min(known), max(known)) if known else (None, None))
    plain = Counter(0.0 if abs(n) <= TINY else min(max(n, -HUGE), HUGE) for n in known)
    assert dict(made.counts()) == plain


@pytest.mark.parametrize(
    "draw",
    [
        lambda chance: chance.random(),
        lambda chance: chance.gauss(0, 1_000),
        lambda chance: chance.lognormvariate(10, 4),
        lambda chance: 10 ** chance.uniform(-20, 20) * chance.choice((1, -1)),
    ],
    ids=["rates", "around zero", "dwell times", "everything"],
)
def test_quantiles_are_right_to_a_hundredth_when_values_are_many(draw: object) -> None:
    chance = random.Random(20260425)
    numbers = [draw(chance) for _ in range(20_000)]  # type: ignore[operator]  # a function
    made = sketch(*numbers)
    assert not made.exact
    assert sum(count for _, count in made.counts()) == len(numbers) == made.known
    for share, found in zip(SHARES, made.quantiles(SHARES), strict=True):
        assert found is not None
        assert close(found, nearest_rank(numbers, share))
    assert made.quantiles((1.0,)) == [max(numbers)]


def test_memory_is_bounded_when_values_and_texts_are_all_different() -> None:
    chance = random.Random(1)
    made = sketch(*(math.copysign(10 ** chance.uniform(-300, 300), chance.random() - 0.5) for _ in range(50_000)))
    assert len(made.counts()) <= 4_200
    texts = sketch(*(f"text-{number}" for number in range(EXACT + 9)), "text-3")
    assert (len(texts.texts), texts.texts["text-3"], texts.other_texts, texts.known) == (EXACT, 2, 9, EXACT + 10)


@given(st.lists(values, max_size=20), st.booleans(), st.lists(values, max_size=20))
def test_a_sketch_goes_on_as_it_was_when_it_is_stored_meanwhile(
    before: list[float | int | None], coarse: bool, after: list[float | int | None]
) -> None:
    begun = sketch(*before, *(range(EXACT + 1) if coarse else ()))
    stored = msgspec.json.decode(msgspec.json.encode(begun), type=Sketch)
    for value in after:
        begun.add(value)
        stored.add(value)
    assert stored == begun


@given(st.lists(finite, min_size=1, max_size=50))
def test_coarse_counts_are_those_of_the_buckets_when_values_become_many(numbers: list[float]) -> None:
    few = sketch(*numbers)
    many = sketch(*numbers, *range(EXACT + 1))
    for number, count in few.counts(exact=False):
        assert dict(many.counts())[number] >= count
