"""How the challenger does: what `GET /admin/rollout` answers, and `profiles rollout` and the page show."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from app.bandit.rollout.bootstrap_intervals import Interval
from app.bandit.rollout.ports import RolloutLook
from app.bandit.rollout.stages import Move, Stage
from app.bandit.rollout.verdict import Guardrails, Limits, Verdict, Word, broken, effective_needed, longest_allowed
from app.features.clock import rfc3339


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

    @classmethod
    def of(cls, said: Verdict) -> VerdictView:
        return cls(said.word, said.reason, said.improved)


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

    @classmethod
    def of(cls, look: RolloutLook) -> FiguresView:
        found = look.estimates
        # Fields of the same name are copied; the others follow.
        named = {name: getattr(found, name) for name in cls.__struct_fields__ if hasattr(found, name)}
        intervals = {name: IntervalView(*value) for name, value in named.items() if isinstance(value, Interval)}
        return cls(
            **named | intervals,
            look=look.number,
            made_at=rfc3339(look.at_ms),
            decisions=found.n,
            level=look.level,
            doubly_robust=IntervalView(*found.dr),
            effective_sample_size=found.ess,
            champion_effective_sample_size=found.champion_ess,
            effective_sample_size_needed=effective_needed(found.n),
        )


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
    """What must not break, on recent decisions; `broken` has a sentence for each that does not hold."""

    dismissals: DismissalsView
    p99_ms: GuardrailView
    no_profile: GuardrailView
    broken: list[str]

    @classmethod
    def of(cls, rails: Guardrails, limits: Limits) -> GuardrailsView:
        more = IntervalView(*rails.dismissed_more) if rails.dismissed_more is not None else None
        return cls(
            DismissalsView(rails.dismissed_champion, rails.dismissed_challenger, more, limits.dismissed),
            GuardrailView(rails.p99_ms, longest_allowed(rails, limits), rails.p99_judged),
            GuardrailView(rails.no_profile, limits.no_profile),
            broken(rails, limits),
        )


class DecisionsView(msgspec.Struct):
    """Settled decisions since the roll-out began. `waiting`: older ones are not settled; `unshadowed`: left out."""

    evaluated: int
    waiting: int
    unshadowed: int
    served_by_challenger: Annotated[int, Meta(description="Of these, since the stage began.")]
    next_look_at: int


class LookView(msgspec.Struct):
    """A look, and the verdict of its time."""

    look: int
    made_at: str
    decisions: int
    users: int
    stage: str
    lift: IntervalView
    mean_weight: float
    effective_sample_size: Annotated[float, Meta(description="The lesser of both policies'.")]
    verdict: VerdictView

    @classmethod
    def of(cls, look: RolloutLook) -> LookView:
        found = look.estimates
        lift, least = IntervalView(*found.lift), min(found.ess, found.champion_ess)
        at, said = rfc3339(look.at_ms), VerdictView.of(look.verdict)
        return cls(look.number, at, found.n, found.users, look.words, lift, found.mean_weight, least, said)


class MoveView(msgspec.Struct):
    """A move, and why it is not allowed now."""

    move: Move
    allowed: bool
    why_not: str | None


class Growth(msgspec.Struct):
    """Users with learned evidence, and how many of these are yet to grow to the challenger's spec."""

    users: int
    to_grow: int


class RolloutStatus(msgspec.Struct, kw_only=True):
    """How the challenger does, and which users it serves."""

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
    states: Growth
