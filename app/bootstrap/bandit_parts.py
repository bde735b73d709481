"""The parts that the bandit consists of, joined."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from app.bandit.learning.attribution import DecisionLearner
from app.bandit.learning.maintenance import Maintenance
from app.bandit.model.policies import Policies
from app.bandit.ports import DecisionRepository, LearningRepository, ReadProfile, StateRepository
from app.bandit.rollout.controller import Rollout
from app.bandit.scoring import Scorer
from app.bandit.shadow.queue import BackgroundShadower, NoShadow, ShadowWork
from app.features.clock import Clock
from app.telemetry import Metrics


class Bandit(NamedTuple):
    """What scores, what learns, what a worker does in the background, where it is kept, and the roll-out."""

    lineup: Policies
    scorer: Scorer
    learner: DecisionLearner
    upkeep: Maintenance
    decisions: DecisionRepository
    states: StateRepository
    rollout: Rollout


class Outside(NamedTuple):
    """What the bandit needs from outside: where all of it is kept, profiles, and where shadows are worked out."""

    decisions: DecisionRepository
    learning: LearningRepository
    states: StateRepository
    read_profile: ReadProfile
    shadow_work: ShadowWork


def join(
    outside: Outside,
    lineup: Policies,
    *,
    serves_challenger: Callable[[str, float], bool],
    rollout: Rollout,
    new_id: Callable[[], str],
    clock: Clock,
    metrics: Metrics,
) -> Bandit:
    """The parts over these."""
    learner = DecisionLearner(outside.learning, clock, metrics)
    return Bandit(
        lineup=lineup,
        scorer=Scorer(
            book=outside.decisions,
            read_profile=outside.read_profile,
            lineup=lineup,
            serves_challenger=serves_challenger,
            shadower=(
                NoShadow()
                if lineup.challenger is None
                else BackgroundShadower(outside.decisions, outside.shadow_work, metrics)
            ),
            new_id=new_id,
            clock=clock,
            metrics=metrics,
        ),
        learner=learner,
        upkeep=Maintenance(learner=learner, states=outside.states, lineup=lineup, clock=clock, metrics=metrics),
        decisions=outside.decisions,
        states=outside.states,
        rollout=rollout,
    )
