"""The two tip events, as producers send them: the complete list of subjects.

Everything else about an event (its arrival, its sequence number) belongs to `app.events`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from app.features.ids import Id

SERVED = "signals.tip.served"
FEEDBACK = "signals.tip.feedback"
KNOWN_SUBJECTS = frozenset({SERVED, FEEDBACK})
# What a feature's SQL may read, and the subject whose events become rows of it.
RELATIONS = {"views": SERVED, "feedback": FEEDBACK}
MAX_DWELL_MS = 86_400_000

OccurredAt = Annotated[
    datetime,
    Meta(
        tz=True,
        description="RFC 3339 with the user's UTC offset, which gives the local hour.",
        examples=["2026-04-25T08:30:00+02:00"],
    ),
]


class TipServed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="subject", tag=SERVED):
    """A tip was put before a user."""

    event_id: Id
    user_id: Id
    tip_id: Id
    occurred_at: OccurredAt
    decision_id: Id | None = None


class TipFeedback(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="subject", tag=FEEDBACK
):
    """A user reacted to a tip."""

    event_id: Id
    user_id: Id
    tip_id: Id
    occurred_at: OccurredAt
    action: Literal["completed", "dismissed", "snoozed"]
    dwell_ms: Annotated[int, Meta(ge=0, le=MAX_DWELL_MS, description="How long the tip was on screen.")] | None = None
    decision_id: Id | None = None


TipEvent = TipServed | TipFeedback


def subject_of(event: TipEvent) -> str:
    """The subject an event was sent under."""
    return SERVED if isinstance(event, TipServed) else FEEDBACK
