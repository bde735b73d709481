"""Periodic work of a worker for the bandit.

It settles decisions whose reward window has closed, extends ("grows") users' statistics to the spec with the most
inputs, and estimates the pooled prior from the statistics. Each step is a small transaction, so interrupted work
continues where it stopped. Several workers may run at the same time: each skips what another has done.
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
log = logger("bandit.maintenance")


class Maintenance:
    def __init__(
        self,
        *,
        learner: DecisionLearner,
        states: StateRepository,
        policies: Policies,
        clock: Clock,
        metrics: Metrics,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._learner = learner
        self._states = states
        self._policies = policies
        self._clock = clock
        self._metrics = metrics
        self._pause = pause
        self._pool_at = float("-inf")

    async def once(self) -> None:
        """Settle decisions and extend statistics; estimate the prior every `POOL_EVERY_S` seconds.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        await self._learner.settle()
        await self.grow()
        if self._clock.monotonic() >= self._pool_at:
            self._pool_at = self._clock.monotonic() + POOL_EVERY_S
            await self.pool()
            await self._count()

    async def grow(self) -> int:
        """Extend all users' statistics to the longest spec (see `StateRepository.grow`). Return the number of users."""
        total = 0
        while grown := await self._states.grow(GROWN_AT_ONCE, self._clock.now_ms()):
            total += grown
            await self._pause(REST_S)
        if total:
            log.info("statistics_grown", users=total, spec=self._policies.longest.hash[:12])
            await self._count()
        return total

    async def pool(self) -> bool:
        """Estimate and store a new pooled prior, if a policy uses it and any user's statistics have changed since the
        newest prior. Return whether a new prior was stored."""
        if not self._policies.longest.pooled:
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
        self._metrics.bandit.to_grow.set(sum(counts.get(spec.hash, 0) for spec in self._policies.shorter()))
        self._metrics.bandit.prior.set(await self._states.prior_version())
