"""Attribution: decides how an event changes the decision that it is about, and which reward is learned.

Invariant: a decision is learned once, from the vector that was logged with it, and every event counts once, however
often it is delivered.

`app.bandit.ports.LearningRepository` finds the decision of an event, and stores the changed decision and statistics in
one transaction. The rules, in `app/bandit/README.md`, refer to the times of events, not of their arrival. Feedback
without a served event counts as serving, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from app.bandit.decisions import DecisionState, EventOutcome, RewardSource
from app.bandit.ports import LearningRepository
from app.errors import InvalidInput, SettingsError
from app.features.clock import CLOCK_SKEW_MS, Clock, to_ms
from app.features.events import Action, LoggedEvent, TipFeedback
from app.telemetry import Metrics, logger

HOUR_MS = 3_600_000
NO_FEEDBACK = "none"
# An event from within the window may still be on its way when the window closes.
GRACE_MS = 60_000
# A producer's clock may be behind ours by this much. An event from longer before a decision is not about it.
SKEW_MS = 5 * 60_000
SETTLED_AT_ONCE = 200
REST_S = 0.05  # after each of these transactions, so that other processes can write
log = logger("bandit.learning")


class Rules(msgspec.Struct, frozen=True):
    """The settings of attribution. `rewards` is the reward by outcome (see `outcome_rewards`). `window_ms` is the
    reward window: the time after serving within which feedback is learned."""

    rewards: Mapping[str, float]
    window_ms: int


def outcome_rewards(overrides: Iterable[tuple[str, float]] = ()) -> Mapping[str, float]:
    """The reward, within [0, 1], of each outcome. `overrides` are pairs of outcome and reward.

    An outcome is the name of an action, or `NO_FEEDBACK` for a served tip without feedback in time.

    Raises:
        SettingsError: an override names an unknown outcome.
    """
    rewards = {**{action.value: action.reward for action in Action}, NO_FEEDBACK: 0.0}
    for outcome, reward in overrides:
        if outcome not in rewards:
            allowed = ", ".join(rewards)
            raise SettingsError("PROFILES_REWARDS", f"unknown outcome {outcome!r}; outcomes are {allowed}")
        rewards[outcome] = reward
    return rewards


class JudgedDecision(NamedTuple):
    """What `judge` needs to know of a stored decision, settled or not. `reward_source` is None until a reward is
    learned. `told_served` tells whether a served event about the decision has been counted."""

    chosen_id: str
    created_at_ms: int
    state: DecisionState
    served_at_ms: int | None
    reward_source: RewardSource | None
    told_served: bool


class Judgement(NamedTuple):
    """The effect of an event on a decision: the decision's new state and serving time. `outcome` classifies the event.
    `reward` is the reward to learn; None if nothing is learned from the event."""

    outcome: EventOutcome
    state: DecisionState
    served_at_ms: int | None
    reward: float | None = None
    action: Action | None = None


def happened_ms(event: LoggedEvent) -> int:
    """The event's time, or the time of its arrival if that is earlier, in epoch milliseconds."""
    return min(to_ms(event.event.occurred_at), event.received_at_ms)


def latest_made(event: LoggedEvent) -> int:
    """The latest creation time, in epoch ms, of a decision that an event without a `decision_id` can be about. It may
    be up to `SKEW_MS` after the time of the event, because the producer's clock may be behind, and up to
    `CLOCK_SKEW_MS` after its arrival, because the clock of the process that made the decision may be ahead."""
    return min(event.received_at_ms + CLOCK_SKEW_MS, happened_ms(event) + SKEW_MS)


def judge(decision: JudgedDecision, logged: LoggedEvent, rules: Rules) -> Judgement:
    """Apply the rules of attribution to one event and the decision that it is about.

    Raises:
        InvalidInput: the event was stored by a later release, and `rules` has no reward for its action.
    """
    event, state, served = logged.event, decision.state, decision.served_at_ms
    # A tip cannot be served before the decision was made; an earlier time comes from a producer's clock that is behind.
    at_ms = max(happened_ms(logged), decision.created_at_ms)
    if event.tip_id != decision.chosen_id:
        return Judgement("other tip", state, served)
    if state == "expired":
        return Judgement("late", state, served)
    if state == "learned":
        if isinstance(event, TipFeedback):
            return Judgement("repeated" if decision.reward_source == "feedback" else "late", state, served)
        return Judgement("repeated" if decision.told_served else "served", state, served)
    if state == "open" and at_ms > decision.created_at_ms + rules.window_ms:
        return Judgement("late", state, served)
    served_at = at_ms if served is None else served
    if not isinstance(event, TipFeedback):
        return Judgement("served" if state == "open" else "repeated", "served", served_at)
    if at_ms > served_at + rules.window_ms:
        return Judgement("late", state, served)
    reward = rules.rewards.get(event.action)
    if reward is None:
        raise InvalidInput(f"unknown action {event.action!r}; replay the event under a release that declares it")
    return Judgement("learned", "learned", served_at, reward, event.action)


class DecisionLearner:
    """Updates decisions and statistics with consumed events. `learn` is an `app.events.ports.Learn`."""

    def __init__(
        self,
        repository: LearningRepository,
        clock: Clock,
        metrics: Metrics,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._repository = repository
        self._clock = clock
        self._metrics = metrics
        self._pause = pause

    async def learn(self, events: Sequence[LoggedEvent]) -> None:
        """Learn from the events that are about a decision, in one transaction. Other events are ignored, but those with
        an unknown `decision_id` are counted by sender, for the overview and `profiles doctor`."""
        concerned = await self._repository.concerned(events)
        concerned_seqs = {item.seq for item in concerned}
        unknown = [item for item in events if item.event.decision_id is not None and item.seq not in concerned_seqs]
        now_ms = self._clock.now_ms()
        if concerned:
            for outcome, count in (await self._repository.learn(concerned, now_ms)).items():
                self._metrics.decision_events.labels(outcome).inc(count)
        # Afterwards: if learning fails, all of these events come again, and those learned before do no harm.
        if unknown:
            for sent_by, count in (await self._repository.note_unknown(unknown, now_ms)).items():
                self._metrics.decision_events.labels("unknown decision").inc(count)
                log.warning("unknown_decision", sent_by=sent_by, events=count, event_id=unknown[0].event.event_id)

    async def grow(self) -> int:
        """Extend the statistics of a page of users to the longest spec (see `LearningRepository.grow`)."""
        return await self._repository.grow(self._clock.now_ms())

    async def settle(self) -> int:
        """Settle the decisions whose reward window has closed without feedback, in small transactions: learn the
        default reward if the tip was served, and otherwise expire the decision. Return their number."""
        total = 0
        while True:
            counts = await self._repository.settle(self._clock.now_ms(), SETTLED_AT_ONCE)
            for outcome, count in counts.items():
                self._metrics.decisions_settled.labels(outcome).inc(count)
            total += counts["default"] + counts["expired"]
            if sum(counts.values()) < SETTLED_AT_ONCE:
                return total
            await self._pause(REST_S)
