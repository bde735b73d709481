"""Learning: which event settles which decision, and what is learned from it.

Invariant: a decision learns once, from the vector that was logged with it; every event counts once, however often it
is delivered. `app.bandit.ports.LearningRepository` finds decisions and keeps both in one transaction; this module
judges what an event means for a decision. Rules, in event time:
  - the window of a decision opens when its tip was served, and a feedback without that counts as served just then;
  - the first feedback within the window wins; one that is late, or on another tip than the chosen, is only counted;
  - word of the serving that comes after the feedback counts as served, once, and changes nothing;
  - a tip must be served within one window of the decision, or the decision expires unlearned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from app.bandit.decisions import EventOutcome, RewardSource, State
from app.bandit.learning.rewards import outcome_rewards
from app.bandit.ports import LearningRepository, Told
from app.errors import InvalidInput
from app.features.clock import Clock, to_ms
from app.features.events import Action, TipFeedback
from app.telemetry import Metrics, logger

HOUR_MS = 3_600_000
# What happened within the window may be under way when it closes.
GRACE_MS = 60_000
# A producer's clock may be behind ours; an event of long before a decision is none of its.
SKEW_MS = 5 * 60_000
SETTLED_AT_ONCE = 200
log = logger("bandit.learning")


@dataclass(frozen=True, slots=True)
class Rules:
    """What is learned: the reward of each outcome (see `app.bandit.learning.rewards`), and how long feedback counts."""

    rewards: Mapping[str, float]
    window_ms: int

    @classmethod
    def of(cls, overrides: Iterable[tuple[str, float]], window_hours: int) -> Rules:
        """From settings; raises `SettingsError` if an override names no outcome."""
        return cls(outcome_rewards(overrides), window_hours * HOUR_MS)


class Unsettled(NamedTuple):
    """As much of a decision as an event is judged by. `told_served`: an event has said that it was served."""

    chosen_id: str
    created_at_ms: int
    state: State
    served_at_ms: int | None
    source: RewardSource | None
    told_served: bool


class Judgement(NamedTuple):
    """What an event means for a decision: its state and the time it was served from now on, and whether to learn."""

    outcome: EventOutcome
    state: State
    served_at_ms: int | None
    reward: float | None = None
    action: Action | None = None


def happened_ms(event: Told) -> int:
    """The event's time; one from the near future counts from its arrival."""
    return min(to_ms(event.event.occurred_at), event.received_at_ms)


def latest_made(event: Told) -> int:
    """A decision made after this moment is none that the event is about, unless it names it."""
    return min(event.received_at_ms, happened_ms(event) + SKEW_MS)


def judge(decision: Unsettled, logged: Told, rules: Rules) -> Judgement:
    """What an event means for the decision that it was joined to."""
    event, state, served = logged.event, decision.state, decision.served_at_ms
    # A producer's clock may be behind ours: nothing is served before it was decided.
    at_ms = max(happened_ms(logged), decision.created_at_ms)
    if event.tip_id != decision.chosen_id:
        return Judgement("other tip", state, served)
    if state == "expired":
        return Judgement("late", state, served)
    if state == "learned":
        if isinstance(event, TipFeedback):
            return Judgement("repeated" if decision.source == "feedback" else "late", state, served)
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
    """Implements `app.events.ports.Learner`."""

    def __init__(self, book: LearningRepository, clock: Clock, metrics: Metrics) -> None:
        self._book = book
        self._clock = clock
        self._metrics = metrics

    async def learn(self, events: Sequence[Told]) -> None:
        """Learn from those that concern a decision, in one transaction; where none does, nothing is written."""
        concerned = await self._book.concerned(events)
        named = {item.seq for item in concerned}
        if unknown := [item for item in events if item.event.decision_id is not None and item.seq not in named]:
            await self._note(unknown)
        if not concerned:
            return
        for outcome, count in (await self._book.learn(concerned, self._clock.now_ms())).items():
            self._metrics.bandit.events.labels(outcome).inc(count)

    async def _note(self, unknown: Sequence[Told]) -> None:
        for sent_by, count in (await self._book.note_unknown(unknown, self._clock.now_ms())).items():
            self._metrics.bandit.events.labels("unknown decision").inc(count)
            log.warning("unknown_decision", sent_by=sent_by, events=count, event_id=unknown[0].event.event_id)

    async def settle(self) -> int:
        """Settle every decision whose window has closed, in small steps; how many that were."""
        total = 0
        while True:
            swept = await self._book.settle(self._clock.now_ms(), SETTLED_AT_ONCE)
            self._metrics.bandit.settled.labels("default").inc(swept.learned)
            self._metrics.bandit.settled.labels("expired").inc(swept.expired)
            self._metrics.bandit.settled.labels("set aside").inc(swept.aside)
            total += swept.learned + swept.expired
            if sum(swept) < SETTLED_AT_ONCE:
                return total
