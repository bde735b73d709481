"""Assignment: the same place for the same user for ever, evenly spread, and a share that grows only adds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.bandit.rollout.assignment import serves_challenger, share_of

ids = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=128)


@pytest.mark.parametrize(
    ("user_id", "place"),
    [("user-1", 0.12788333465164436), ("user-2", 0.029899515620194883), ("Zoë", 0.02168192271570346)],
)
def test_place_is_the_one_it_always_was(user_id: str, place: float) -> None:
    assert share_of(user_id) == place


@given(ids, st.floats(0, 1), st.floats(0, 1))
def test_user_stays_with_the_challenger_when_its_share_grows(user_id: str, one: float, other: float) -> None:
    less, more = sorted((one, other))
    assert serves_challenger(user_id, more) >= serves_challenger(user_id, less)


@given(ids)
def test_nobody_is_served_at_nothing_and_everybody_at_all(user_id: str) -> None:
    assert 0 <= share_of(user_id) < 1
    assert not serves_challenger(user_id, 0.0)
    assert serves_challenger(user_id, 1.0)


def test_places_are_uniform_when_ids_follow_a_pattern() -> None:
    places = np.sort([share_of(f"user-{number}") for number in range(20_000)])
    # Kolmogorov and Smirnov: the greatest distance from the uniform is below 1.95 / sqrt(n) in 99.9 % of samples.
    distance = np.abs(places - (np.arange(20_000) + 0.5) / 20_000).max()
    assert distance < 1.95 / np.sqrt(20_000)
    assert len(set(places)) == 20_000
