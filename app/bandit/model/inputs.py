"""The inputs of the model: products of factors, which are bounded transforms of the request and the profile.

A candidate factor may differ between the candidates of a request. A shared factor is the same for all of them (time of
day, profile, context). `app.bandit.model.definitions` declares the features of candidates and context, and their
transforms. Those of the time and of the profile are here, and follow the same rules.

A spec is an ordered list of the inputs that a policy reads. Its hash is stored with every vector and with every user's
statistics, so numbers of two specs are never mixed. Invariant: a longer spec of `SPECS` begins with the inputs of the
shorter one. So statistics of the shorter spec can be extended to the longer one without learning again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec
from msgspec.structs import asdict

from app.bandit.model.definitions import (
    CANDIDATE_FEATURES,
    CONTEXT_FEATURES,
    ONE,
    VERSIONS,
    columns,
    formulas,
    log_ratio,
    struct,
)
from app.bandit.numpy_on_demand import np
from app.features.clock import DAY_MS

if TYPE_CHECKING:
    from numpy.typing import NDArray

Array: TypeAlias = "NDArray[np.float64]"
Places: TypeAlias = "NDArray[np.intp]"
Profile: TypeAlias = Mapping[str, float | int | str | None] | None

STORED: Final = "<f8"
NUMBER_BYTES: Final = 8
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
PROFILE_FEATURES = ("completion_rate_30d", "dismiss_rate_30d", "mean_dwell_ms_30d", "preferred_hour", "tip_volume_30d")

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
    given = profile or {}
    known = [_number(given.get(name)) for name in PROFILE_FEATURES]
    completion, dismissal, dwell, preferred, volume = known
    distance = None if hour is None or preferred is None else hour - preferred % 24
    return np.array(
        [
            1.0,
            *_on_the_clock(hour),
            float(any(value is not None for value in known)),
            _smoothed(completion, volume),
            _smoothed(dismissal, volume),
            0.0 if dwell is None else log_ratio(math.log1p(DAY_MS), dwell) - 0.5,
            0.0 if volume is None else log_ratio(math.log1p(MANY_TIPS), volume) - 0.5,
            *_on_the_clock(distance),
            evaluated,
            *(value for [value] in columns(CONTEXT_FEATURES, [context])),
        ]
    )


def _number(value: float | str | None) -> float | None:
    """The value as a finite float; None if it is not a finite number."""
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
    """Smooth the share r that one of the three actions has in n feedback events: (n r + 1) / (n + 3) - 1/3. The profile
    does not contain n, so n is `volume`, the number of tips served. If a producer sends feedback events only, `volume`
    is 0 or None, and n is `USUAL_VOLUME`."""
    if rate is None:
        return 0.0
    n = volume if volume is not None and volume > 0 else float(USUAL_VOLUME)
    share = min(1.0, max(0.0, rate))
    return (share - 1 / 3) * (n / (n + 3))  # the same value, in a form that no n overflows


class Input(msgspec.Struct, frozen=True):
    """One component of an input vector φ: the product of the factors with the names `candidate` and `shared`.
    `precision` is the prior precision λ of its weight."""

    name: str
    candidate: str = ONE
    shared: str = ONE
    precision: float = 1.0


class Spec(msgspec.Struct, frozen=True, dict=True):
    """An ordered list of inputs. The prior mean of their weights is estimated from all users if `pooled`, else 0."""

    id: str
    version: int
    inputs: tuple[Input, ...]
    pooled: bool = False

    @property
    def size(self) -> int:
        """The number of inputs, D in formulas."""
        return len(self.inputs)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.inputs)

    @cached_property
    def precisions(self) -> Array:
        """The prior precisions (D,), the diagonal of Λ."""
        return np.array([entry.precision for entry in self.inputs])

    @cached_property
    def hash(self) -> str:
        """SHA-256, in hexadecimal, of the spec as canonical JSON, with formulas, their constants and precisions."""
        inputs = [
            {**asdict(entry), "candidate": CANDIDATE_FACTORS[entry.candidate], "shared": SHARED_FACTORS[entry.shared]}
            for entry in self.inputs
        ]
        whole = {"id": self.id, "version": self.version, "pooled": self.pooled, "inputs": inputs}
        text = json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def prefix_of(self, other: Spec) -> bool:
        """Whether the first inputs of `other` are the inputs of this spec, in the same order."""
        return other.inputs[: self.size] == self.inputs

    def shorter(self) -> list[Spec]:
        """The other specs whose inputs are the first inputs of this one: their statistics can be extended to it."""
        return [spec for spec in SPECS.values() if spec != self and spec.prefix_of(self)]

    def phi(self, candidates: Sequence[Candidate], context: Context, profile: Profile, evaluated: float = 0.0) -> Array:
        """The input vectors φ (K, D), one row per candidate, with finite components within [-1, 1]. `evaluated` is the
        value of a feature under evaluation."""
        candidate_places, shared_places = self.places
        shared = shared_factors(context, profile, evaluated).take(shared_places)
        return candidate_factors(candidates).take(candidate_places, axis=1) * shared

    @cached_property
    def places(self) -> tuple[Places, Places]:
        """For each input, the indices of its factors in `CANDIDATE_FACTORS` and in `SHARED_FACTORS`."""
        candidate, shared = list(CANDIDATE_FACTORS), list(SHARED_FACTORS)
        return (
            np.array([candidate.index(entry.candidate) for entry in self.inputs]),
            np.array([shared.index(entry.shared) for entry in self.inputs]),
        )


def _specs() -> Iterator[Spec]:
    inputs: list[Input] = []
    for number, version in enumerate(VERSIONS, 1):
        for pair in version.inputs:
            name = "_x_".join(factor for factor in pair if factor != ONE) or "intercept"
            inputs.append(Input(name, pair[1], pair[0], version.precision))
        yield Spec("tips", number, tuple(inputs), pooled=number > 1)


SPECS: Final = {spec.hash: spec for spec in _specs()}  # in the order of `VERSIONS`
SPEC_V1, SPEC_V2, *_ = SPECS.values()
NEWEST: Final = list(SPECS.values())[-1]
