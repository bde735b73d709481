"""Examples in a feature's declaration: the events of one user, and the value that the SQL must give for them.

`profiles features test` stores the events in an empty database and computes the value as the service does.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta, timezone

import msgspec

from app.features.clock import EPOCH, MILLISECOND
from app.features.events import FEEDBACK, SERVED, TipEvent

HOUR_MS = 3_600_000


class ExampleEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event of an example, `ago` before the computation. `action` is None if the event is a served tip."""

    action: str | None
    ago: timedelta
    local_hour: int | None
    tip_id: str
    dwell_ms: int | None


class Example(msgspec.Struct, frozen=True, kw_only=True):
    """An example of a feature: events of one user, and the value that the feature must have for them. The value None
    means the feature's default, which is null if none is declared."""

    events: Sequence[ExampleEvent]
    value: float | int | str | None


def served(
    *, ago: timedelta = timedelta(hours=1), local_hour: int | None = None, tip_id: str = "tip-1"
) -> ExampleEvent:
    """Make an example event: a tip was served to the user, `ago` before the computation. `local_hour` is the user's
    hour of the day, 0 to 23; by default it is the hour in UTC."""
    return ExampleEvent(action=None, ago=ago, local_hour=local_hour, tip_id=tip_id, dwell_ms=None)


def feedback(
    action: str,
    *,
    ago: timedelta = timedelta(hours=1),
    local_hour: int | None = None,
    tip_id: str = "tip-1",
    dwell_ms: int | None = None,
) -> ExampleEvent:
    """Make an example event: the user reacted to a tip, `ago` before the computation.

    `dwell_ms` is how long the tip was on screen, in milliseconds. `local_hour` is the user's hour of the day, 0 to 23;
    by default it is the hour in UTC.
    """
    return ExampleEvent(action=action, ago=ago, local_hour=local_hour, tip_id=tip_id, dwell_ms=dwell_ms)


def events_of(example: Example, now_ms: int, user_id: str) -> list[TipEvent]:
    """The events of an example as a producer would have sent them for `user_id` before `now_ms`.

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
