"""Generates the demonstration set: events of users with different habits.

On one UTC day, equal arguments give equal events with equal ids, so loading the set again that day adds nothing.
"""

import itertools
from collections.abc import Iterator
from datetime import timedelta, timezone
from random import Random
from typing import NamedTuple

from app.features.clock import DAY_MS, EPOCH, MILLISECOND
from app.features.events import Action, TipEvent, TipFeedback, TipServed

PREFIX = "user-"
OTHER_ACTION_SHARE = 0.02  # for each action that `Habit` has no share for


class Habit(NamedTuple):
    """A kind of user in the demonstration set.

    `share`: share of the users. `hour`: local hour around which they get tips. `completes`, `dismisses`, `snoozes`:
    shares of their tips that get this feedback. `dwell_ms`: mean time that they look at a tip.
    """

    name: str
    share: float
    tips_per_day: float
    hour: int
    completes: float
    dismisses: float
    snoozes: float
    dwell_ms: int

    def action(self, random: Random) -> Action | None:
        """Draw the action that a tip gets; None for no feedback."""
        named = {Action.COMPLETED: self.completes, Action.DISMISSED: self.dismisses, Action.SNOOZED: self.snoozes}
        shares = {**named, **{action: OTHER_ACTION_SHARE for action in Action if action not in named}}
        return random.choices([*shares, None], [*shares.values(), 1 - sum(shares.values())])[0]


HABITS = (
    Habit("finisher", 0.25, 0.9, 9, 0.75, 0.10, 0.05, 6_000),
    Habit("night-owl", 0.20, 0.7, 22, 0.50, 0.20, 0.20, 12_000),
    Habit("dismisser", 0.20, 0.8, 13, 0.08, 0.80, 0.05, 1_200),
    Habit("snoozer", 0.15, 0.6, 18, 0.25, 0.15, 0.50, 4_000),
    Habit("onlooker", 0.15, 0.5, 12, 0.05, 0.05, 0.02, 20_000),
    Habit("stranger", 0.05, 0.02, 15, 0.30, 0.30, 0.10, 3_000),
)
OFFSETS_MIN = (-480, -300, 0, 60, 120, 330, 345, 540)


def generate(*, users: int, days: int, seed: int, now_ms: int) -> Iterator[TipEvent]:
    """Yield events, user by user. User ids are `user-0001` and so on; all times are before `now_ms`."""
    today_ms = now_ms - now_ms % DAY_MS
    for number in range(1, users + 1):
        random = Random(f"{seed}/{number}")  # noqa: S311  # seeded, so that the set can be repeated
        habit = random.choices(HABITS, [item.share for item in HABITS])[0]
        offset_min = random.choice(OFFSETS_MIN)
        event_ids = (f"demo-{today_ms // DAY_MS}-{seed}-{days}-{number:04d}-{count}" for count in itertools.count(1))
        # One day earlier, so that no UTC offset moves the time past the start of today.
        for day_ms in range(today_ms - (days + 1) * DAY_MS, today_ms - DAY_MS, DAY_MS):
            for _ in range(int(habit.tips_per_day + random.random())):
                hour = habit.hour + random.gauss(0, 2) - offset_min / 60
                served_ms = day_ms + int((hour % 24) * 3_600_000) + random.randrange(60_000)
                yield from _tip(f"{PREFIX}{number:04d}", next(event_ids), served_ms, offset_min, habit, random)


def _tip(
    user_id: str, event_id: str, served_ms: int, offset_min: int, habit: Habit, random: Random
) -> Iterator[TipEvent]:
    """The events of one tip: that the user got it, and the user's feedback, if any."""
    zone, tip_id = timezone(timedelta(minutes=offset_min)), f"tip-{random.randrange(200):03d}"
    served_at = (EPOCH + served_ms * MILLISECOND).astimezone(zone)
    yield TipServed(event_id=f"{event_id}s", user_id=user_id, tip_id=tip_id, occurred_at=served_at)
    if (action := habit.action(random)) is not None:
        dwell_ms = int(random.expovariate(1 / habit.dwell_ms)) if random.random() < 0.9 else None
        yield TipFeedback(
            event_id=f"{event_id}f",
            user_id=user_id,
            tip_id=tip_id,
            occurred_at=served_at + (1_000 + min(dwell_ms or 5_000, 3_600_000)) * MILLISECOND,
            action=action,
            dwell_ms=dwell_ms,
        )
