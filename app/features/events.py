"""The two kinds of tip events as producers send them, and the actions of feedback. The *subject* of an event is the
name of its kind, such as `signals.tip.served`."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, NamedTuple, Self, cast

import msgspec
from msgspec import Meta

from app.features.ids import Id

SERVED = "signals.tip.served"
FEEDBACK = "signals.tip.feedback"
KNOWN_SUBJECTS = frozenset({SERVED, FEEDBACK})
# The relations that a feature's SQL may read, and the subject whose events are their rows.
RELATIONS = {"views": SERVED, "feedback": FEEDBACK}
MAX_DWELL_MS = 86_400_000


# A new action is one line here and needs no migration. Its name must be an identifier other than `none`, `served`,
# `start`, `end` and `hour`, which appear beside the names of actions in settings and answers. Keep the line while
# events or decisions with the action are stored.
class Action(StrEnum):
    """What a user did with a tip. `reward`, from 0 to 1, is the action's default in the setting PROFILES_REWARDS."""

    COMPLETED = "completed", 1.0
    DISMISSED = "dismissed", 0.0
    SNOOZED = "snoozed", 0.3

    reward: float

    def __new__(cls, name: str, reward: float) -> Self:
        action = str.__new__(cls, name)
        action._value_ = name
        action.reward = reward
        return action


_ACTIONS: dict[str, Action] = {action.value: action for action in Action}


def stored_action(name: str) -> Action:
    """The action of this name from a stored row. If only a later release declares the action, the name as a string."""
    return _ACTIONS.get(name) or cast(Action, name)


OccurredAt = Annotated[
    datetime,
    Meta(
        tz=True,
        description="RFC 3339 with the user's UTC offset, which gives the local hour.",
        examples=["2026-04-25T08:30:00+02:00"],
    ),
]


class TipServed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="subject", tag=SERVED):
    """An event that producers send when a tip was shown to a user."""

    event_id: Id
    user_id: Id
    tip_id: Id
    occurred_at: OccurredAt
    decision_id: Id | None = None


class TipFeedback(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="subject", tag=FEEDBACK
):
    """An event that producers send when a user reacted to a tip."""

    event_id: Id
    user_id: Id
    tip_id: Id
    occurred_at: OccurredAt
    action: Action
    dwell_ms: Annotated[int, Meta(ge=0, le=MAX_DWELL_MS, description="How long the tip was on screen.")] | None = None
    decision_id: Id | None = None


TipEvent = TipServed | TipFeedback


class LoggedEvent(NamedTuple):
    """A stored event, with its sequence number `seq` in the event log. `attempts` counts how often consuming the event
    failed when it was consumed by itself and not in a batch. `traceparent`: see `app.events.ports.Admitted`."""

    seq: int
    event: TipEvent
    received_at_ms: int
    attempts: int
    traceparent: str | None = None


def subject_of(event: TipEvent) -> str:
    return SERVED if isinstance(event, TipServed) else FEEDBACK
