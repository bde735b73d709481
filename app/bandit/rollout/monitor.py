"""Periodic work of a worker for the roll-out: interim analyses ("looks") and automatic rollback.

Looks are made at fixed numbers of decisions (`bootstrap_intervals`), by any worker. If two workers make the same look,
the results are equal, and only one is stored. Guardrails are checked at every call. If a guardrail breaks while the
challenger serves users, the roll-out is rolled back. In the shadow stage no user is harmed, so a broken guardrail is
only reported. A promotion, which an admin decided, is not undone.
"""

from __future__ import annotations

import asyncio

from app.bandit.numpy_on_demand import np
from app.bandit.rollout.aggregates import DecisionSums
from app.bandit.rollout.bootstrap_intervals import due_look, look_level
from app.bandit.rollout.controller import WORKER, Rollout
from app.bandit.rollout.ports import Counts, RolloutLook
from app.bandit.rollout.stages import RolloutState, stage_label
from app.bandit.rollout.verdict import broken, verdict
from app.errors import Conflict
from app.features.clock import Clock
from app.telemetry import logger

EVERY_S = 20.0
log = logger("bandit.rollout")


class RolloutMonitor:
    def __init__(self, rollout: Rollout, clock: Clock) -> None:
        self._rollout = rollout
        self._clock = clock

    async def once(self) -> None:
        """Make the interim analysis if one is due, and check the guardrails. Do nothing once promoted or rolled back.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        state = await self._rollout.repository.state()
        if not state.running:
            return
        await self.look(state, await self._rollout.counts(state))
        if state.share:
            await self._guard(state)

    async def look(self, state: RolloutState, counts: Counts) -> RolloutLook | None:
        """Make and store the interim analysis that is due. Return None if none is due or another worker was first."""
        looks = await self._rollout.repository.looks()
        number = due_look(counts.evaluated, looks[-1].number if looks else 0)
        if number is None:
            return None
        sums = DecisionSums()
        async for page in self._rollout.repository.pages(state, counts.until):
            sums.add(page)
        # Users may have been erased since the decisions were counted.
        if sums.users < 2 or due_look(sums.n, number - 1) is None:
            return None
        level = look_level(number)
        estimates = await asyncio.to_thread(sums.estimates, level, np.random.default_rng(number))
        said = verdict(estimates, await self._rollout.guardrails(state), self._rollout.limits)
        made = RolloutLook(number, self._clock.now_ms(), level, stage_label(state), estimates, said)
        if not await self._rollout.repository.add_look(made, state):
            return None
        log.info("rollout_look", number=number, decisions=estimates.n, verdict=said.word, reason=said.reason)
        return made

    async def _guard(self, state: RolloutState) -> None:
        if not (found := broken(await self._rollout.guardrails(state), self._rollout.limits)):
            return
        reason = " ".join(found)
        try:
            await self._rollout.move("rollback", WORKER, reason)
        except Conflict as error:  # another process moved it first
            log.info("rollout_changed_meanwhile", detail=str(error))
            return
        log.warning("rolled_back", share=state.share, reason=reason)
