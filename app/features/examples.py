"""Examples of a definition: the events of one user, and the value that the SQL must give for them.

`profiles features test` stores the events in an empty database and computes the value as the service does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta, timezone

import msgspec

from app.features.clock import EPOCH, MILLISECOND
from app.features.events import FEEDBACK, SERVED, TipEvent

HOUR_MS = 3_600_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleEvent:
    """An event that happened `ago` before the computation. `action` is None for a tip that was served."""

    action: str | None
    ago: timedelta
    local_hour: int | None
    tip_id: str
    dwell_ms: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """`value` is the expected value of the feature; None means null, or the default if there is one."""

    events: Sequence[ExampleEvent]
    value: float | int | str | None


def served(
    *, ago: timedelta = timedelta(hours=1), local_hour: int | None = None, tip_id: str = "tip-1"
) -> ExampleEvent:
    """A tip was served. `local_hour` is the user's hour of the day, 0 to 23; by default that of UTC."""
    return ExampleEvent(action=None, ago=ago, local_hour=local_hour, tip_id=tip_id, dwell_ms=None)


def feedback(
    action: str,
    *,
    ago: timedelta = timedelta(hours=1),
    local_hour: int | None = None,
    tip_id: str = "tip-1",
    dwell_ms: int | None = None,
) -> ExampleEvent:
    """The user reacted to a tip. Arguments as for `served`."""
    return ExampleEvent(action=action, ago=ago, local_hour=local_hour, tip_id=tip_id, dwell_ms=dwell_ms)


def events_of(example: Example, now_ms: int, user_id: str) -> list[TipEvent]:
    """The events as a producer would have sent them.

    Raises:
        msgspec.ValidationError: an event is invalid, for instance because of an unknown action.
    """
    return [_event(f"{user_id}-{number}", user_id, item, now_ms) for number, item in enumerate(example.events)]


def _event(event_id: str, user_id: str, item: ExampleEvent, now_ms: int) -> TipEvent:
    occurred_ms = now_ms - item.ago // MILLISECOND
    utc_hour = occurred_ms // HOUR_MS % 24
    # The UTC offset, from -12 to +11 hours, at which it is `local_hour`.
    offset = 0 if item.local_hour is None else (item.local_hour - utc_hour + 12) % 24 - 12
    payload: dict[str, object] = {
        "subject": SERVED if item.action is None else FEEDBACK,
        "event_id": event_id,
        "user_id": user_id,
        "tip_id": item.tip_id,
        "occurred_at": (EPOCH + occurred_ms * MILLISECOND).astimezone(timezone(timedelta(hours=offset))),
    }
    if item.action is not None:
        payload |= {"action": item.action, "dwell_ms": item.dwell_ms}
    event: TipEvent = msgspec.convert(payload, TipEvent)
    return event
