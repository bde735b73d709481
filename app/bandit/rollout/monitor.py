"""What a worker does for the roll-out, again and again: the next look when it is due, and going back by itself.

Looks are made at fixed numbers of decisions (`intervals`), each once, by whichever worker comes first; the same look
made twice is the same. Guardrails are watched all the time. One that breaks while the challenger serves anybody rolls
it back at once: said in the log, in the audit trail and on the overview. In the shadow no user is harmed, so nothing is
done there but to say it; nor is anything undone that people have promoted.
"""

from __future__ import annotations

import asyncio

from app.bandit.rollout.aggregates import Sums
from app.bandit.rollout.bootstrap_intervals import due_look, look_level
from app.bandit.rollout.controller import WORKER, Rollout
from app.bandit.rollout.ports import Counts, RolloutLook
from app.bandit.rollout.stages import RolloutState
from app.bandit.rollout.verdict import verdict
from app.errors import Conflict
from app.features.clock import Clock
from app.telemetry import logger

EVERY_S = 20.0
log = logger("bandit.rollout")


class RolloutWatch:
    """One per worker."""

    def __init__(self, rollout: Rollout, clock: Clock) -> None:
        self._rollout = rollout
        self._clock = clock

    async def once(self) -> None:
        """Make the look that is due, and see to the guardrails; raises `StoreUnavailable`."""
        state = await self._rollout.book.state()
        if not state.running:
            return
        counts = await self._rollout.counts(state)
        await self.look(state, counts)
        await self._guard(state, counts)

    async def look(self, state: RolloutState, counts: Counts) -> RolloutLook | None:
        """The look that is due, where one is, and it was kept."""
        looks = await self._rollout.book.looks()
        number = due_look(counts.evaluated, looks[-1].number if looks else 0)
        if number is None:
            return None
        sums = Sums()
        async for page in self._rollout.book.pages(state, counts.until):
            sums.add(page)
        # Meanwhile some may have been erased.
        if sums.users < 2 or due_look(sums.n, number - 1) is None:
            return None
        level = look_level(number)
        estimates = await asyncio.to_thread(sums.estimates, level, self._rollout.chance(number))
        said = verdict(estimates, await self._rollout.rails(state), self._rollout.limits)
        made = RolloutLook(number, self._clock.now_ms(), level, state.words, estimates, said)
        if not await self._rollout.book.add_look(made, state):
            return None
        log.info("rollout_look", number=number, decisions=estimates.n, verdict=said.word, reason=said.reason)
        return made

    async def _guard(self, state: RolloutState, counts: Counts) -> None:
        if not state.share:
            return
        if found := self._rollout.broken(await self._rollout.rails(state)):
            reason = " ".join(found)
            try:
                await self._rollout.move("rollback", WORKER, reason)
            except Conflict as error:  # another process was faster
                log.info("rollout_changed_meanwhile", detail=str(error))
                return
            log.warning("rolled_back", share=state.share, reason=reason)
