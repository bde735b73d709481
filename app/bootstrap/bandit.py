"""Builds the bandit and its roll-out."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict

import msgspec

from app.bandit.learning.attribution import Rules
from app.bandit.model.policies import Policies
from app.bandit.ports import ReadProfile
from app.bandit.rollout.assignment import serves_challenger
from app.bandit.rollout.controller import Growth, Rollout
from app.bandit.rollout.verdict import Limits
from app.bandit.shadow.subprocess.process import ProcessBeside
from app.bootstrap.bandit_parts import Bandit, Outside, join
from app.features.clock import Clock
from app.features.registry import Registry, Scalar
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

_values = msgspec.json.Decoder(list[Scalar]).decode


def bandit(
    settings: Settings, database: Database, reader: ProfileReader, registry: Registry, clock: Clock, metrics: Metrics
) -> Bandit:
    """The bandit of one process."""
    lineup = Policies.of(shadow=settings.shadow)
    rules = Rules.of(settings.rewards, settings.reward_window_hours)
    outside = Outside(
        SqliteDecisions(database, lineup.longest),
        SqliteLearning(database, lineup, rules),
        SqliteStates(database, lineup.longest),
        profiles(reader, registry),
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
    """The challenger's roll-out. All that is done to it stands in the audit trail, whoever does it."""
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
        challenged=lineup.challenger is not None,
        growth=growth,
        audited=in_the_trail,
        clock=clock,
    )


def profiles(reader: ProfileReader, registry: Registry) -> ReadProfile:
    """Reads profiles as a recommender does, near values first."""
    mask = registry.full_mask

    async def read(user_id: str) -> Mapping[str, Scalar]:
        found = reader.near_values(user_id, mask)
        if found is None:
            found = (await reader.read_far_values({user_id: mask}))[user_id]
        return dict(zip(registry.names, _values(b"[" + b",".join(found) + b"]"), strict=True))

    return read
