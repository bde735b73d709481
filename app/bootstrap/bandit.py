"""Builds the bandit and its roll-out."""

from __future__ import annotations

import secrets
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict

from app.bandit.learning.attribution import Rules
from app.bandit.model.policies import Policies
from app.bandit.rollout.assignment import serves_challenger
from app.bandit.rollout.controller import Rollout
from app.bandit.rollout.status import Growth
from app.bandit.rollout.verdict import Limits
from app.bandit.shadow.subprocess.process import ProcessBeside
from app.bootstrap.bandit_parts import Bandit, Outside, join
from app.features.clock import Clock
from app.operations.audit import AuditedAction, audited
from app.profiles.online.reader import ProfileReader
from app.settings import Settings
from app.stores.sqlite.audit_trail import SqliteAuditTrail
from app.stores.sqlite.database import Database
from app.stores.sqlite.decisions import SqliteDecisions
from app.stores.sqlite.learning import SqliteLearning
from app.stores.sqlite.rollout import SqliteRollout
from app.stores.sqlite.states import SqliteStates
from app.telemetry import Metrics


def bandit(settings: Settings, database: Database, reader: ProfileReader, clock: Clock, metrics: Metrics) -> Bandit:
    """The bandit of one process."""
    lineup = Policies.of(shadow=settings.shadow)
    rules = Rules.of(settings.rewards, settings.reward_window_hours)
    outside = Outside(
        SqliteDecisions(database, lineup.longest),
        SqliteLearning(database, lineup, rules),
        SqliteStates(database, lineup.longest),
        reader.read_features,
        ProcessBeside(),
    )

    def new_id() -> str:
        # It begins with the time, so that the newest stand together in the index.
        return f"{clock.now_ms():012x}{secrets.token_hex(10)}"

    return join(
        outside,
        lineup,
        serves_challenger=serves_challenger,
        rollout=rollout(settings, database, clock, lineup, rules),
        new_id=new_id,
        clock=clock,
        metrics=metrics,
    )


def rollout(settings: Settings, database: Database, clock: Clock, lineup: Policies, rules: Rules) -> Rollout:
    """The challenger's roll-out. Every action on it is in the audit trail."""
    trail, states = SqliteAuditTrail(database), SqliteStates(database, lineup.longest)

    async def growth() -> Growth:
        counts = await states.counts()
        return Growth(sum(counts.values()), sum(counts.get(spec.hash, 0) for spec in lineup.shorter()))

    def in_the_trail(actor: str, action: str) -> AbstractAsyncContextManager[AuditedAction]:
        return audited(trail, clock.now_ms(), actor, action, "rollout")

    return Rollout(
        book=SqliteRollout(database),
        limits=Limits(margin=settings.rollout_margin, **asdict(settings.rollout_guardrails)),
        window_ms=rules.window_ms,
        policies=lineup,
        growth=growth,
        audited=in_the_trail,
        clock=clock,
    )
