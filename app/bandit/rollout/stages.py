"""Decides which moves between the stages of a roll-out are allowed, and which users the challenger serves.

    shadow (0 %) -> 5 % -> 25 % -> 100 % -> promoted
    each of these -> rolled back -> shadow, started anew

Invariant: the challenger's share of users grows only after a favourable verdict and, from 5 % on, after it has served
enough decisions at the current stage. Rolling back is always allowed.
"""

import hashlib
from typing import Literal, NamedTuple

from app.bandit.rollout.verdict import Verdict
from app.errors import Conflict

Stage = Literal["shadow", "ramp", "promoted", "rolled back"]
STAGES: tuple[Stage, ...] = ("shadow", "ramp", "promoted", "rolled back")
Move = Literal["ramp", "promote", "rollback"]
MOVES: tuple[Move, ...] = ("ramp", "promote", "rollback")
STEPS = (0.05, 0.25, 1.0)
# The challenger's answer times can be measured only while it serves, so each stage needs this many settled decisions.
SERVED_BEFORE_MORE = 200


class RolloutState(NamedTuple):
    """The stage of the roll-out, the share of users that the challenger serves, and the last move. Only decisions with
    a sequence number above `evaluated_after` count, so a roll-out that starts anew ignores the decisions before its
    start. `salt` decides which users the challenger serves first. It changes only when a roll-out starts anew.
    `challenger` is the hash of the spec of the challenger that the stage belongs to. It is None until the
    first pooled prior is stored or the first move is made."""

    stage: Stage
    share: float
    reason: str
    changed_by: str
    changed_at_ms: int
    evaluated_after: int
    salt: str = "1"
    challenger: str | None = None


class Target(NamedTuple):
    """The stage and the challenger's share of users after a move. `anew`: the roll-out ignores earlier decisions."""

    stage: Stage
    share: float
    anew: bool = False


def serves_challenger(user_id: str, share: float, salt: str) -> bool:
    """Whether the user is in the share, 0 to 1, of users that the challenger serves. A larger share only adds users."""
    digest = hashlib.sha256(f"profiles:rollout:{salt}:{user_id}".encode()).digest()
    position = (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)  # in [0, 1), uniform over users
    return position < share


def stage_label(at: RolloutState | Target) -> str:
    """The name of a stage as people read it: `shadow`, `5%`, `promoted`, …"""
    return f"{at.share:.0%}" if at.stage == "ramp" else at.stage


def target(move: Move, state: RolloutState, verdict: Verdict, served: int, challenged: bool) -> Target:
    """Determine the stage and share that a move leads to. `served` is the number of settled decisions that the
    challenger served since the stage began. `challenged` tells whether a challenger runs at all. Raises `Conflict` with
    the reason if the move is not allowed."""
    if move == "rollback":
        if state.stage == "rolled back":
            raise Conflict("it is rolled back already")
        return Target("rolled back", 0.0)
    if not challenged:
        raise Conflict("there is no challenger: PROFILES_SHADOW is 0")
    if move == "ramp":
        if state.stage == "rolled back":
            return Target("shadow", 0.0, anew=True)
        if state.stage == "promoted" or state.share >= STEPS[-1]:
            raise Conflict("the challenger serves every user already")
        _require_grounds(state, verdict, served)
        return Target("ramp", next(step for step in STEPS if step > state.share))
    if state.stage == "promoted":
        raise Conflict("the challenger is promoted already")
    if state.share < STEPS[-1]:
        raise Conflict("only a challenger that serves every user can be promoted; ramp it first")
    _require_grounds(state, verdict, served)
    if not verdict.improved:
        raise Conflict(f"no improvement is shown: {verdict.reason}")
    return Target("promoted", 1.0)


def _require_grounds(state: RolloutState, verdict: Verdict, served: int) -> None:
    if verdict.word != "promote":
        raise Conflict(f"{verdict.word}: {verdict.reason}")
    if state.share and served < SERVED_BEFORE_MORE:
        raise Conflict(
            f"of the decisions that the challenger served at {stage_label(state)}, {served:,} are settled; "
            f"{SERVED_BEFORE_MORE} are needed before it serves more"
        )
