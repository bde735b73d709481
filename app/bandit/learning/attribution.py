"""Attribution: decides how an event changes the decision that it is about, and which reward is learned.

Invariant: a decision is learned once, from the vector that was logged with it, and every event counts once, however
often it is delivered.

The rules, in `app/bandit/README.md`, refer to the times of events, not of their arrival. Feedback without a served
event counts as serving, too.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from app.bandit.decisions import DecisionState, EventOutcome, RewardSource
from app.bandit.ports import LearningRepository
from app.errors import InvalidInput, SettingsError
from app.features.clock import CLOCK_SKEW_MS, Clock, to_ms
from app.features.events import Action, LoggedEvent, TipFeedback
from app.telemetry import Metrics, logger

NO_FEEDBACK = "none"
# An event from within the window may still be on its way when the window closes.
GRACE_MS = 60_000
# A producer's clock may be behind ours by this much. An event dated even longer before a decision is not about it.
SKEW_MS = 5 * 60_000
log = logger("bandit.learning")


class Rules(msgspec.Struct, frozen=True):
    """The reward by outcome (see `outcome_rewards`), and the time after serving within which feedback is learned."""

    rewards: Mapping[str, float]
    window_ms: int


def outcome_rewards(overrides: Iterable[tuple[str, float]] = ()) -> Mapping[str, float]:
    """The reward, within [0, 1], of each outcome: the name of an action, or `NO_FEEDBACK` for a served tip without
    feedback in time. Raises `SettingsError` if an override names an unknown outcome."""
    rewards = {**{action.value: action.reward for action in Action}, NO_FEEDBACK: 0.0}
    for outcome, reward in overrides:
        if outcome not in rewards:
            allowed = ", ".join(rewards)
            raise SettingsError("PROFILES_REWARDS", f"unknown outcome {outcome!r}; outcomes are {allowed}")
        rewards[outcome] = reward
    return rewards


class JudgedDecision(NamedTuple):
    """What `judge` needs to know of a stored decision. `told_served`: a served event about it has been counted."""

    chosen_id: str
    created_at_ms: int
    state: DecisionState
    served_at_ms: int | None
    reward_source: RewardSource | None
    told_served: bool


class Judgement(NamedTuple):
    """The effect of an event on a decision: the decision's new state and serving time, and the reward to learn.
    `reward` is None if nothing is learned from the event."""

    outcome: EventOutcome
    state: DecisionState
    served_at_ms: int | None
    reward: float | None = None
    action: Action | None = None


def happened_ms(event: LoggedEvent) -> int:
    """The event's time, or the time of its arrival if that is earlier, in epoch ms."""
    return min(to_ms(event.event.occurred_at), event.received_at_ms)


def latest_made(event: LoggedEvent) -> int:
    """The latest creation time, in epoch ms, of a decision that an event without a `decision_id` can be about. It may
    be up to `SKEW_MS` after the time of the event, because the producer's clock may be behind, and up to
    `CLOCK_SKEW_MS` after its arrival, because the clock of the process that made the decision may be ahead."""
    return min(event.received_at_ms + CLOCK_SKEW_MS, happened_ms(event) + SKEW_MS)


def judge(decision: JudgedDecision, logged: LoggedEvent, rules: Rules) -> Judgement:
    """Apply the rules of attribution to one event and the decision that it is about. Raises `InvalidInput` if the event
    was stored by a later release, and `rules` has no reward for its action."""
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


class DecisionLearner(msgspec.Struct, frozen=True, eq=False):
    """Updates decisions and statistics with consumed events. `learn` is an `app.events.ports.Learn`."""

    repository: LearningRepository
    clock: Clock
    metrics: Metrics

    async def learn(self, events: Sequence[LoggedEvent]) -> None:
        """Learn from the events that are about a decision, in one transaction. Count events with an unknown
        `decision_id` by sender, for the overview and `profiles doctor`."""
        concerned = await self.repository.concerned(events)
        concerned_seqs = {item.seq for item in concerned}
        unknown = [item for item in events if item.event.decision_id is not None and item.seq not in concerned_seqs]
        now_ms = self.clock.now_ms()
        if concerned:
            for outcome, count in (await self.repository.learn(concerned, now_ms)).items():
                self.metrics.decision_events.labels(outcome).inc(count)
        # Afterwards: if learning fails, all of these events come again, and those learned before do no harm.
        if unknown:
            for sent_by, count in (await self.repository.note_unknown(unknown, now_ms)).items():
                self.metrics.decision_events.labels("unknown decision").inc(count)
                log.warning("unknown_decision", sent_by=sent_by, events=count, event_id=unknown[0].event.event_id)
