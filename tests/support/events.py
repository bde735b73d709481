"""Builders of events. Every argument has a default, so that a test names only what matters to it."""

import itertools
from datetime import datetime, timedelta, timezone
from typing import Any

import msgspec

from app.events.ports import Admitted
from app.events.validation import digest
from app.features.clock import EPOCH, MILLISECOND, to_ms
from app.features.events import Action, TipEvent, TipFeedback, TipServed
from tests.support.clock import NOW_MS

_numbers = itertools.count(1)


def local_time(moment_ms: int, offset_min: int = 0) -> datetime:
    """A time with the offset of a producer."""
    return (EPOCH + moment_ms * MILLISECOND).astimezone(timezone(timedelta(minutes=offset_min)))


def served(
    user_id: str = "ann",
    at_ms: int = NOW_MS,
    *,
    offset_min: int = 0,
    event_id: str | None = None,
    tip_id: str = "tip",
    decision_id: str | None = None,
) -> TipServed:
    return TipServed(
        event_id=event_id or f"event-{next(_numbers)}",
        user_id=user_id,
        tip_id=tip_id,
        occurred_at=local_time(at_ms, offset_min),
        decision_id=decision_id,
    )


def feedback(
    user_id: str = "ann",
    at_ms: int = NOW_MS,
    action: str = "completed",
    *,
    dwell_ms: int | None = None,
    offset_min: int = 0,
    event_id: str | None = None,
    tip_id: str = "tip",
    decision_id: str | None = None,
) -> TipFeedback:
    return TipFeedback(
        event_id=event_id or f"event-{next(_numbers)}",
        user_id=user_id,
        tip_id=tip_id,
        occurred_at=local_time(at_ms, offset_min),
        action=msgspec.convert(action, Action),
        dwell_ms=dwell_ms,
        decision_id=decision_id,
    )


def admitted(event: TipEvent, received_at_ms: int = NOW_MS) -> Admitted:
    """An admitted event. Its time is not checked."""
    offset = event.occurred_at.utcoffset() or timedelta(0)
    return Admitted(
        event=event,
        digest=digest(event),
        occurred_at_ms=to_ms(event.occurred_at),
        utc_offset_min=offset // timedelta(minutes=1),
        claimed_at_ms=None,
        received_at_ms=received_at_ms,
        sent_by="a producer",
    )


def payload(event: TipEvent, **changes: object) -> dict[str, Any]:
    """An event as JSON fields. `changes` replaces fields; a field set to `...` is left out."""
    fields: dict[str, Any] = {**msgspec.to_builtins(event), **changes}
    return {name: value for name, value in fields.items() if value is not ...}


def body(*events: TipEvent) -> bytes:
    """Events as the JSON array of a request body."""
    return msgspec.json.encode(events)
