"""Maintenance: what a worker does for the bandit in the background, again and again.

Decisions whose window has closed are settled, evidence of a shorter spec is grown, and the prior is pooled anew. Each
is done in small steps, each step in a transaction of its own, so whatever is cut short goes on where it was. Several
workers may do it at once: what one has done, the others find done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from app.bandit.learning.attribution import DecisionLearner
from app.bandit.model.policies import Policies
from app.bandit.ports import StateRepository
from app.features.clock import Clock
from app.telemetry import Metrics, logger

EVERY_S = 2.0
POOL_EVERY_S = 180.0
GROWN_AT_ONCE = 100
REST_S = 0.05
log = logger("bandit.upkeep")


class Maintenance:
    """One per worker."""

    def __init__(
        self,
        *,
        learner: DecisionLearner,
        states: StateRepository,
        lineup: Policies,
        clock: Clock,
        metrics: Metrics,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._learner = learner
        self._states = states
        self._lineup = lineup
        self._clock = clock
        self._metrics = metrics
        self._pause = pause
        self._pool_at = float("-inf")

    async def once(self) -> None:
        """Settle, grow, and pool where it is time; raises `StoreUnavailable`."""
        await self._learner.settle()
        await self.grow()
        if self._clock.monotonic() >= self._pool_at:
            self._pool_at = self._clock.monotonic() + POOL_EVERY_S
            await self.pool()
            await self._count()

    async def grow(self) -> int:
        """Bring all evidence to the longest spec; how many users' that were."""
        total = 0
        while grown := await self._states.grow(GROWN_AT_ONCE, self._clock.now_ms()):
            total += grown
            await self._pause(REST_S)
        if total:
            log.info("evidence_grown", users=total, spec=self._lineup.longest.hash[:12])
            await self._count()
        return total

    async def pool(self) -> bool:
        """Pool the prior if it is used and anything was learned since; return whether there is a new one."""
        if not self._lineup.longest.pooled:
            return False
        made = await self._states.pooled(self._clock.now_ms())
        if made is None:
            return False
        prior, changes = made
        added = await self._states.add_prior(prior, changes)
        if added:
            log.info("prior_pooled", users=prior.users, decisions=prior.decisions)
        return added

    async def _count(self) -> None:
        counts = await self._states.counts()
        self._metrics.bandit.states.set(sum(counts.values()))
        shorter = [spec.hash for spec in self._lineup.shorter()]
        self._metrics.bandit.to_grow.set(sum(counts.get(spec_hash, 0) for spec_hash in shorter))
        self._metrics.bandit.prior.set(await self._states.prior_version())
