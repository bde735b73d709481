"""What comes out is what went in."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.bandit.model.policies import Policies
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.bandit.shadow.scores import shadows_of
from app.bandit.shadow.subprocess.wire import (
    Failure,
    decode_answer,
    decode_decisions,
    encode_decisions,
    encode_failure,
    encode_shadows,
)
from tests.unit.bandit.model.test_batch_scoring import decided


def flat(value: object) -> list[object]:
    """All that a decision or a shadow is made of, arrays with their shapes."""
    if isinstance(value, np.ndarray):
        return [value.shape, value.tobytes()]
    if isinstance(value, SufficientStatistics):
        return flat((value.spec_hash, value.size, value.numbers, value.decisions))
    if isinstance(value, tuple):
        return [part for item in value for part in flat(item)]
    return [value]


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 25), st.booleans(), st.booleans()), max_size=5),
)
def test_decisions_and_shadows_are_the_same_after_the_way(asked: list[tuple[int, int, bool, bool]]) -> None:
    group = [
        decided(seed, candidates, challenger=challenger, explore=explore)
        for seed, candidates, challenger, explore in asked
    ]
    there = decode_decisions(encode_decisions(group))
    assert [flat(item) for item in there] == [flat(item) for item in group]
    shadows = shadows_of(there, Policies.of(shadow=True))
    back = decode_answer(encode_shadows(shadows))
    assert not isinstance(back, Failure)
    assert [flat(item) for item in back] == [flat(item) for item in shadows]


def test_vectors_that_do_not_lie_in_one_piece_are_the_same_after_the_way() -> None:
    item = decided(7, 5, challenger=False, explore=True)
    terms = item.factors.by_candidate
    wide = np.hstack([terms, terms])[:, : terms.shape[1]]
    (found,) = decode_decisions(encode_decisions([item._replace(factors=item.factors._replace(by_candidate=wide))]))
    assert flat(found) == flat(item)


def test_a_failure_is_told_with_its_reason() -> None:
    assert decode_answer(encode_failure("ValueError: broken")) == Failure("ValueError: broken")


def test_arrays_that_do_not_fit_each_other_are_refused() -> None:
    item = decided(7, 5, challenger=False, explore=True)
    short = item.factors._replace(by_candidate=item.factors.by_candidate[:, :3])
    with pytest.raises(ValueError, match="reshape"):
        decode_decisions(encode_decisions([item._replace(factors=short)]))


@pytest.mark.parametrize("message", [b"", b"\x93", b"\xc0", encode_failure("x") + b"\x00"])
def test_nonsense_is_refused(message: bytes) -> None:
    for decode in (decode_decisions, decode_answer):
        with pytest.raises(msgspec.DecodeError):
            decode(message)
