"""Sufficient statistics: sums that grow by zeros, are stored to the last bit, and are never mixed."""

import struct

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.bandit.model.inputs import SPEC_V1, SPEC_V2, Candidate, Context, Profile, Spec
from app.bandit.model.sufficient_statistics import SufficientStatistics, sound
from app.errors import SpecMismatch
from tests.support.score_requests import (
    candidates,
    contexts,
    history_of,
    profiles,
    s_of,
    same_bits,
    seeds,
    taught,
    y_of,
)

OLD = SPEC_V1.size
NAN, INF = float("nan"), float("inf")
PAIR = Spec("pair", 1, SPEC_V1.inputs[:2])


def same(one: SufficientStatistics, other: SufficientStatistics) -> bool:
    return (
        (one.spec, one.decisions) == (other.spec, other.decisions)
        and same_bits(s_of(one), s_of(other))
        and same_bits(y_of(one), y_of(other))
    )


def test_statistics_are_the_sums_over_learned_decisions() -> None:
    phi, rewards = history_of(1, 30)
    statistics = taught(phi, rewards)
    np.testing.assert_allclose(s_of(statistics), phi.T @ phi, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(y_of(statistics), rewards @ phi, rtol=1e-12, atol=1e-12)
    assert (statistics.spec, statistics.decisions) == (SPEC_V2, 30)
    assert (s_of(statistics) == s_of(statistics).T).all()


def test_statistics_are_immutable() -> None:
    before = SufficientStatistics.none(SPEC_V1)
    after = before.learned(np.ones(6), 1.0)
    assert same(before, SufficientStatistics.none(SPEC_V1))
    assert s_of(after).sum() == 36


@given(seeds, st.integers(0, 8), st.sampled_from([SPEC_V1, SPEC_V2]))
def test_statistics_have_the_same_bits_after_storing(seed: int, decisions: int, spec: Spec) -> None:
    statistics = taught(*history_of(seed, decisions, spec), SufficientStatistics.none(spec))
    assert same(SufficientStatistics.unpack(spec, statistics.pack(), decisions), statistics)


def test_bytes_are_the_lower_triangle_and_then_y() -> None:
    stored = struct.pack("<5d", 6, 1, 5, 4, 2)
    statistics = SufficientStatistics.unpack(PAIR, stored, 7)
    assert (statistics.spec, statistics.decisions) == (PAIR, 7)
    np.testing.assert_array_equal(s_of(statistics), [[6, 1], [1, 5]])
    np.testing.assert_array_equal(y_of(statistics), [4, 2])
    assert statistics.pack() == stored


@pytest.mark.parametrize("wrong", [(1.7e308, 1.7e308), (INF, -INF), (NAN, 1.0)])
def test_damage_is_found_without_warnings_when_numbers_are_huge(wrong: tuple[float, float]) -> None:
    assert not sound(PAIR, struct.pack("<5d", *wrong, 1, 1, 1), 7)


@given(seeds, st.integers(0, 8), st.sampled_from([SPEC_V1, SPEC_V2]))
def test_statistics_are_sound_unless_they_are_damaged(seed: int, decisions: int, spec: Spec) -> None:
    packed = taught(*history_of(seed, decisions, spec), SufficientStatistics.none(spec)).pack()
    numbers = np.frombuffer(packed)
    damaged = [packed[:-8], packed + bytes(8), b"", packed[1:]]
    for place in (0, len(numbers) // 2, len(numbers) - spec.size, len(numbers) - 1):
        for number in (float("nan"), float("inf"), -float("inf"), decisions + 0.5, -decisions - 0.5, 1e300):
            wrong = numbers.copy()
            wrong[place] = number
            damaged.append(wrong.tobytes())
    assert sound(spec, packed, decisions)
    assert not any(sound(spec, blob, decisions) for blob in damaged)


@pytest.mark.parametrize(
    "numbers",
    [
        (6, 1, -1e-3, 4, 2),  # a sum of squares is not negative
        (1, 2, 1, 0, 0),  # |Σ φ₁φ₂|² ≤ Σ φ₁² Σ φ₂²
        (1, 0, 5, 4, 0),  # |Σ rφ|² ≤ n Σ φ²
    ],
)
def test_statistics_are_refused_when_no_decisions_can_produce_them(numbers: tuple[float, ...]) -> None:
    packed, right = struct.pack("<5d", *numbers), struct.pack("<5d", 6, 1, 5, 4, 2)
    assert [sound(PAIR, blob, 7) for blob in (right, packed)] == [True, False]
    assert not sound(PAIR, right, 5), "5 decisions cannot add up to 6"


@given(st.lists(candidates, min_size=1, max_size=4), contexts, profiles, st.sampled_from([SPEC_V1, SPEC_V2]))
def test_inputs_are_within_one(tips: list[Candidate], context: Context, profile: Profile, spec: Spec) -> None:
    """`sound` relies on this."""
    assert np.abs(spec.phi(tips, context, profile)).max() <= 1


@pytest.mark.slow
def test_statistics_stay_sound_when_rounding_errors_add_up() -> None:
    """Rounding errors of one number that is added again and again have one sign."""
    phi, _ = history_of(3, 1)
    statistics = SufficientStatistics.none(SPEC_V2)
    for _ in range(100_000):
        statistics = statistics.learned(phi[0], 0.999999999)
    assert sound(SPEC_V2, statistics.pack(), 100_000)


@pytest.mark.parametrize(
    ("phi", "reward"),
    [
        ((NAN, 1.0), 1.0),
        ((INF, 1.0), 0.0),
        ((INF, -INF), 1.0),
        ((1.5, 1.0), 1.0),
        ((1.0, -1.5), 1.0),
        ((1e308, 1e308), 1.0),
        ((1.0, 1.0), NAN),
        ((1.0, 1.0), 1.5),
        ((1.0, 1.0), -0.5),
    ],
)
def test_decision_is_refused_when_an_input_or_the_reward_is_out_of_range(phi: tuple[float, ...], reward: float) -> None:
    with pytest.raises(SpecMismatch, match="outside"):
        SufficientStatistics.none(PAIR).learned(np.array(phi), reward)


def test_summed_statistics_are_the_sums_over_users() -> None:
    each = [taught(*history_of(seed, 5)) for seed in range(4)]
    total = SufficientStatistics.none(SPEC_V2).plus([one.pack() for one in each], 20)
    np.testing.assert_allclose(s_of(total), sum(s_of(one) for one in each), rtol=1e-13)
    np.testing.assert_allclose(y_of(total), sum(y_of(one) for one in each), rtol=1e-13)
    assert same(SufficientStatistics.none(SPEC_V2).plus([], 0), SufficientStatistics.none(SPEC_V2))


@given(seeds, st.integers(0, 6), st.integers(0, 6))
def test_leading_block_has_the_bits_of_statistics_that_never_grew(seed: int, before: int, after: int) -> None:
    phi, rewards = history_of(seed, before + after)
    never = taught(phi[:, :OLD], rewards, SufficientStatistics.none(SPEC_V1))
    grown = taught(phi[:before, :OLD], rewards[:before], SufficientStatistics.none(SPEC_V1)).grown(SPEC_V2)
    assert not s_of(grown)[OLD:].any()
    assert not s_of(grown)[:, OLD:].any()
    assert not y_of(grown)[OLD:].any()
    grown = taught(phi[before:], rewards[before:], grown)
    s, y = grown.leading(OLD)
    assert same_bits(s, s_of(never))
    assert same_bits(y, y_of(never))
    assert (grown.spec, grown.decisions) == (SPEC_V2, never.decisions)


@given(seeds, st.integers(1, 6))
def test_decision_from_before_growth_is_learned_padded_with_zeros(seed: int, decisions: int) -> None:
    phi, rewards = history_of(seed, decisions)
    phi[:, OLD:] = 0
    short = taught(phi[:, :OLD], rewards, SufficientStatistics.none(SPEC_V1).grown(SPEC_V2))
    assert same(short, taught(phi, rewards))


def test_longer_vector_or_block_is_refused() -> None:
    with pytest.raises(SpecMismatch, match="25 inputs, statistics of 6"):
        SufficientStatistics.none(SPEC_V1).learned(np.ones(25), 1.0)
    with pytest.raises(IndexError, match="out of bounds"):
        SufficientStatistics.none(SPEC_V1).leading(7)


@pytest.mark.parametrize(
    ("spec_from", "spec_to"),
    [
        (SPEC_V2, SPEC_V1),
        (SPEC_V1, msgspec.structs.replace(SPEC_V2, inputs=SPEC_V2.inputs[1:])),
        (msgspec.structs.replace(SPEC_V1, inputs=SPEC_V1.inputs[::-1]), SPEC_V2),
    ],
)
def test_growth_is_refused_when_the_new_spec_does_not_begin_with_the_old(spec_from: Spec, spec_to: Spec) -> None:
    with pytest.raises(SpecMismatch, match="does not begin with"):
        SufficientStatistics.none(spec_from).grown(spec_to)
