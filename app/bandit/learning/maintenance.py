"""Periodic work of a worker for the bandit.

It settles decisions whose reward window has closed, extends ("grows") users' statistics to the spec with the most
inputs, and estimates the pooled prior from those that have grown. It also computes the shadow of each decision: the
ranking by the policy that did not choose. Each step is a small transaction, so interrupted work continues where it
stopped. Several workers may run at the same time: each skips what another has done.

The statistics are summed by ranges of users, in rounds that begin at the same times in all workers. A worker spends a
limited time on this between two steps of the other work. When all ranges of the round are claimed, it makes a prior
from the sums. If a slower worker finishes a range after that, it makes another prior, which includes this range.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from app.bandit.learning.attribution import DecisionLearner
from app.bandit.model.thompson_sampling import Policies
from app.bandit.ports import DecisionRepository, StateRepository
from app.features.clock import Clock
from app.telemetry import Metrics, logger

EVERY_S = 2.0
POOL_EVERY_MS = 180_000
POOL_FOR_S = 0.5
GROW_FOR_S = 5.0
SHADOWS_AT_ONCE = 50  # so that storing them does not delay a decision for long
REST_S = 0.05
log = logger("bandit.maintenance")


class Maintenance:
    def __init__(
        self,
        *,
        learner: DecisionLearner,
        states: StateRepository,
        decisions: DecisionRepository,
        policies: Policies,
        clock: Clock,
        metrics: Metrics,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._learner = learner
        self._states = states
        self._decisions = decisions
        self._policies = policies
        self._clock = clock
        self._metrics = metrics
        self._pause = pause
        self._round_ms = self._ended_round_ms = 0

    async def once(self) -> None:
        """Do one step: settle decisions whose reward window has closed, and extend users' statistics. When all users'
        are extended, sum the statistics of some ranges of users, and when all ranges are summed, estimate the prior.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        await self._learner.settle()
        if not await self.grow(GROW_FOR_S):
            return
        if self._round_ms == self._ended_round_ms:
            self._round_ms = self._clock.now_ms() // POOL_EVERY_MS * POOL_EVERY_MS
        if self._round_ms != self._ended_round_ms and await self.sum_ranges(self._round_ms, POOL_FOR_S):
            await self.pool()
            await self._count()
            self._ended_round_ms = self._round_ms

    async def grow(self, for_s: float) -> bool:
        """Extend users' statistics to the spec with the most inputs, for about `for_s` seconds. Return True if no user
        is left."""
        until = self._clock.monotonic() + for_s
        total = grown = await self._learner.grow()
        while grown and self._clock.monotonic() < until:
            await self._pause(REST_S)
            grown = await self._learner.grow()
            total += grown
        if total:
            log.info("statistics_grown", users=total, spec=self._policies.longest.hash[:12])
            await self._count()
        return not grown

    async def sum_ranges(self, round_ms: int, for_s: float) -> bool:
        """Sum the statistics of ranges of users, for about `for_s` seconds, skipping ranges that a worker has claimed
        since `round_ms` (epoch ms). Return True if no range is left, or if no policy uses a pooled prior."""
        until = self._clock.monotonic() + for_s
        while self._policies.longest.pooled and await self._states.sum_range(round_ms, self._clock.now_ms()):
            if self._clock.monotonic() >= until:
                return False
        return True

    async def shadow(self) -> None:
        """Add the missing shadows of unsettled decisions: the rankings by the policy that did not choose.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        after = ("", 0)
        while (place := await self._decisions.add_shadows(after, SHADOWS_AT_ONCE)) is not None:
            after = place
            await self._pause(REST_S)

    async def pool(self) -> bool:
        """Estimate a pooled prior from the stored sums, and store it. Do nothing if no policy uses a pooled prior, or
        if no sum has changed since the newest prior. Return whether a prior was stored."""
        if not self._policies.longest.pooled:
            return False
        prior = await self._states.pool(self._clock.now_ms())
        if prior is not None:
            log.info("prior_pooled", users=prior.users, decisions=prior.decisions)
        return prior is not None

    async def _count(self) -> None:
        growth = await self._states.growth()
        self._metrics.learned_states.set(growth.users)
        self._metrics.states_to_grow.set(growth.to_grow)
        self._metrics.prior_version.set(await self._states.prior_version())
