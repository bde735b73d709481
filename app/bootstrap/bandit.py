"""Builds the contextual bandit, and the controller of its roll-out, from the settings and the database."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import msgspec

from app.bandit.learning.attribution import DecisionLearner, Rules
from app.bandit.learning.maintenance import EVERY_S, Maintenance
from app.bandit.model.policies import Policies
from app.bandit.ports import ReadProfile
from app.bandit.rollout.controller import WATCH_EVERY_S, Rollout
from app.bandit.rollout.stages import serves_challenger
from app.bandit.rollout.status import StateGrowth
from app.bandit.rollout.verdict import Limits
from app.bandit.scoring import Scorer
from app.bootstrap.servers import Wrap, untraced
from app.features.clock import Clock
from app.operations.audit import AuditedAction, audited
from app.service import Bandit
from app.settings import Settings
from app.stores.sql.audit_trail import SqlAuditTrail
from app.stores.sql.database import Database
from app.stores.sql.decisions import SqlDecisions
from app.stores.sql.learning import SqlLearning
from app.stores.sql.rollout import SqlRollout
from app.stores.sql.sufficient_statistics import SqlStates
from app.telemetry import Metrics


def bandit(
    settings: Settings,
    database: Database,
    read_profile: ReadProfile,
    clock: Clock,
    metrics: Metrics,
    *,
    traced: Wrap = untraced,
    new_id: Callable[[], str] | None = None,
) -> Bandit:
    """Build the bandit. `new_id` replaces the generator of decision ids."""

    def time_ordered_id() -> str:
        # Begins with the time, so that the newest decisions are neighbours in the index.
        return f"{clock.now_ms():012x}{secrets.token_hex(10)}"

    policies = Policies.of(shadow=settings.shadow)
    decisions = traced("decisions", SqlDecisions(database, policies))
    states = SqlStates(database, policies.longest)
    learning = traced("learning", SqlLearning(database, policies, _rules(settings)))
    learner = DecisionLearner(learning, clock, metrics)
    maintenance = Maintenance(
        learner=learner, states=states, decisions=decisions, policies=policies, clock=clock, metrics=metrics
    )
    controller = rollout(settings, database, clock)
    return Bandit(
        scorer=Scorer(
            decisions=decisions,
            read_profile=read_profile,
            policies=policies,
            serves_challenger=serves_challenger,
            new_id=new_id or time_ordered_id,
            clock=clock,
            metrics=metrics,
        ),
        learner=learner,
        maintenance=maintenance,
        decisions=decisions,
        states=states,
        rollout=controller,
        periodic=[
            ("bandit maintenance", maintenance.once, EVERY_S),
            ("shadows", maintenance.shadow, EVERY_S),
            ("roll-out", controller.watch, WATCH_EVERY_S),
        ],
    )


def rollout(settings: Settings, database: Database, clock: Clock) -> Rollout:
    """Build the controller of the challenger's roll-out, which records each action in the audit trail."""
    policies = Policies.of(shadow=settings.shadow)
    trail, states = SqlAuditTrail(database), SqlStates(database, policies.longest)
    challenger = None if policies.challenger is None else policies.challenger.spec.hash

    async def growth() -> StateGrowth:
        counts = await states.counts()
        return StateGrowth(sum(counts.values()), sum(counts.get(spec.hash, 0) for spec in policies.shorter()))

    def audited_action(actor: str, action: str) -> AbstractAsyncContextManager[AuditedAction]:
        return audited(trail, clock.now_ms(), actor, action, "rollout")

    return Rollout(
        repository=SqlRollout(database, challenger),
        limits=Limits(margin=settings.rollout_margin, **msgspec.structs.asdict(settings.rollout_guardrails)),
        window_ms=_rules(settings).window_ms,
        policies=policies,
        growth=growth,
        audited=audited_action,
        clock=clock,
    )


def _rules(settings: Settings) -> Rules:
    return Rules.of(settings.rewards, settings.reward_window_hours)
