"""The roll-out: how the challenger does, what follows from that, and moving it from stage to stage.

Invariant: every change is audited with its actor and reason, and none is made on a state that has changed meanwhile.
Looks are made by `app.bandit.rollout.monitor`; reading never makes one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple, Protocol

import numpy as np

from app.bandit.model.policies import Policies
from app.bandit.rollout.aggregates import Page, Sums
from app.bandit.rollout.bootstrap_intervals import Interval, look_size
from app.bandit.rollout.off_policy import Floats
from app.bandit.rollout.ports import Counts, RolloutLook, RolloutRepository
from app.bandit.rollout.stages import MOVES, Move, RolloutState, StageEvidence, refusal, target
from app.bandit.rollout.status import (
    DecisionsView,
    FiguresView,
    Growth,
    GuardrailsView,
    LookView,
    MoveView,
    RolloutStatus,
    VerdictView,
)
from app.bandit.rollout.verdict import FEWEST_USERS, Guardrails, Limits, Verdict, broken, too_little, verdict
from app.errors import Conflict
from app.features.clock import DAY_MS, Clock, rfc3339

# What guardrails are watched on: the newest tips shown for dismissals, and the decisions of the last hour for the rest.
# A tip without feedback so far counts as not dismissed: for both policies alike, so harm shows as soon as it is
# done, and at worst as less than it is.
NEWEST_SHOWN = 4_000
RECENT = 20_000
RECENT_MS = 3_600_000
FEWEST_RECENT = 200
# They are looked at all the time, so the chance of a false alarm is small each time.
RAIL_LEVEL = 0.001
RAIL_REPLICATES = 1_000
_SEED = 20_251
# The actor of automatic moves, and how long the overview shows them.
WORKER = "the worker"
TOLD_FOR_MS = 7 * DAY_MS
# What is broken after promotion is found out for the overview, which is drawn anew every ten seconds, but not so often.
KEPT_S = 20.0
# As the audit trail names them.
ACTIONS: dict[Move, str] = {"ramp": "ramp roll-out", "promote": "promote challenger", "rollback": "roll back roll-out"}


class RolloutAction(Protocol):
    """An audited action under way; `outcome` is what the trail will say of it."""

    outcome: str | None


class Audited(Protocol):
    """Around an action: the intent is written down before, what came of it after (see `app.operations.audit`)."""

    def __call__(self, actor: str, action: str) -> AbstractAsyncContextManager[RolloutAction]:
        """Of whom, and what."""
        ...


class Alarm(NamedTuple):
    """Something about the roll-out that needs attention, and what to do."""

    text: str
    advice: str


class Rollout:
    """One per process."""

    def __init__(
        self,
        *,
        book: RolloutRepository,
        limits: Limits,
        window_ms: int,
        policies: Policies,
        growth: Callable[[], Awaitable[Growth]],
        audited: Audited,
        clock: Clock,
        chance: Callable[[int], np.random.Generator] = np.random.default_rng,
    ) -> None:
        """`window_ms` is of rewards; `chance` makes a generator from a seed."""
        self.book = book
        self.limits = limits
        self._window_ms = window_ms
        self._policies = policies
        self._challenged = policies.challenger is not None
        self._growth = growth
        self._audited = audited
        self._clock = clock
        self.chance = chance
        self._kept: tuple[float, list[str]] | None = None

    async def status(self) -> RolloutStatus:
        """How it stands now."""
        state = await self.book.state()
        counts, looks = await self.counts(state), await self.book.looks()
        rails = await self.rails(state)
        evidence = self._evidence(state, counts, looks, rails)
        refusals = {move: refusal(move, evidence) for move in MOVES}
        champion, challenger = self._policies.champion, self._policies.challenger
        next_look_at = look_size((looks[-1].number if looks else 0) + 1)
        return RolloutStatus(
            stage=state.stage,
            share=state.share,
            reason=state.reason,
            changed_by=state.changed_by,
            changed_at=rfc3339(state.changed_at_ms) if state.changed_at_ms else None,
            champion=champion.id,
            challenger=challenger.id if challenger is not None else None,
            margin=self.limits.margin,
            verdict=VerdictView.of(evidence.verdict),
            decisions=DecisionsView(counts.evaluated, counts.waiting, counts.unshadowed, counts.served, next_look_at),
            figures=FiguresView.of(looks[-1]) if looks else None,
            guardrails=GuardrailsView.of(rails, self.limits),
            looks=[LookView.of(look) for look in looks],
            moves=[MoveView(move, why_not is None, why_not) for move, why_not in refusals.items()],
            states=await self._growth(),
        )

    async def counts(self, state: RolloutState) -> Counts:
        """What can be evaluated, as of now.

        A decision is served within one window or expires, and settled one window later; what is much older than both
        and unsettled is stuck, and holds nothing up.
        """
        return await self.book.counts(state, self._clock.now_ms() - 3 * self._window_ms)

    async def rails(self, state: RolloutState) -> Guardrails:
        """The guardrails, on decisions of late."""
        found = await self.book.recent(self._clock.now_ms() - RECENT_MS, RECENT)
        # What counts is how long the challenger's own answers take, beside the champion's. In the shadow all are the
        # champion's: a machine that is busy says nothing about who answers nobody.
        own, known = found.by_challenger > 0, self._challenged and state.stage != "shadow"
        timed, usual = (found.elapsed_ms[own], found.elapsed_ms[~own]) if known else (found.elapsed_ms, None)
        shown = await self.book.shown(state, NEWEST_SHOWN)
        dismissed = await asyncio.to_thread(self._dismissed, shown)
        return Guardrails(
            *dismissed,
            p99_ms=_p99(timed),
            p99_judged=known,
            champion_p99_ms=None if usual is None else _p99(usual),
            no_profile=float(found.without_profile.mean()) if len(found.without_profile) >= FEWEST_RECENT else None,
        )

    async def move(self, move: Move, actor: str, reason: str = "") -> RolloutState:
        """Ramp one step (or begin anew, once rolled back), promote, or roll back.

        Raises:
            Conflict: it is not allowed now, with the reason; or it was changed meanwhile.
        """
        async with self._audited(actor, ACTIONS[move]) as act:
            state = await self.book.state()
            evidence = StageEvidence(state, Verdict("hold", ""), 0, self._challenged)
            if move != "rollback":  # which needs no grounds
                counts, looks = await self.counts(state), await self.book.looks()
                evidence = self._evidence(state, counts, looks, await self.rails(state))
            to, said = target(move, evidence), evidence.verdict
            why = reason.strip() or ("the shadow begins anew" if to.anew else said.reason) or "no reason was given"
            moved = await self.book.move(state, to, why, actor, self._clock.now_ms())
            if moved is None:
                raise Conflict("the roll-out was changed meanwhile; look again")
            act.outcome = f"done: {state.words} to {to.words}: {why}"
            return moved

    async def alarm(self) -> Alarm | None:
        """What should be looked at; little is worked out for it, for it is asked often."""
        state = await self.book.state()
        age_ms = self._clock.now_ms() - state.changed_at_ms
        if state.stage == "rolled back" and state.changed_by == WORKER and age_ms < TOLD_FOR_MS:
            advice = "The champion serves every user again. Mend what is behind it; ramping begins anew in the shadow."
            return Alarm(f"The roll-out was rolled back by itself. {state.reason}", advice)
        if not self._challenged:  # the champion serves every user, whatever the stage
            return None
        if state.stage == "promoted" and (found := await self._broken_of_late(state)):
            advice = "Nothing rolls it back by itself after promotion. Mend what is behind it, or roll it back."
            return Alarm(f"The challenger is promoted, and a guardrail is broken. {' '.join(found)}", advice)
        looks = await self.book.looks() if state.stage == "ramp" else []
        # A guardrail that was broken when the look was made may have been mended; one that is now rolls back by itself.
        said = verdict(looks[-1].estimates, Guardrails(), self.limits) if looks else None
        if said is not None and said.word == "roll back":
            return Alarm(f"The challenger serves {state.share:.0%} of the users. {said.reason}", "Roll it back.")
        return None

    def broken(self, rails: Guardrails) -> list[str]:
        """A sentence for each guardrail that does not hold."""
        return broken(rails, self.limits)

    async def _broken_of_late(self, state: RolloutState) -> list[str]:
        if (kept := self._kept) is None or self._clock.monotonic() - kept[0] > KEPT_S:
            kept = self._kept = self._clock.monotonic(), self.broken(await self.rails(state))
        return kept[1]

    def _evidence(
        self, state: RolloutState, counts: Counts, looks: Sequence[RolloutLook], rails: Guardrails
    ) -> StageEvidence:
        said = self._verdict(looks[-1] if looks else None, rails, counts)
        return StageEvidence(state, said, counts.served, self._challenged)

    def _verdict(self, look: RolloutLook | None, rails: Guardrails, counts: Counts) -> Verdict:
        if look is not None:
            return verdict(look.estimates, rails, self.limits)
        if found := self.broken(rails):
            return Verdict("roll back", " ".join(found))
        few = too_little(counts.evaluated)
        if few is None:
            due = (
                "The first look is due: a worker makes it within a minute, where there are two users or more "
                "and a prior has been pooled."
            )
            return Verdict("insufficient data", due)
        if not counts.waiting:
            return few
        wait = f"{counts.waiting:,} more are settled, and count once all that were made before them are settled, too."
        return Verdict(few.word, f"{few.reason} {wait}")

    def _dismissed(self, page: Page) -> tuple[float | None, float | None, Interval | None]:
        sums = Sums()
        sums.add(page)
        if sums.n < FEWEST_RECENT or sums.users < FEWEST_USERS:
            return None, None, None
        found = sums.estimates(RAIL_LEVEL, self.chance(_SEED), RAIL_REPLICATES)
        return found.dismissed_champion, found.dismissed_challenger, found.dismissed_more


def _p99(elapsed_ms: Floats) -> float | None:
    return float(np.quantile(elapsed_ms, 0.99)) if len(elapsed_ms) >= FEWEST_RECENT else None
