"""The roll-out's answer, as typed structs."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from app.bandit.rollout.stages import Move, Stage
from app.bandit.rollout.verdict import Word


class IntervalView(msgspec.Struct):
    """A figure and its bounds at the look's level, bootstrapped over users."""

    value: float
    low: float
    high: float


class VerdictView(msgspec.Struct):
    """What to do, and why. `improved`: an improvement may be claimed."""

    verdict: Word
    reason: str
    improved: bool


class FiguresView(msgspec.Struct, kw_only=True):
    """What a look found. Values and lift are rewards a decision."""

    look: int
    made_at: str
    decisions: int
    users: int
    level: Annotated[float, Meta(description="The chance of missing that this look may take of 0.05 in all.")]
    agreement: Annotated[float, Meta(description="Share of decisions in which both put the same candidate first.")]
    ips: IntervalView
    snips: IntervalView
    doubly_robust: IntervalView
    champion: Annotated[IntervalView, Meta(description="The champion's value, doubly robust.")]
    lift: Annotated[IntervalView, Meta(description="Challenger less champion, on the same decisions.")]
    mean_weight: float
    mean_weight_error: float
    effective_sample_size: Annotated[float, Meta(description="Of the challenger's weights, as is the mean weight.")]
    champion_mean_weight: float
    champion_mean_weight_error: float
    champion_effective_sample_size: float
    effective_sample_size_needed: Annotated[float, Meta(description="Of both, for the lift rests on both.")]


class DismissalsView(msgspec.Struct):
    """How often tips are dismissed under each policy, as a share of decisions; null while there are too few."""

    champion: float | None
    challenger: float | None
    more: IntervalView | None
    limit: float


class GuardrailView(msgspec.Struct):
    """A figure that must not exceed its limit; null while there are too few decisions."""

    value: float | None
    limit: float
    judged: Annotated[
        bool, Meta(description="False: it is only shown, as the time is in the shadow; it is the champion's.")
    ] = True


class GuardrailsView(msgspec.Struct):
    """What must not break, on decisions of late; `broken` has a sentence for each that does not hold."""

    dismissals: DismissalsView
    p99_ms: GuardrailView
    no_profile: GuardrailView
    broken: list[str]


class DecisionsView(msgspec.Struct):
    """Settled decisions since the roll-out began. `waiting`: older ones are not settled; `unshadowed`: left out."""

    evaluated: int
    waiting: int
    unshadowed: int
    served_by_challenger: Annotated[int, Meta(description="Of these, since the stage began.")]
    next_look_at: int


class StatesView(msgspec.Struct):
    """Users with learned evidence, and how many of these are yet to grow to the challenger's spec."""

    users: int
    to_grow: int


class LookView(msgspec.Struct):
    """A look, and what was said of it then."""

    look: int
    made_at: str
    decisions: int
    users: int
    stage: str
    lift: IntervalView
    mean_weight: float
    effective_sample_size: Annotated[float, Meta(description="The lesser of both policies'.")]
    verdict: VerdictView


class MoveView(msgspec.Struct):
    """A move, and why it is not allowed now."""

    move: Move
    allowed: bool
    why_not: str | None


class RolloutView(msgspec.Struct, kw_only=True):
    """How the challenger does, and who is served by it."""

    stage: Stage
    share: Annotated[float, Meta(description="Of the users, who are served by the challenger where there is one.")]
    reason: str
    changed_by: str
    changed_at: str | None
    champion: str
    challenger: str | None
    margin: float
    verdict: VerdictView
    decisions: DecisionsView
    figures: FiguresView | None
    guardrails: GuardrailsView
    looks: list[LookView]
    moves: list[MoveView]
    states: StatesView
