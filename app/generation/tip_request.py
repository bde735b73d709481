"""The request for a tip's text: a task, and the user's profile reduced to traits, such as "usually completes tips".

Invariants: a writer learns nothing else about the user, and no user's id. Only features in `ALLOWED` are read, and no
number but the preferred hour leaves this module. So a remote language model is told habits, never the recorded values
behind them.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Literal, NamedTuple, TypeVar

import msgspec

from app.features.registry import Scalar

COMPLETION, DISMISSAL, DWELL = "completion_rate_30d", "dismiss_rate_30d", "mean_dwell_ms_30d"
HOUR, VOLUME = "preferred_hour", "tip_volume_30d"
ALLOWED = (COMPLETION, DISMISSAL, DWELL, HOUR, VOLUME)
# With fewer than `FEW_TIPS` tips, a rate does not show a habit. From `MANY_TIPS` on, a user has seen many tips.
FEW_TIPS, MANY_TIPS = 3, 100
USUALLY, SELDOM = 0.6, 0.35
OFTEN, HARDLY_EVER = 0.4, 0.1
BRIEFLY_MS, LONG_MS = 3_000, 15_000

Mood = Literal["unknown", "wary", "finisher", "mixed", "hesitant"]
Completes = Literal["usually", "sometimes", "seldom"]
Dismisses = Literal["often", "hardly ever"]
_Word = TypeVar("_Word")


class Traits(NamedTuple):
    """A user's habits with tips. `hour` is the most active local hour, 0 to 23. A trait that is not known is None."""

    completes: Completes | None = None
    dismisses: Dismisses | None = None
    reads: Literal["briefly", "at length"] | None = None
    hour: int | None = None
    tips: Literal["new", "many"] | None = None

    @property
    def mood(self) -> Mood:
        """The user's attitude to tips, which selects the encouragement; "wary" for users who often dismiss tips."""
        if self.dismisses == "often":
            return "wary"
        if self.completes == "usually":
            return "finisher"
        if self.completes is not None:
            return "hesitant" if self.completes == "seldom" else "mixed"
        return "unknown"


class TipRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request to word a tip about a task. `title` and `notes` are untrusted text. `due_at` and the current time `now`
    have a UTC offset. A higher `priority` means a more important task. `locale` is a BCP 47 tag."""

    title: str
    notes: str | None
    due_at: datetime | None
    priority: float | None
    traits: Traits
    locale: str
    now: datetime


def traits_of(features: Mapping[str, Scalar] | None) -> Traits:
    """Derive the traits from profile features by name. A feature that is missing, null or out of range is ignored."""
    found = {name: _number(features.get(name)) for name in ALLOWED} if features else dict.fromkeys(ALLOWED)
    volume, hour, dwell = found[VOLUME], found[HOUR], found[DWELL]
    completion, dismissal = _rate(found[COMPLETION]), _rate(found[DISMISSAL])
    if volume == 0 and (completion, dismissal) != (None, None):
        volume = None  # there was feedback, so the producer does not report served tips
    if volume is not None and volume < FEW_TIPS:
        completion = dismissal = None
    return Traits(
        completes=_band(completion, SELDOM, USUALLY, ("seldom", "sometimes", "usually")),
        dismisses=_band(dismissal, HARDLY_EVER, OFTEN, ("hardly ever", None, "often")),
        reads=_band(dwell, BRIEFLY_MS, LONG_MS, ("briefly", None, "at length")),
        hour=int(hour) if hour is not None and 0 <= hour < 24 else None,
        tips=_band(volume, FEW_TIPS, MANY_TIPS, ("new", None, "many")),
    )


def described(traits: Traits) -> str:
    """The traits in English, such as `usually completes tips; most active around 9:00`; empty if none is known."""
    words = []
    if traits.tips is not None:
        words.append("new to tips" if traits.tips == "new" else "has seen many tips")
    if traits.completes is not None:
        words.append(f"{traits.completes} completes tips")
    if traits.dismisses is not None:
        words.append(f"{traits.dismisses} dismisses tips")
    if traits.reads is not None:
        words.append(f"reads tips {traits.reads}")
    if traits.hour is not None:
        words.append(f"most active around {traits.hour}:00")
    return "; ".join(words)


def _number(value: Scalar) -> float | None:
    """The value if it is a number; None if it is a boolean, NaN or of another type."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:  # noqa: PLR0124  # nan
        return None
    return value


def _rate(value: float | None) -> float | None:
    return value if value is not None and 0 <= value <= 1 else None


def _band(value: float | None, low: float, high: float, words: tuple[_Word, _Word | None, _Word]) -> _Word | None:
    """Choose from three words: for a value below `low`, from `low` to below `high`, and from `high` on. Return None if
    the value is unknown or negative."""
    if value is None or value < 0:
        return None
    return words[0] if value < low else words[1] if value < high else words[2]
