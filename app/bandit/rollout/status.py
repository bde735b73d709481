"""The JSON structure of the roll-out's status, as `GET /admin/rollout` answers it and `profiles rollout` prints it."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta
from msgspec.structs import astuple

from app.bandit.ports import RolloutLook, StateGrowth
from app.bandit.rollout.aggregates import Experiment
from app.bandit.rollout.bootstrap_intervals import Interval, IntervalView
from app.bandit.rollout.stages import Move, Stage
from app.bandit.rollout.verdict import GuardrailsView, Word, effective_needed
from app.features.clock import rfc3339
from app.features.views import view


class VerdictView(msgspec.Struct):
    """The verdict on the challenger and its reason. `improved`: the challenger is shown to be the better policy."""

    verdict: Word
    reason: str
    improved: bool


class FiguresView(msgspec.Struct, kw_only=True):
    """The estimates of a look, an interim analysis of the challenger. `ips`, `snips`, `doubly_robust`, `champion` and
    the lifts are in reward per decision."""

    look: int
    made_at: str
    decisions: int
    users: int
    level: Annotated[float, Meta(description="Probability that an interval misses; over all looks it sums to 0.05.")]
    agreement: Annotated[float, Meta(description="Share of decisions in which both rank the same candidate first.")]
    ips: IntervalView
    snips: IntervalView
    doubly_robust: IntervalView
    champion: Annotated[IntervalView, Meta(description="The champion's value, doubly robust.")]
    lift: Annotated[IntervalView, Meta(description="Challenger minus champion, on the same decisions.")]
    lift_pool: Annotated[IntervalView | None, Meta(description="The champion with the pooled prior, minus champion.")]
    lift_profile: Annotated[IntervalView | None, Meta(description="Challenger minus champion with the pooled prior.")]
    mean_weight: float
    mean_weight_error: float
    effective_sample_size: Annotated[float, Meta(description="Of the challenger's weights, like the mean weight.")]
    champion_mean_weight: float
    champion_mean_weight_error: float
    champion_effective_sample_size: float
    effective_sample_size_needed: Annotated[float, Meta(description="Of both policies, since the lift compares them.")]

    @classmethod
    def of(cls, look: RolloutLook) -> FiguresView:
        found = look.estimates
        values = ((name, getattr(found, name, None)) for name in cls.__struct_fields__)
        intervals = {name: IntervalView(*value) for name, value in values if isinstance(value, Interval)}
        return view(
            cls,
            found,
            look,
            **intervals,
            look=look.number,
            made_at=rfc3339(look.at_ms),
            decisions=found.n,
            doubly_robust=IntervalView(*found.dr),
            effective_sample_size=found.ess,
            champion_effective_sample_size=found.champion_ess,
            effective_sample_size_needed=effective_needed(found.n),
        )


class DecisionsView(msgspec.Struct):
    """Numbers of decisions with a known reward since the roll-out began. `evaluated` decisions count in the estimates.
    `waiting` decisions will count once the rewards of all older decisions are known. Two kinds never count:
    `unshadowed` decisions lack the propensities under one policy, and `without_prior` decisions were made before the
    first pooled prior. The next interim analysis is made when `evaluated` reaches `next_look_at`."""

    evaluated: int
    waiting: int
    unshadowed: int
    served_by_challenger: Annotated[int, Meta(description="Evaluated or waiting, served by it since the stage began.")]
    next_look_at: int
    without_prior: int


class LookView(msgspec.Struct):
    """A look, an interim analysis of the challenger, with the stage and the verdict at that time."""

    look: int
    made_at: str
    decisions: int
    users: int
    stage: str
    lift: IntervalView
    mean_weight: float
    effective_sample_size: Annotated[float, Meta(description="The smaller one of the two policies' sizes.")]
    verdict: VerdictView

    @classmethod
    def of(cls, look: RolloutLook) -> LookView:
        found, at, said = look.estimates, rfc3339(look.at_ms), VerdictView(*astuple(look.verdict))
        lift, least = IntervalView(*found.lift), min(found.ess, found.champion_ess)
        return cls(look.number, at, found.n, found.users, look.stage, lift, found.mean_weight, least, said)


class MoveView(msgspec.Struct):
    """A move between stages: whether it is allowed now, and if not, the reason."""

    move: Move
    allowed: bool
    why_not: str | None


class RolloutStatus(msgspec.Struct, kw_only=True):
    """The status of the roll-out: its stage, the verdict on the challenger, and the measurements behind it. `figures`
    are the estimates of the newest look; null before the first one. `experiment` is null unless both policies serve."""

    stage: Stage
    share: Annotated[float, Meta(description="Share of the users that the challenger serves, if there is one.")]
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
    experiment: Experiment | None
    looks: list[LookView]
    moves: list[MoveView]
    states: StateGrowth
