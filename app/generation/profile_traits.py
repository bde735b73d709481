"""A profile as words: the only way in which anything about a user reaches a writer.

Invariant: what is not listed in `ALLOWED` is not looked at, and a number never leaves this module as it is, but for the
preferred hour; so a writer, which may be somebody else's machine, learns a habit and no record. Must not know a user's
id.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from app.features.registry import Scalar

COMPLETION, DISMISSAL, DWELL = "completion_rate_30d", "dismiss_rate_30d", "mean_dwell_ms_30d"
HOUR, VOLUME = "preferred_hour", "tip_volume_30d"
ALLOWED = (COMPLETION, DISMISSAL, DWELL, HOUR, VOLUME)
# If a user has seen fewer tips than this, a rate says nothing about a habit.
FEW_TIPS, MANY_TIPS = 3, 100
USUALLY, SELDOM = 0.6, 0.35
OFTEN, HARDLY_EVER = 0.4, 0.1
BRIEFLY_MS, LONG_MS = 3_000, 15_000

Mood = Literal["unknown", "wary", "finisher", "mixed", "hesitant"]


class Traits(NamedTuple):
    """What is known of a user's habits; None where nothing is."""

    completes: Literal["usually", "sometimes", "seldom"] | None = None
    dismisses: Literal["often", "hardly ever"] | None = None
    reads: Literal["briefly", "at length"] | None = None
    hour: int | None = None
    tips: Literal["new", "many"] | None = None

    @property
    def mood(self) -> Mood:
        """Which kind of encouragement fits. Who often sends tips away is spoken to softly, whatever else is known."""
        if self.dismisses == "often":
            return "wary"
        if self.completes == "usually":
            return "finisher"
        if self.completes is not None:
            return "hesitant" if self.completes == "seldom" else "mixed"
        return "unknown"


def traits_of(features: Mapping[str, Scalar] | None) -> Traits:
    """What the features say; any may be missing, null or out of its range, and then says nothing. None: no profile."""
    found = {name: _number(features.get(name)) for name in ALLOWED} if features else dict.fromkeys(ALLOWED)
    volume, hour, dwell = found[VOLUME], found[HOUR], found[DWELL]
    completion, dismissal = _rate(found[COMPLETION]), _rate(found[DISMISSAL])
    if volume == 0 and (completion, dismissal) != (None, None):
        volume = None  # there was feedback, so the producer does not report served tips
    if volume is not None and volume < FEW_TIPS:
        completion = dismissal = None
    return Traits(
        completes=_completes(completion),
        dismisses=_dismisses(dismissal),
        reads=None if dwell is None or dwell < 0 else _reads(dwell),
        hour=int(hour) if hour is not None and 0 <= hour < 24 else None,
        tips=None if volume is None or volume < 0 else _tips(volume),
    )


def described(traits: Traits) -> str:
    """The traits in English, as `usually completes tips; most active around 9:00`; empty where nothing is known."""
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
    """A number that may be compared; what is none, a truth value or not a number says nothing."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:  # noqa: PLR0124  # nan
        return None
    return value


def _rate(value: float | None) -> float | None:
    return value if value is not None and 0 <= value <= 1 else None


def _completes(rate: float | None) -> Literal["usually", "sometimes", "seldom"] | None:
    if rate is None:
        return None
    return "usually" if rate >= USUALLY else "seldom" if rate < SELDOM else "sometimes"


def _dismisses(rate: float | None) -> Literal["often", "hardly ever"] | None:
    if rate is None or HARDLY_EVER < rate < OFTEN:
        return None
    return "often" if rate >= OFTEN else "hardly ever"


def _reads(dwell_ms: float) -> Literal["briefly", "at length"] | None:
    return "briefly" if dwell_ms < BRIEFLY_MS else "at length" if dwell_ms >= LONG_MS else None


def _tips(volume: float) -> Literal["new", "many"] | None:
    return "new" if volume < FEW_TIPS else "many" if volume >= MANY_TIPS else None
