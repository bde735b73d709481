"""Examples in a feature's declaration, which `profiles features test` checks on an empty database."""

from collections.abc import Mapping, Sequence
from datetime import timedelta, timezone

import msgspec

from app.features.clock import EPOCH, MILLISECOND
from app.features.events import FEEDBACK, SERVED, TipEvent

HOUR = timedelta(hours=1)


class ExampleEvent(msgspec.Struct, frozen=True):
    """An event of an example, `ago` before the computation. `fields` are those that a producer would send."""

    ago: timedelta
    local_hour: int | None
    fields: Mapping[str, object]


class Example(msgspec.Struct, frozen=True, kw_only=True):
    """An example of a feature: events of one user, and the value that the feature must have for them. The value None
    means the feature's default, which is null if none is declared."""

    events: Sequence[ExampleEvent]
    value: float | int | str | None


def served(*, ago: timedelta = HOUR, local_hour: int | None = None, tip_id: str = "tip-1") -> ExampleEvent:
    """A tip was served to the user, `ago` before the computation. `local_hour` is the user's hour of the day, 0 to 23;
    by default it is the hour in UTC."""
    return ExampleEvent(ago, local_hour, {"subject": SERVED, "tip_id": tip_id})


def feedback(
    action: str,
    *,
    ago: timedelta = HOUR,
    local_hour: int | None = None,
    tip_id: str = "tip-1",
    dwell_ms: int | None = None,
) -> ExampleEvent:
    """The user reacted to a tip, on screen for `dwell_ms` milliseconds. `ago` and `local_hour`: as in `served`."""
    fields = {"subject": FEEDBACK, "tip_id": tip_id, "action": action, "dwell_ms": dwell_ms}
    return ExampleEvent(ago, local_hour, fields)


def events_of(example: Example, now_ms: int, user_id: str) -> list[TipEvent]:
    """The events of an example as a producer would have sent them for `user_id` before `now_ms`. Raises
    `msgspec.ValidationError` if an event is invalid, for instance because of an unknown action."""
    events: list[TipEvent] = []
    for number, item in enumerate(example.events):
        utc = EPOCH + (now_ms - item.ago // MILLISECOND) * MILLISECOND
        # The UTC offset, from -12 to +11 hours, at which it is `local_hour`.
        offset = 0 if item.local_hour is None else (item.local_hour - utc.hour + 12) % 24 - 12
        occurred_at = utc.astimezone(timezone(offset * HOUR))
        sent = {**item.fields, "event_id": f"{user_id}-{number}", "user_id": user_id, "occurred_at": occurred_at}
        events.append(msgspec.convert(sent, TipEvent))
    return events
