"""What inputs are made of: terms, each a fixed and bounded transform of one thing that a request carries.

A term either differs between the candidates of a request (`CANDIDATE_TERMS`) or is the same for all of them
(`SHARED_TERMS`: the time of day, the profile). Every transform is fixed: nothing here is scaled by what was seen
before, so a vector logged a year ago means today what it meant then. The text of a term's formula is part of every
spec's hash: change the text with the formula, under a new name.

Knows nothing of specs, evidence or policies, and never fails, whatever the numbers are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Profile: TypeAlias = Mapping[str, float | int | str | None] | None

STORED: Final = np.dtype("<f8")

YEAR_DAYS: Final = 365
DAY_MS: Final = 86_400_000
MANY_TIPS: Final = 1000  # served in 30 days: where the volume's transform reaches 1
USUAL_VOLUME: Final = 10  # stands for `tip_volume_30d` where there is a rate without it

ONE: Final = "one"

CANDIDATE_TERMS: Final[Mapping[str, str]] = {
    ONE: "1",
    "is_overdue": "1 or 0",
    "task_age": f"min(1, log1p(max(0, days)) / log1p({YEAR_DAYS}))",
    "priority": "p / (1 + |p|)",
}
SHARED_TERMS: Final[Mapping[str, str]] = {
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
}
PROFILE_FEATURES: Final = (
    "completion_rate_30d",
    "dismiss_rate_30d",
    "mean_dwell_ms_30d",
    "preferred_hour",
    "tip_volume_30d",
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One tip that could be shown. The numbers are finite; `task_age_days` is not negative."""

    id: str
    is_overdue: bool
    task_age_days: float
    priority: float


@dataclass(frozen=True, slots=True)
class Context:
    """When the tip would be shown, with the user's own UTC offset; None if it is not given."""

    at: datetime | None = None


def packed(array: Array) -> bytes:
    """An array as it is stored: little-endian float64."""
    return array.astype(STORED, copy=False).tobytes()


class Inputs(NamedTuple):
    """All that the vectors of a request are made of: `by_candidate` (K, terms) and `shared` (terms,)."""

    by_candidate: Array
    shared: Array


def terms_of(candidates: Sequence[Candidate], context: Context, profile: Profile) -> Inputs:
    """Both, of one request."""
    return Inputs(candidate_terms(candidates), shared_terms(context, profile))


def candidate_terms(candidates: Sequence[Candidate]) -> Array:
    """One row a candidate, one column a term, in the order of `CANDIDATE_TERMS`."""
    terms = np.ones((len(candidates), len(CANDIDATE_TERMS)))
    terms[:, 1] = [candidate.is_overdue for candidate in candidates]
    terms[:, 2] = [_log_share(candidate.task_age_days, YEAR_DAYS) for candidate in candidates]
    # Bounded and monotone, and 1 + |p| cannot overflow where p does not.
    terms[:, 3] = [candidate.priority / (1.0 + abs(candidate.priority)) for candidate in candidates]
    return terms


def shared_terms(context: Context, profile: Profile) -> Array:
    """One number a term, in the order of `SHARED_TERMS`. Without a profile all of the profile's are 0."""
    hour = _local_hour(context.at)
    known = {name: _number(profile.get(name)) for name in PROFILE_FEATURES} if profile else {}
    volume = known.get("tip_volume_30d")
    dwell = known.get("mean_dwell_ms_30d")
    preferred = known.get("preferred_hour")
    away = None if hour is None or preferred is None else hour - preferred % 24
    return np.array(
        [
            1.0,
            *_on_the_clock(hour),
            float(any(value is not None for value in known.values())),
            _smoothed(known.get("completion_rate_30d"), volume),
            _smoothed(known.get("dismiss_rate_30d"), volume),
            0.0 if dwell is None else _log_share(dwell, DAY_MS) - 0.5,
            0.0 if volume is None else _log_share(volume, MANY_TIPS) - 0.5,
            *_on_the_clock(away),
        ]
    )


def _number(value: float | str | None) -> float | None:
    """A profile value as a finite float; None for anything that is none."""
    if value is None or isinstance(value, str):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _local_hour(at: datetime | None) -> float | None:
    return None if at is None else at.hour + at.minute / 60 + at.second / 3600


def _on_the_clock(hour: float | None) -> tuple[float, float]:
    """The place on a clock of 24 hours as cosine and sine; the centre where there is no hour."""
    if hour is None:
        return 0.0, 0.0
    angle = 2 * math.pi * hour / 24
    return math.cos(angle), math.sin(angle)


def _log_share(amount: float, full: float) -> float:
    """0 at 0 and 1 from `full` on, logarithmic between."""
    return min(1.0, math.log1p(max(0.0, amount)) / math.log1p(full))


def _smoothed(rate: float | None, volume: float | None) -> float:
    """A rate drawn towards 1/3 by one pseudo-count for each of the three actions, minus 1/3: within [-1/3, 2/3].

    The number of feedbacks is not in the profile; the number of tips served stands in for it. Where none was served
    there is a rate all the same if a producer tells of feedback alone.
    """
    if rate is None:
        return 0.0
    n = volume if volume is not None and volume > 0 else float(USUAL_VOLUME)
    share = min(1.0, max(0.0, rate))
    # Written so that no n overflows: n / (n + 3) is within [0, 1].
    return (share - 1 / 3) * (n / (n + 3))
