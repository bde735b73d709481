"""Builds the contextual bandit, and the controller of its roll-out, from the settings and the database."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from app.bandit.learning.attribution import DecisionLearner, Rules, outcome_rewards
from app.bandit.learning.maintenance import EVERY_S, Maintenance
from app.bandit.model.thompson_sampling import Policies
from app.bandit.ports import ReadProfile
from app.bandit.rollout.controller import WATCH_EVERY_S, Rollout
from app.bandit.scoring import Scorer
from app.bootstrap.servers import Wrap, untraced
from app.features.clock import HOUR_MS, Clock
from app.operations.audit import AuditedAction, audited
from app.service import Bandit
from app.settings import Settings
from app.stores.sql.access import SqlAuditTrail
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

    def audited_action(actor: str, action: str) -> AbstractAsyncContextManager[AuditedAction]:
        return audited(SqlAuditTrail(database), clock.now_ms(), actor, action, "rollout")

    policies = Policies() if settings.shadow else Policies(challenger=None)
    rules = Rules(outcome_rewards(settings.rewards), settings.reward_window_hours * HOUR_MS)
    decisions = traced("decisions", SqlDecisions(database, policies))
    states = SqlStates(database, policies.longest)
    learning = traced("learning", SqlLearning(database, policies, rules))
    maintenance = Maintenance(
        learning=learning, states=states, decisions=decisions, policies=policies, clock=clock, metrics=metrics
    )
    rollout = Rollout(
        repository=SqlRollout(database, policies.challenger.spec.hash if policies.challenger is not None else None),
        rails=settings.rollout_guardrails,
        margin=settings.rollout_margin,
        window_ms=rules.window_ms,
        policies=policies,
        states=states,
        audited=audited_action,
        clock=clock,
    )
    return Bandit(
        scorer=Scorer(
            decisions=decisions,
            read_profile=read_profile,
            policies=policies,
            new_id=new_id or time_ordered_id,
            clock=clock,
            metrics=metrics,
        ),
        learner=DecisionLearner(learning, clock, metrics),
        maintenance=maintenance,
        decisions=decisions,
        states=states,
        rollout=rollout,
        periodic=[
            ("bandit maintenance", maintenance.once, EVERY_S),
            ("shadows", maintenance.shadow, EVERY_S),
            ("roll-out", rollout.watch, WATCH_EVERY_S),
        ],
    )
