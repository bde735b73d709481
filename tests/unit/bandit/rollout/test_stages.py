"""The stages of a roll-out: every move from every stage and its conditions; and which users the challenger serves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.bandit.rollout.stages import MOVES, Move, RolloutState, Stage, Target, serves_challenger, target
from app.bandit.rollout.verdict import Verdict
from app.errors import Conflict

GOOD = Verdict("promote", "It is better.", improved=True)
HARMLESS = Verdict("promote", "It is no worse.")
ids = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=128)


def state_of(stage: Stage, share: float) -> RolloutState:
    return RolloutState(stage, share, "why", "ann", 0, 0)


def refused(
    move: Move, stage: Stage, share: float, said: Verdict = GOOD, served: int = 200, *, challenged: bool = True
) -> str:
    """Why a move is not allowed; empty if it is."""
    try:
        target(move, state_of(stage, share), said, served, challenged)
    except Conflict as error:
        return str(error)
    return ""


TARGETS: list[tuple[Stage, float, Move, Target | str]] = [
    ("shadow", 0.0, "ramp", Target("ramp", 0.05)),
    ("ramp", 0.05, "ramp", Target("ramp", 0.25)),
    ("ramp", 0.25, "ramp", Target("ramp", 1.0)),
    ("ramp", 1.0, "ramp", "serves every user already"),
    ("promoted", 1.0, "ramp", "serves every user already"),
    ("rolled back", 0.0, "ramp", Target("shadow", 0.0, anew=True)),
    ("shadow", 0.0, "promote", "ramp it first"),
    ("ramp", 0.05, "promote", "ramp it first"),
    ("ramp", 0.25, "promote", "ramp it first"),
    ("ramp", 1.0, "promote", Target("promoted", 1.0)),
    ("promoted", 1.0, "promote", "promoted already"),
    ("rolled back", 0.0, "promote", "ramp it first"),
    ("shadow", 0.0, "rollback", Target("rolled back", 0.0)),
    ("ramp", 0.05, "rollback", Target("rolled back", 0.0)),
    ("ramp", 0.25, "rollback", Target("rolled back", 0.0)),
    ("ramp", 1.0, "rollback", Target("rolled back", 0.0)),
    ("promoted", 1.0, "rollback", Target("rolled back", 0.0)),
    ("rolled back", 0.0, "rollback", "rolled back already"),
]


def test_moves_lead_to_their_target_or_are_refused() -> None:
    for stage, share, move, to in TARGETS:
        if isinstance(to, Target):
            assert target(move, state_of(stage, share), GOOD, 200, True) == to
            assert refused(move, stage, share) == ""
        else:
            with pytest.raises(Conflict, match=to):
                target(move, state_of(stage, share), GOOD, 200, True)
            assert to in refused(move, stage, share)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.25])
@pytest.mark.parametrize("word", ["insufficient data", "hold", "roll back"])
def test_ramp_is_refused_against_the_verdict(share: float, word: str) -> None:
    said = Verdict(word, "Thus.")  # type: ignore[arg-type]  # one of its words
    assert refused("ramp", "ramp" if share else "shadow", share, said) == f"{word}: Thus."


def test_challenger_that_is_no_worse_is_ramped_and_not_promoted() -> None:
    assert target("ramp", state_of("ramp", 0.25), HARMLESS, 200, True) == Target("ramp", 1.0)
    assert refused("promote", "ramp", 1.0, HARMLESS) == "no improvement is shown: It is no worse."


def test_move_is_refused_when_the_stage_has_served_too_little() -> None:
    assert "at 5%, 199 are settled; 200 are needed" in refused("ramp", "ramp", 0.05, served=199)
    assert "at 100%, 0 are settled" in refused("promote", "ramp", 1.0, served=0)
    assert refused("ramp", "shadow", 0.0, served=0) == ""
    assert refused("rollback", "ramp", 0.05, served=0) == ""


def test_only_rollback_is_allowed_without_a_challenger() -> None:
    assert "PROFILES_SHADOW" in refused("ramp", "ramp", 0.05, challenged=False)
    assert "PROFILES_SHADOW" in refused("promote", "ramp", 0.05, challenged=False)
    assert refused("rollback", "ramp", 0.05, challenged=False) == ""


@given(st.lists(st.sampled_from(MOVES), max_size=12), st.booleans())
def test_share_grows_step_by_step_and_falls_at_once(moves: list[Move], well: bool) -> None:
    state, verdict = state_of("shadow", 0.0), GOOD if well else Verdict("hold", "No.")
    for move in moves:
        try:
            to = target(move, state, verdict, 200, True)
        except Conflict:
            continue
        steps = [0.0, 0.05, 0.25, 1.0]
        assert to.share == 0 or steps.index(to.share) - steps.index(state.share) in (0, 1)
        assert (to.share == 0) or well
        assert (to.stage == "ramp") == (to.share > 0 and to.stage != "promoted")
        state = state._replace(stage=to.stage, share=to.share)


@pytest.mark.parametrize(
    ("user_id", "position"),
    [("user-1", 0.12788333465164436), ("user-2", 0.029899515620194883), ("Zoë", 0.02168192271570346)],
)
def test_position_never_changes(user_id: str, position: float) -> None:
    just_above = float(np.nextafter(position, 1))
    assert [serves_challenger(user_id, share, "1") for share in (position, just_above)] == [False, True]


@given(ids, st.floats(0, 1), st.floats(0, 1))
def test_user_stays_with_the_challenger_when_its_share_grows(user_id: str, one: float, other: float) -> None:
    less, more = sorted((one, other))
    assert serves_challenger(user_id, more, "1") >= serves_challenger(user_id, less, "1")
    assert (serves_challenger(user_id, 0.0, "1"), serves_challenger(user_id, 1.0, "1")) == (False, True)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.25, 0.5, 0.75, 0.99])
def test_share_of_users_is_served_when_ids_follow_a_pattern(share: float) -> None:
    served = sum(serves_challenger(f"user-{number}", share, "2") for number in range(20_000))
    # Kolmogorov-Smirnov: in 99.9 % of uniform samples the largest distance is below 1.95 / sqrt(n).
    assert abs(served / 20_000 - share) < 1.95 / np.sqrt(20_000)


def test_another_trial_begins_with_other_users() -> None:
    first, second = (
        {user for user in map(str, range(20_000)) if serves_challenger(user, 0.05, salt)}
        for salt in ("1", "1764416339000")
    )
    assert min(len(first), len(second)) > 800
    assert len(first & second) < 100  # 50 are expected by chance
