"""The request for a tip's text: a task, and the user's profile reduced to traits, such as "usually completes tips".

Invariants: the model and the template learn nothing else about the user, not even the id. Only features in `ALLOWED`
are read, and the only number in the traits is the preferred hour. So a model gets habits, not the values behind them.
"""

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Literal, NamedTuple, TypeVar

import msgspec

from app.features.registry import Scalar

# The features that are read, with the largest value of each.
ALLOWED = {
    "completion_rate_30d": 1,
    "dismiss_rate_30d": 1,
    "mean_dwell_ms_30d": math.inf,
    "preferred_hour": 24,
    "tip_volume_30d": math.inf,
}
# With fewer than `FEW_TIPS` tips, a rate does not show a habit. From `MANY_TIPS` on, a user has seen many tips.
FEW_TIPS, MANY_TIPS = 3, 100
USUALLY, SELDOM = 0.6, 0.35
OFTEN, HARDLY_EVER = 0.4, 0.1
BRIEFLY_MS, LONG_MS = 3_000, 15_000

Mood = Literal["unknown", "wary", "finisher", "mixed", "hesitant"]
_Word = TypeVar("_Word")


class Traits(NamedTuple):
    """A user's habits with tips. `hour` is the most active local hour, 0 to 23. A trait that is not known is None."""

    completes: Literal["usually", "sometimes", "seldom"] | None = None
    dismisses: Literal["often", "hardly ever"] | None = None
    reads: Literal["briefly", "at length"] | None = None
    hour: int | None = None
    tips: Literal["new", "many"] | None = None

    @property
    def mood(self) -> Mood:
        """The user's attitude to tips, which selects the encouragement."""
        if self.dismisses == "often":
            return "wary"
        moods: dict[str | None, Mood] = {"usually": "finisher", "sometimes": "mixed", "seldom": "hesitant"}
        return moods.get(self.completes, "unknown")


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
    found = (_number((features or {}).get(name), most) for name, most in ALLOWED.items())
    completion, dismissal, dwell, hour, volume = found
    if volume == 0 and (completion, dismissal) != (None, None):
        volume = None  # there was feedback, so the producer does not report served tips
    if volume is not None and volume < FEW_TIPS:
        completion = dismissal = None
    return Traits(
        completes=_band(completion, SELDOM, USUALLY, ("seldom", "sometimes", "usually")),
        dismisses=_band(dismissal, HARDLY_EVER, OFTEN, ("hardly ever", None, "often")),
        reads=_band(dwell, BRIEFLY_MS, LONG_MS, ("briefly", None, "at length")),
        hour=int(hour) if hour is not None and hour < 24 else None,
        tips=_band(volume, FEW_TIPS, MANY_TIPS, ("new", None, "many")),
    )


def described(traits: Traits) -> str:
    """The traits in English, such as `usually completes tips; most active around 9:00`; empty if none is known."""
    words = (
        traits.tips and ("new to tips" if traits.tips == "new" else "has seen many tips"),
        traits.completes and f"{traits.completes} completes tips",
        traits.dismisses and f"{traits.dismisses} dismisses tips",
        traits.reads and f"reads tips {traits.reads}",
        None if traits.hour is None else f"most active around {traits.hour}:00",
    )
    return "; ".join(filter(None, words))


def _number(value: Scalar, most: float) -> float | None:
    """The value if it is a number from 0 to `most`; None if it is not, or a boolean."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        return None
    return value


def _band(value: float | None, low: float, high: float, words: tuple[_Word, _Word | None, _Word]) -> _Word | None:
    """Choose from three words: for a value below `low`, from `low` to below `high`, and from `high` on."""
    if value is None:
        return None
    return words[0] if value < low else words[1] if value < high else words[2]
