"""The stages of a roll-out: every move from every stage, and on what grounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.bandit.rollout.stages import MOVES, Move, RolloutState, Stage, StageEvidence, Target, refusal, target
from app.bandit.rollout.verdict import Verdict
from app.errors import Conflict

GOOD = Verdict("promote", "It is better.", improved=True)
HARMLESS = Verdict("promote", "It is no worse.")
STAGES: list[tuple[Stage, float]] = [
    ("shadow", 0.0),
    ("ramp", 0.05),
    ("ramp", 0.25),
    ("ramp", 1.0),
    ("promoted", 1.0),
    ("rolled back", 0.0),
]


def standing(
    stage: Stage, share: float, said: Verdict = GOOD, served: int = 200, *, challenged: bool = True
) -> StageEvidence:
    """A roll-out that is there."""
    return StageEvidence(RolloutState(stage, share, "why", "ann", 0, 0), said, served, challenged)


@pytest.mark.parametrize(
    ("stage", "share", "move", "to"),
    [
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
    ],
)
def test_moves_lead_where_they_may(stage: Stage, share: float, move: Move, to: Target | str) -> None:
    found = standing(stage, share)
    if isinstance(to, Target):
        assert target(move, found) == to
        assert refusal(move, found) is None
    else:
        with pytest.raises(Conflict, match=to):
            target(move, found)
        assert to in (refusal(move, found) or "")


@pytest.mark.parametrize("stage", STAGES[:3])
@pytest.mark.parametrize("word", ["insufficient data", "hold", "roll back"])
def test_nothing_is_ramped_against_the_verdict(stage: tuple[Stage, float], word: str) -> None:
    said = Verdict(word, "Thus.")  # type: ignore[arg-type]  # one of its words
    assert refusal("ramp", standing(*stage, said)) == f"{word}: Thus."


def test_no_worse_is_good_enough_to_be_ramped_and_not_to_be_promoted() -> None:
    assert target("ramp", standing("ramp", 0.25, HARMLESS)) == Target("ramp", 1.0)
    assert refusal("promote", standing("ramp", 1.0, HARMLESS)) == "no improvement is shown: It is no worse."


def test_stage_must_have_served_before_the_next() -> None:
    assert "at 5%, 199 are settled; 200 are needed" in (refusal("ramp", standing("ramp", 0.05, served=199)) or "")
    assert "at 100%, 0 are settled" in (refusal("promote", standing("ramp", 1.0, served=0)) or "")
    assert refusal("ramp", standing("shadow", 0.0, served=0)) is None
    assert refusal("rollback", standing("ramp", 0.05, served=0)) is None


def test_without_a_challenger_there_is_only_the_way_back() -> None:
    for move in ("ramp", "promote"):
        assert "PROFILES_SHADOW" in (refusal(move, standing("ramp", 0.05, challenged=False)) or "")
    assert refusal("rollback", standing("ramp", 0.05, challenged=False)) is None


@given(st.lists(st.sampled_from(MOVES), max_size=12), st.booleans())
def test_more_users_come_one_step_at_a_time_and_go_all_at_once(moves: list[Move], well: bool) -> None:
    state = standing("shadow", 0.0).state
    for move in moves:
        found = StageEvidence(state, GOOD if well else Verdict("hold", "No."), 200, challenged=True)
        if refusal(move, found) is not None:
            continue
        to = target(move, found)
        steps = [0.0, 0.05, 0.25, 1.0]
        assert to.share == 0 or steps.index(to.share) - steps.index(state.share) in (0, 1)
        assert (to.share == 0) or well
        assert (to.stage == "ramp") == (to.share > 0 and to.stage != "promoted")
        state = state._replace(stage=to.stage, share=to.share)
