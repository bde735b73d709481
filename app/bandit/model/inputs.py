"""Computes the factors of the model's inputs: bounded transforms of the request and the profile.

An input is the product of a candidate factor, which may differ between the candidates of a request, and a shared
factor, which is the same for all of them (time of day, profile, context). `app.bandit.model.definitions` declares the
features of candidates and context, and their transforms. Those of the time and of the profile are here, and follow the
same rules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

from app.bandit.model.definitions import CANDIDATE_FEATURES, CONTEXT_FEATURES, ONE, columns, formulas, log_ratio, struct
from app.bandit.numpy_on_demand import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Array: TypeAlias = "NDArray[np.float64]"
Places: TypeAlias = "NDArray[np.intp]"
Profile: TypeAlias = Mapping[str, float | int | str | None] | None

STORED: Final = "<f8"
NUMBER_BYTES: Final = 8

DAY_MS: Final = 86_400_000
MANY_TIPS: Final = 1000  # `tip_volume_30d` at which the volume factor reaches its maximum
USUAL_VOLUME: Final = 10  # used for `tip_volume_30d` if a profile has a rate but no volume

EVALUATED: Final = "evaluated"

# The formulas of the factors, by name, in the order of the columns.
CANDIDATE_FACTORS: Final[Mapping[str, str]] = {ONE: "1", **dict(formulas(CANDIDATE_FEATURES))}
SHARED_FACTORS: Final[Mapping[str, str]] = {
    ONE: "1",
    "hour_cos": "cos(2 pi h / 24), h the local hour with its fraction; 0 without a time",
    "hour_sin": "sin(2 pi h / 24); 0 without a time",
    "profile_present": "1 where a known profile feature has a value, else 0",
    "completion": "(n r + 1) / (n + 3) - 1/3, r = completion_rate_30d in [0, 1], n = tip_volume_30d, "
    f"{USUAL_VOLUME} where that is absent or 0; 0 without r",
    "dismissal": "(n r + 1) / (n + 3) - 1/3, r = dismiss_rate_30d in [0, 1], n = tip_volume_30d, "
    f"{USUAL_VOLUME} where that is absent or 0; 0 without r",
    "dwell": f"min(1, log1p(max(0, mean_dwell_ms_30d)) / log1p({DAY_MS})) - 1/2; 0 without",
    "volume": f"min(1, log1p(max(0, tip_volume_30d)) / log1p({MANY_TIPS})) - 1/2; 0 without",
    "hour_distance_cos": "cos(2 pi (h - preferred_hour) / 24); 0 without either",
    "hour_distance_sin": "sin(2 pi (h - preferred_hour) / 24); 0 without either",
    EVALUATED: "a feature that is being evaluated, from -1 to 1; 0 without a value",
    **dict(formulas(CONTEXT_FEATURES)),
}
PROFILE_FEATURES: Final = (
    "completion_rate_30d",
    "dismiss_rate_30d",
    "mean_dwell_ms_30d",
    "preferred_hour",
    "tip_volume_30d",
)


if TYPE_CHECKING:  # the fields are known at runtime only

    class Features(msgspec.Struct, frozen=True):
        def __init__(self, **values: bool | float | str | None) -> None: ...

    class ContextFeatures(msgspec.Struct, frozen=True): ...
else:
    Features, ContextFeatures = struct(CANDIDATE_FEATURES), struct(CONTEXT_FEATURES)


class Candidate(msgspec.Struct, frozen=True):
    """A tip that may be shown, with its features. Numbers are finite."""

    id: str
    features: Features


class Context(ContextFeatures, frozen=True):
    """The circumstances of a decision. `at`: when the tip is shown, with the user's UTC offset; None if not known."""

    at: datetime | None = None


def packed(array: Array) -> bytes:
    """The array's elements as little-endian float64, the form in which arrays are stored."""
    return array.astype(STORED, copy=False).tobytes()


def candidate_factors(candidates: Sequence[Candidate]) -> Array:
    """The candidate factors: one row per candidate, columns in the order of `CANDIDATE_FACTORS`."""
    given = [item.features for item in candidates]
    return np.array([[1.0] * len(given), *columns(CANDIDATE_FEATURES, given)]).T


def shared_factors(context: Context, profile: Profile, evaluated: float = 0.0) -> Array:
    """The shared factors, in the order of `SHARED_FACTORS`. Without a profile, the profile's factors are 0."""
    hour = None if context.at is None else context.at.hour + context.at.minute / 60 + context.at.second / 3600
    known = {name: _number(profile.get(name)) for name in PROFILE_FEATURES} if profile else {}
    volume = known.get("tip_volume_30d")
    dwell = known.get("mean_dwell_ms_30d")
    preferred = known.get("preferred_hour")
    distance = None if hour is None or preferred is None else hour - preferred % 24
    return np.array(
        [
            1.0,
            *_on_the_clock(hour),
            float(any(value is not None for value in known.values())),
            _smoothed(known.get("completion_rate_30d"), volume),
            _smoothed(known.get("dismiss_rate_30d"), volume),
            0.0 if dwell is None else log_ratio(DAY_MS, dwell) - 0.5,
            0.0 if volume is None else log_ratio(MANY_TIPS, volume) - 0.5,
            *_on_the_clock(distance),
            evaluated,
            *(value for [value] in columns(CONTEXT_FEATURES, [context])),
        ]
    )


def _number(value: float | str | None) -> float | None:
    """A profile value as a finite float; None if it is not a finite number."""
    if value is None or isinstance(value, str):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _on_the_clock(hour: float | None) -> tuple[float, float]:
    """Cosine and sine of the hour's angle on a 24-hour clock; (0, 0) without an hour."""
    if hour is None:
        return 0.0, 0.0
    angle = 2 * math.pi * hour / 24
    return math.cos(angle), math.sin(angle)


def _smoothed(rate: float | None, volume: float | None) -> float:
    """Smooth the rate r of one of the three actions in n feedback events: (n r + 1) / (n + 3) - 1/3.

    The result is within [-1/3, 2/3]; 0 without a rate. The profile does not contain n, so `volume`, the number of tips
    served, replaces n. If `volume` is 0 or None, because a producer sends feedback events only, n is `USUAL_VOLUME`.
    """
    if rate is None:
        return 0.0
    n = volume if volume is not None and volume > 0 else float(USUAL_VOLUME)
    share = min(1.0, max(0.0, rate))
    return (share - 1 / 3) * (n / (n + 3))  # the same value, in a form that no n overflows
