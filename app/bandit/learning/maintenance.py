"""Periodic work of a worker for the bandit.

Each step is a small transaction, so interrupted work continues where it stopped. Several workers may run at the same
time: each skips what another has done.

The pooled prior is made from the sum of all users' statistics. Workers sum ranges of users, in rounds that begin at the
same times in all workers. When all ranges of a round are claimed, a worker makes a prior from the sums. If a slower
worker finishes a range after that, it makes another prior, which includes this range.
"""

import asyncio
from collections.abc import Awaitable, Callable

import msgspec

from app.bandit.model.thompson_sampling import Policies
from app.bandit.ports import DecisionRepository, LearningRepository, StateRepository
from app.features.clock import Clock
from app.telemetry import Metrics, logger

EVERY_S = 2.0
POOL_EVERY_MS = 180_000
POOL_FOR_S = 0.5
GROW_FOR_S = 5.0
SETTLED_AT_ONCE = 200
SHADOWS_AT_ONCE = 50  # so that storing them does not delay a decision for long
REST_S = 0.05  # between two transactions, so that other processes can write
log = logger("bandit.maintenance")


class Maintenance(msgspec.Struct, kw_only=True, eq=False):
    learning: LearningRepository
    states: StateRepository
    decisions: DecisionRepository
    policies: Policies
    clock: Clock
    metrics: Metrics
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep
    _round_ms: int = 0
    _ended_round_ms: int = 0

    async def once(self) -> None:
        """Do one step: settle decisions whose reward window has closed, and extend users' statistics. If none are
        left to extend, sum ranges of users. If no range is left, estimate the prior. Raises `StoreUnavailable`."""
        await self.settle()
        if not await self.grow(GROW_FOR_S):
            return
        if self._round_ms == self._ended_round_ms:
            self._round_ms = self.clock.now_ms() // POOL_EVERY_MS * POOL_EVERY_MS
        if self._round_ms != self._ended_round_ms and await self.sum_ranges(self._round_ms, POOL_FOR_S):
            await self.pool()
            await self._count()
            self._ended_round_ms = self._round_ms

    async def settle(self) -> int:
        """Settle the decisions whose reward window has closed without feedback: learn the default reward if the tip was
        served, and otherwise expire the decision. Return their number."""
        total = 0
        while True:
            counts = await self.learning.settle(self.clock.now_ms(), SETTLED_AT_ONCE)
            for outcome, count in counts.items():
                self.metrics.decisions_settled.labels(outcome).inc(count)
            total += counts["default"] + counts["expired"]
            if sum(counts.values()) < SETTLED_AT_ONCE:
                return total
            await self.pause(REST_S)

    async def grow(self, for_s: float) -> bool:
        """Extend ("grow") users' statistics to the spec with the most inputs, for about `for_s` seconds. Return True if
        no user's statistics are left to extend."""
        total, until = 0, self.clock.monotonic() + for_s
        while grown := await self.learning.grow(self.clock.now_ms()):
            total += grown
            if self.clock.monotonic() >= until:
                break
            await self.pause(REST_S)
        if total:
            log.info("statistics_grown", users=total, spec=self.policies.longest.hash[:12])
            await self._count()
        return not grown

    async def sum_ranges(self, round_ms: int, for_s: float) -> bool:
        """Sum the statistics of ranges of users, for about `for_s` seconds, skipping ranges that a worker has claimed
        since `round_ms` (epoch ms). Return True if no range is left, or if no policy uses a pooled prior."""
        until = self.clock.monotonic() + for_s
        while self.policies.longest.pooled and await self.states.sum_range(round_ms, self.clock.now_ms()):
            if self.clock.monotonic() >= until:
                return False
        return True

    async def pool(self) -> bool:
        """Estimate a pooled prior from the stored sums and store it; False if no sum has changed since the last one."""
        prior = await self.states.pool(self.clock.now_ms())
        if prior is not None:
            log.info("prior_pooled", users=prior.users, decisions=prior.decisions)
        return prior is not None

    async def shadow(self) -> None:
        """Compute and store the missing shadows (see `Decision`) of unsettled decisions. Raises `StoreUnavailable`."""
        after = ("", 0)
        while (place := await self.decisions.add_shadows(after, SHADOWS_AT_ONCE)) is not None:
            after = place
            await self.pause(REST_S)

    async def _count(self) -> None:
        growth = await self.states.growth()
        self.metrics.learned_states.set(growth.users)
        self.metrics.states_to_grow.set(growth.to_grow)
        self.metrics.prior_version.set(await self.states.prior_version())
