"""The stages of a roll-out, and who may go where.

    shadow (0 %) -> 5 % -> 25 % -> 100 % -> promoted
    from each of these -> rolled back -> shadow, begun anew

Invariant: the challenger serves more users only on the word of a verdict, and of decisions that it served at the stage
before; going back needs no reason but somebody's. Pure: what is written down, and by whom, is told elsewhere.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from app.bandit.rollout.verdict import Verdict
from app.errors import Conflict

Stage = Literal["shadow", "ramp", "promoted", "rolled back"]
STAGES: tuple[Stage, ...] = ("shadow", "ramp", "promoted", "rolled back")
Move = Literal["ramp", "promote", "rollback"]
MOVES: tuple[Move, ...] = ("ramp", "promote", "rollback")
STEPS = (0.05, 0.25, 1.0)
# What it is like to be served by the challenger shows only once it serves: so many settled decisions at each stage.
SERVED_BEFORE_MORE = 200


class RolloutState(NamedTuple):
    """Where the roll-out stands: `share` of the users are served by the challenger, since when, and why.

    Decisions with a number above `evaluated_after` count; so a roll-out that is begun anew forgets the one before.
    """

    stage: Stage
    share: float
    reason: str
    changed_by: str
    changed_at_ms: int
    evaluated_after: int

    @property
    def running(self) -> bool:
        """Whether it is still to be decided."""
        return self.stage in ("shadow", "ramp")

    @property
    def words(self) -> str:
        """As people say it."""
        return f"{self.share:.0%}" if self.stage == "ramp" else self.stage


class Target(NamedTuple):
    """A stage to go to. `anew`: what was learned about the challenger so far does not count."""

    stage: Stage
    share: float
    anew: bool = False

    @property
    def words(self) -> str:
        """As people say it."""
        return f"{self.share:.0%}" if self.stage == "ramp" else self.stage


class StageEvidence(NamedTuple):
    """What a move is decided by. `served`: settled decisions that the challenger served since the stage began."""

    state: RolloutState
    verdict: Verdict
    served: int
    challenged: bool


def target(move: Move, standing: StageEvidence) -> Target:
    """Where a move leads.

    Raises:
        Conflict: it is not allowed now, and why.
    """
    if move == "rollback":
        return _back(standing.state)
    if not standing.challenged:
        raise Conflict("there is no challenger: PROFILES_SHADOW is 0")
    return _ramped(standing) if move == "ramp" else _promoted(standing)


def refusal(move: Move, standing: StageEvidence) -> str | None:
    """Why a move is not allowed now; None where it is."""
    try:
        target(move, standing)
    except Conflict as error:
        return str(error)
    return None


def _ramped(standing: StageEvidence) -> Target:
    state = standing.state
    if state.stage == "rolled back":
        return Target("shadow", 0.0, anew=True)
    if state.stage == "promoted" or state.share >= STEPS[-1]:
        raise Conflict("the challenger serves every user already")
    _on_good_grounds(standing)
    return Target("ramp", next(step for step in STEPS if step > state.share))


def _promoted(standing: StageEvidence) -> Target:
    state = standing.state
    if state.stage == "promoted":
        raise Conflict("the challenger is promoted already")
    if state.share < STEPS[-1]:
        raise Conflict("only a challenger that serves every user can be promoted; ramp it first")
    _on_good_grounds(standing)
    if not standing.verdict.improved:
        raise Conflict(f"no improvement is shown: {standing.verdict.reason}")
    return Target("promoted", 1.0)


def _back(state: RolloutState) -> Target:
    if state.stage == "rolled back":
        raise Conflict("it is rolled back already")
    return Target("rolled back", 0.0)


def _on_good_grounds(standing: StageEvidence) -> None:
    if standing.verdict.word != "promote":
        raise Conflict(f"{standing.verdict.word}: {standing.verdict.reason}")
    if standing.state.share and standing.served < SERVED_BEFORE_MORE:
        raise Conflict(
            f"of the decisions that the challenger served at {standing.state.words}, {standing.served:,} are settled; "
            f"{SERVED_BEFORE_MORE} are needed before it serves more"
        )
