"""Generates the demonstration set: events of users with different habits.

On one UTC day, equal arguments give equal events with equal ids, so loading the set again that day adds nothing.
"""

from __future__ import annotations

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
        prefix = f"demo-{today_ms // DAY_MS}-{seed}-{days}-{number:04d}"
        yield from _events(prefix, number, habit, offset_min, days, today_ms, random)


def _events(
    prefix: str, number: int, habit: Habit, offset_min: int, days: int, today_ms: int, random: Random
) -> Iterator[TipEvent]:
    zone = timezone(timedelta(minutes=offset_min))
    count = 0
    for day in range(days, 0, -1):
        tips = int(habit.tips_per_day + random.random())
        for _ in range(tips):
            count += 1
            hour = habit.hour + random.gauss(0, 2) - offset_min / 60
            # One day earlier, so that no UTC offset moves the time past the start of today.
            served_ms = today_ms - (day + 1) * DAY_MS + int((hour % 24) * 3_600_000) + random.randrange(60_000)
            user_id, tip_id = f"{PREFIX}{number:04d}", f"tip-{random.randrange(200):03d}"
            yield TipServed(
                event_id=f"{prefix}-{count}s",
                user_id=user_id,
                tip_id=tip_id,
                occurred_at=(EPOCH + served_ms * MILLISECOND).astimezone(zone),
            )
            action = habit.action(random)
            if action is None:
                continue
            dwell_ms = int(random.expovariate(1 / habit.dwell_ms)) if random.random() < 0.9 else None
            answered_ms = served_ms + 1_000 + min(dwell_ms or 5_000, 3_600_000)
            yield TipFeedback(
                event_id=f"{prefix}-{count}f",
                user_id=user_id,
                tip_id=tip_id,
                occurred_at=(EPOCH + answered_ms * MILLISECOND).astimezone(zone),
                action=action,
                dwell_ms=dwell_ms,
            )
