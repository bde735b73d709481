"""Controls the roll-out: reports its status, moves it from stage to stage, and reports problems to admins.

A worker calls `Rollout.watch` periodically. It makes looks (interim analyses) at fixed numbers of decisions. If two
workers make the same look, the results are equal, and only one is stored. If a guardrail breaks while the challenger
serves users, the roll-out is rolled back. In the shadow stage no user is harmed, so a broken guardrail is only
reported. A promotion, which an admin decided, is not undone.

A stage belongs to the challenger that reached it. If it belongs to the challenger of an earlier release, the worker
begins the roll-out anew in the shadow. If it belongs to a challenger that the worker does not know, that challenger is
of a later release, and the worker does nothing.

Invariant: the audit trail has every move with actor and reason, and no move is made on a state that has since changed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec

from app.bandit.model.inputs import SPECS, Array
from app.bandit.model.thompson_sampling import Policies
from app.bandit.numpy_on_demand import np
from app.bandit.ports import Counts, RolloutLook, RolloutRepository, StateRepository
from app.bandit.rollout.aggregates import FEWEST_USERS, DecisionSums, Experiment
from app.bandit.rollout.bootstrap_intervals import FIRST_LOOK, IntervalView, look_level, look_number, share_bound
from app.bandit.rollout.stages import MOVES, Move, RolloutState, Target, stage_label, target
from app.bandit.rollout.status import DecisionsView, FiguresView, LookView, MoveView, RolloutStatus, VerdictView
from app.bandit.rollout.verdict import (
    SLOW_SHARE,
    SLOWER,
    DismissalsView,
    GuardrailsView,
    GuardrailView,
    Verdict,
    broken,
    too_little,
    verdict,
)
from app.errors import Conflict
from app.features.clock import DAY_MS, HOUR_MS, Clock, rfc3339
from app.features.views import view
from app.settings.parsers import RolloutRails
from app.telemetry import logger

WATCH_EVERY_S = 20.0
# Dismissals, and the rewards of each policy's users, are measured on the shown tips of the newest `NEWEST` decisions.
# Answer times are measured on the newest `NEWEST_ANSWERS` decisions of the last day (and of the stage, unless it is the
# shadow), missing profiles on those of the last hour. A tip without feedback counts as not dismissed and has reward 0.
# So a harmful challenger is noticed before the reward window closes, but its harm may be underestimated.
NEWEST = 20_000
NEWEST_ANSWERS = 40_000
FEWEST_RECENT = 200
FEWEST_ANSWERS = 1_000
# The actor of automatic moves, and for how long the overview reports them.
WORKER = "the worker"
REPORTED_FOR_MS = 7 * DAY_MS
# The overview is drawn every ten seconds; broken guardrails after promotion are computed less often.
CACHED_S = 20.0
# The names of moves in the audit trail.
ACTIONS: dict[Move, str] = {"ramp": "ramp roll-out", "promote": "promote challenger", "rollback": "roll back roll-out"}
log = logger("bandit.rollout")


class RolloutAction(Protocol):
    outcome: str | None  # the text that the audit trail stores when the action ends


class Rollout(msgspec.Struct, kw_only=True, eq=False):
    """The roll-out of the challenger. `margin` is the tolerated loss in reward per decision, `window_ms` the length of
    the reward window. `audited` is called with actor and action, and returns a context that records the intent on entry
    and the outcome on exit."""

    repository: RolloutRepository
    rails: RolloutRails
    margin: float
    window_ms: int
    policies: Policies
    states: StateRepository
    audited: Callable[[str, str], AbstractAsyncContextManager[RolloutAction]]
    clock: Clock
    _cached_broken: tuple[float, list[str]] | None = None

    def _belongs_to_another(self, state: RolloutState) -> bool:
        own = self.policies.challenger
        return own is not None and state.challenger not in (None, own.spec.hash)

    def _effective(self, state: RolloutState) -> RolloutState:
        """The state for this release: if the stage belongs to another challenger, it counts as rolled back."""
        if not self._belongs_to_another(state):
            return state
        reason = f"The stage {stage_label(state)} is that of another challenger, with the spec {state.challenger}."
        return state._replace(stage="rolled back", share=0.0, reason=reason)

    async def state(self) -> RolloutState:
        return self._effective(await self.repository.state())

    async def status(self) -> RolloutStatus:
        stored = await self.repository.state()
        state = self._effective(stored)
        counts, looks = await self.counts(state), await self.repository.looks()
        guardrails, experiment = await self.guardrails(state)
        said = self._verdict(looks, guardrails, experiment, counts)
        champion, challenger = self.policies
        moves = []
        for move in MOVES:
            try:
                target(move, stored if move == "rollback" else state, said, counts.served, challenger is not None)
                moves.append(MoveView(move, True, None))
            except Conflict as error:
                moves.append(MoveView(move, False, str(error)))
        next_look_at = FIRST_LOOK << look_number(looks[-1].estimates.n if looks else 0)
        return view(
            RolloutStatus,
            state,
            changed_at=rfc3339(state.changed_at_ms) if state.changed_at_ms else None,
            champion=champion.id,
            challenger=challenger.id if challenger is not None else None,
            margin=self.margin,
            verdict=VerdictView(*msgspec.structs.astuple(said)),
            decisions=DecisionsView(*counts[1:5], next_look_at, counts.without_prior),
            figures=FiguresView.of(looks[-1]) if looks else None,
            guardrails=guardrails,
            experiment=experiment,
            looks=[LookView.of(look) for look in looks],
            moves=moves,
            states=await self.states.growth(),
        )

    async def counts(self, state: RolloutState) -> Counts:
        """Count the decisions of this roll-out by whether they can be evaluated. An unsettled decision holds back all
        newer decisions. Within one reward window a decision is served or expires, and within a second one it is
        settled. A decision that is unsettled after three windows will never be settled, so it is ignored."""
        return await self.repository.counts(state, self.clock.now_ms() - 3 * self.window_ms)

    async def guardrails(self, state: RolloutState) -> tuple[GuardrailsView, Experiment | None]:
        """The guardrails, measured on recent decisions, and the `Experiment` if both policies serve, else None."""
        now_ms = self.clock.now_ms()
        recent = await self.repository.recent(now_ms - DAY_MS, NEWEST_ANSWERS)
        # The limit is for the challenger's own answers of this stage, compared with the champion's. In the shadow stage
        # the champion serves all answers, so their time is shown but not judged.
        own, judged = recent.by_challenger > 0, self.policies.challenger is not None and state.stage != "shadow"
        since = recent.made_ms >= state.changed_at_ms
        elapsed = recent.elapsed_ms[own & since] if judged else recent.elapsed_ms
        page, arms = await self.repository.shown(state, NEWEST)
        missing = recent.without_profile[recent.made_ms >= now_ms - HOUR_MS]
        no_profile = float(missing.mean()) if len(missing) >= FEWEST_RECENT else None
        # If the machine is slow for all users, the challenger is not the cause, and rolling back would not help.
        champions = _p99(recent.elapsed_ms[~own & since]) if judged else None
        allowed = max(self.rails.p99_ms, SLOWER * (champions or 0.0))
        slow, answers = int((elapsed > allowed).sum()), len(elapsed)

        def measured() -> tuple[GuardrailsView, Experiment | None]:
            sums = DecisionSums()
            sums.add(page)
            enough = sums.n >= FEWEST_RECENT and sums.users >= FEWEST_USERS
            champion, challenger, more = sums.dismissals() if enough else (None, None, None)
            bound = share_bound(slow, answers) if answers >= FEWEST_ANSWERS else None
            experiment = Experiment.of(page, arms, state.share) if judged and 0 < state.share < 1 else None
            found = GuardrailsView(
                DismissalsView(champion, challenger, more and IntervalView(*more), self.rails.dismissed),
                GuardrailView(_p99(elapsed), allowed, judged),
                GuardrailView(bound, SLOW_SHARE, judged),
                GuardrailView(no_profile, self.rails.no_profile),
                [],
            )
            found.broken = broken(found, experiment, self.margin)
            return found, experiment

        return await asyncio.to_thread(measured)

    async def move(self, move: Move, actor: str, reason: str = "", *, seen: RolloutState | None = None) -> RolloutState:
        """Ramp by one step, promote, or roll back. After a rollback, `ramp` restarts the roll-out in the shadow stage.
        `seen` is the stored state that led to the move; None for the present one. Raises `Conflict` if the move is not
        allowed, or another process changed the roll-out meanwhile."""
        async with self.audited(actor, ACTIONS[move]) as action:
            state = seen or await self.repository.state()
            # A rollback also ends the stage of another challenger, which another release may let serve.
            judged = state if move == "rollback" else self._effective(state)
            said, served = Verdict("hold", ""), 0
            if move != "rollback":  # a rollback needs no verdict
                counts, looks = await self.counts(state), await self.repository.looks()
                said, served = self._verdict(looks, *await self.guardrails(state), counts), counts.served
            to = target(move, judged, said, served, self.policies.challenger is not None)
            why = reason.strip() or ("the shadow begins anew" if to.anew else said.reason) or "no reason was given"
            return await self._change(action, state, to, why, actor)

    async def _change(self, act: RolloutAction, state: RolloutState, to: Target, why: str, actor: str) -> RolloutState:
        moved = await self.repository.move(state, to, why, actor, self.clock.now_ms())
        if moved is None:
            raise Conflict("the roll-out was changed meanwhile by another process; read its status and try again")
        act.outcome = f"done: {stage_label(state)} to {stage_label(to)}: {why}"
        return moved

    async def alarm(self) -> tuple[str, str] | None:
        """The problem that needs attention now, and advice on what to do; None if there is no problem. Every overview
        calls this method, so it must be cheap."""
        state = await self.repository.state()
        if self._belongs_to_another(state):
            advice = (
                "A worker starts the roll-out anew in the shadow. If it does not, that challenger belongs to a later "
                "release: ramp to start anew."
            )
            return f"In this release the champion serves every user. {self._effective(state).reason}", advice
        age_ms = self.clock.now_ms() - state.changed_at_ms
        if state.stage == "rolled back" and state.changed_by == WORKER and age_ms < REPORTED_FOR_MS:
            advice = "The champion serves every user again. Fix the cause; ramping then begins anew in the shadow."
            return f"The roll-out was rolled back automatically. {state.reason}", advice
        if self.policies.challenger is None:  # the champion serves every user, whatever the stage
            return None
        if state.stage == "promoted" and (found := await self._broken_recently(state)):
            advice = "Nothing is rolled back automatically after promotion. Fix the cause, or roll back."
            return f"The challenger is promoted, and a guardrail is broken. {' '.join(found)}", advice
        looks = await self.repository.looks() if state.stage == "ramp" else []
        # Judged without guardrails: a guardrail that was broken at the time of the look may hold again, and one that is
        # broken now rolls back automatically.
        said = verdict(looks[-1].estimates, self.margin) if looks else None
        if said is not None and said.word == "roll back":
            return f"The challenger serves {state.share:.0%} of the users. {said.reason}", "Roll it back."
        return None

    async def watch(self) -> None:
        """In the shadow and while ramping, make and store a look (an interim analysis) if one is due. Then roll back if
        the challenger serves users and a guardrail is broken. In other stages, do nothing. In any stage that belongs to
        an earlier release's challenger, only begin the roll-out anew in the shadow. Raises `StoreUnavailable`."""
        state = await self.repository.state()
        try:
            if self._belongs_to_another(state):
                if state.challenger in SPECS:
                    await self._begin_anew(state)
            elif state.stage in ("shadow", "ramp"):
                await self.look(state, await self.counts(state))
                if state.share and (found := (await self.guardrails(state))[0].broken):
                    await self.move("rollback", WORKER, reason := " ".join(found), seen=state)
                    log.warning("rolled_back", share=state.share, reason=reason)
        except Conflict as error:  # another process moved it first
            log.info("rollout_changed_meanwhile", detail=str(error))

    async def _begin_anew(self, state: RolloutState) -> None:
        why = f"The stage {stage_label(state)} belongs to another challenger, so this one begins in the shadow."
        async with self.audited(WORKER, "begin roll-out anew") as action:
            await self._change(action, state, Target("shadow", 0.0, anew=True), why, WORKER)
        log.warning("rollout_begins_anew", before=stage_label(state), spec=self.policies.longest.hash, reason=why)

    async def look(self, state: RolloutState, counts: Counts) -> RolloutLook | None:
        """Make and store the look (interim analysis) that is due; None if none is due or another worker was first."""
        looks = await self.repository.looks()
        made_at, last = (looks[-1].estimates.n, looks[-1].number) if looks else (0, 0)
        if look_number(counts.evaluated) <= look_number(made_at):
            return None
        sums = DecisionSums()
        async for page in self.repository.pages(state, counts.until):
            sums.add(page)
        # Fewer than were counted, if users have been erased since, or if another release has made some of them.
        if sums.users < 2 or look_number(sums.n) <= look_number(made_at):
            return None
        # Releases that looked at fewer decisions have used more numbers. No number, and so no level, is used twice.
        number = max(look_number(sums.n), last + 1)
        level = look_level(number)
        estimates = await asyncio.to_thread(sums.estimates, level, np.random.default_rng(number))
        guardrails, experiment = await self.guardrails(state)
        said = verdict(estimates, self.margin, guardrails.broken, experiment)
        made = RolloutLook(number, self.clock.now_ms(), level, stage_label(state), estimates, said)
        if not await self.repository.add_look(made, state):
            return None
        log.info("rollout_look", number=number, decisions=estimates.n, verdict=said.word, reason=said.reason)
        return made

    async def _broken_recently(self, state: RolloutState) -> list[str]:
        now = self.clock.monotonic()
        if (cached := self._cached_broken) is None or now - cached[0] > CACHED_S:
            cached = self._cached_broken = now, (await self.guardrails(state))[0].broken
        return cached[1]

    def _verdict(
        self, looks: Sequence[RolloutLook], guardrails: GuardrailsView, experiment: Experiment | None, counts: Counts
    ) -> Verdict:
        if looks:
            return verdict(looks[-1].estimates, self.margin, guardrails.broken, experiment)
        if guardrails.broken:
            return Verdict("roll back", " ".join(guardrails.broken))
        few, more = too_little(counts.evaluated), ""
        if few is None:
            due = "The first look is due: a worker makes it within a minute if there are at least two users."
            return Verdict("insufficient data", due)
        if counts.without_prior:
            more = f" {counts.without_prior:,} more were made before the first pooled prior, and never count."
        elif counts.waiting:
            more = (
                f" {counts.waiting:,} more are settled, and count once all decisions made before them are settled, too."
            )
        return Verdict(few.word, few.reason + more)


def _p99(elapsed_ms: Array) -> float | None:
    return float(np.quantile(elapsed_ms, 0.99)) if len(elapsed_ms) >= FEWEST_ANSWERS else None
