"""Events of the torture run, and the checker's own computation of the five features from them.

The values identify the events that were counted. Every dwell time occurs once in a run, so the mean identifies the set
of feedback events, and each of the other features differs for most sets. Some events leave the window within seconds.
Others are so close to its end that a step of a clock moves them out of it or into it. All are so old that no clock that
has been set back finds them in the future.
"""

from collections.abc import Iterable
from random import Random
from typing import Any, NamedTuple

from app.features.clock import DAY_MS
from tests.support.events import local_time

FEATURES = ("completion_rate_30d", "dismiss_rate_30d", "mean_dwell_ms_30d", "preferred_hour", "tip_volume_30d")
Value = float | int | None
Values = tuple[Value, Value, Value, Value, Value]
ACTIONS = (None, None, "completed", "completed", "dismissed", "snoozed")
OFFSETS_MIN = (-570, -180, 0, 120, 345)
WINDOW_MS = 30 * DAY_MS
MAX_STEP_MS = 3 * DAY_MS  # of a clock


class Event(NamedTuple):
    """One event. `action` is None if a tip was served."""

    event_id: str
    action: str | None
    dwell_ms: int | None
    at_ms: int
    offset_min: int

    @property
    def leaves_ms(self) -> int:
        """The first moment at which the event is not in the window any more."""
        return self.at_ms + WINDOW_MS

    @property
    def hour(self) -> int:
        return (self.at_ms + self.offset_min * 60_000) // 3_600_000 % 24

    def payload(self, user_id: str) -> dict[str, Any]:
        common = {
            "event_id": self.event_id,
            "user_id": user_id,
            "tip_id": "tip",
            "occurred_at": local_time(self.at_ms, self.offset_min).isoformat(),
            "decision_id": None,
        }
        if self.action is None:
            return {"subject": "signals.tip.served", **common}
        return {"subject": "signals.tip.feedback", **common, "action": self.action, "dwell_ms": self.dwell_ms}


def draw(random: Random, event_id: str, number: int, now_ms: int, stays_ms: int | None = None) -> Event:
    """Draw an event. `number` must be unique in the run; the dwell time is derived from it. The event leaves the window
    `stays_ms` after `now_ms`, by default after a random time."""
    action = random.choice(ACTIONS)
    if stays_ms is None:
        soon, after_a_step = random.randrange(-200, 2_000), random.randrange(MAX_STEP_MS)
        later = random.randrange(MAX_STEP_MS, WINDOW_MS - MAX_STEP_MS - DAY_MS)
        (stays_ms,) = random.choices([soon, after_a_step, later], weights=[1, 1, 3])
    at_ms = now_ms + stays_ms - WINDOW_MS
    dwell_ms = None if action is None or random.random() < 0.1 else number % 86_000_000
    return Event(event_id, action, dwell_ms, at_ms, random.choice(OFFSETS_MIN))


def values(events: Iterable[Event]) -> Values:
    """The five features of a user with these events in the window, in the order of `FEATURES`."""
    views = 0
    actions: list[str] = []
    dwells: list[int] = []
    hours: dict[int, tuple[int, int, int]] = {}
    for event in events:
        if event.action is None:
            views += 1
            continue
        actions.append(event.action)
        if event.dwell_ms is not None:
            dwells.append(event.dwell_ms)
        if event.action == "completed":
            count, last, rank = hours.get(event.hour, (0, 0, -event.hour))
            hours[event.hour] = (count + 1, max(last, event.at_ms), rank)
    return (
        actions.count("completed") / len(actions) if actions else None,
        actions.count("dismissed") / len(actions) if actions else None,
        sum(dwells) / len(dwells) if dwells else None,
        -max(hours.values())[2] if hours else None,
        views,
    )
