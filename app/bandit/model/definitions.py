"""Declares the features of candidates and context in a request, and the inputs that each spec computes from them.

To add an input, append a `Version` to `VERSIONS`. It makes the newest spec, whose policy is the challenger. The schema
of `POST /score`, stored requests and users' statistics are extended by it. Never change a version: users' statistics
and logged decisions were made with it.

A transform depends only on a feature's value, so a vector logged a year ago still has the same meaning. Its formula is
part of the hash of every spec that uses it. To change a formula, declare a new transform with a new name.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import product
from operator import eq
from typing import Annotated, Any, Final, NamedTuple, TypeAlias

import msgspec
from msgspec import NODEFAULT, Meta

ONE: Final = "one"  # the factor that is always 1
NEW_PRECISION: Final = 39_000.0  # `app/bandit/README.md` derives it
Text: TypeAlias = Annotated[str, Meta(max_length=128, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]


class Transform(NamedTuple):
    formula: str
    of: Callable[[Any], float]  # maps any valid value of a feature into [-1, 1]


class Feature(NamedTuple):
    """A field of the request about a candidate or the context. `factors` maps the name of each factor to the
    transform that computes it from the value; null gives 0. `default` replaces a feature that was not sent; `NODEFAULT`
    makes it required. Only the first version may require features, since older clients do not send later ones."""

    name: str
    type: Any
    factors: Mapping[str, Transform]
    default: Any = None


class Version(NamedTuple):
    """What a spec adds to the spec before it. An input is the product of a shared factor and a candidate factor, in
    this order; one of them may be `ONE`. `precision` is the prior precision λ of the weights of these inputs."""

    inputs: Sequence[tuple[str, str]]
    candidate: Sequence[Feature] = ()
    context: Sequence[Feature] = ()
    precision: float = NEW_PRECISION


def log_share(full: float, unit: str) -> Transform:
    """Maps an amount to a logarithmic scale: 0 to 0, and `full` or more to 1. The text of the formula calls the amount
    by its `unit`, such as "days"."""
    return Transform(f"min(1, log1p(max(0, {unit})) / log1p({full}))", partial(log_ratio, math.log1p(full)))


def soft_sign(symbol: str) -> Transform:
    """Maps a number x of any sign and size into [-1, 1]: x / (1 + |x|). The result is monotone up to rounding."""
    return Transform(f"{symbol} / (1 + |{symbol}|)", lambda number: number / (1.0 + abs(number)))


def listed(prefix: str, *categories: str) -> dict[str, Transform]:
    """One factor per category, named `prefix_category`: 1 if the value is the category, else 0."""
    return {f"{prefix}_{item}": Transform(f"1 if {item!r}, else 0", partial(eq, item)) for item in categories}


def hashed(prefix: str, size: int) -> dict[str, Transform]:
    """`size` factors of 1 or 0, for texts that cannot be listed. The text's hash selects the one that is 1."""
    return {f"{prefix}_{n}": Transform(f"SHA-256 mod {size} is {n}", partial(_hashes_to, n, size)) for n in range(size)}


def log_ratio(log_of_full: float, amount: float) -> float:
    # Conditions, because a call of `min` and of `max` takes as long as the logarithm.
    share = math.log1p(amount) / log_of_full if amount > 0 else 0.0
    return share if share < 1 else 1.0


def _hashes_to(place: int, size: int, text: str) -> bool:
    return _bucket(size, text) == place


@lru_cache(maxsize=4096)  # every factor of the feature needs it
def _bucket(size: int, text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % size


def formulas(features: Sequence[Feature]) -> Iterator[tuple[str, str]]:
    """The name and the formula of each factor. The formula includes the value for an absent feature."""
    for name, _, factors, default in features:
        absent = "" if default is NODEFAULT else f"; {default!r} if {name} is absent; 0 if it is null"
        for factor, transform in factors.items():
            yield factor, transform.formula + absent


def columns(features: Sequence[Feature], given: Sequence[object]) -> Iterator[list[float]]:
    """The values of each factor of the features, one for each object in `given`. Features are attributes of objects."""
    for feature in features:
        values = [getattr(item, feature.name) for item in given]
        for transform in feature.factors.values():
            yield [0.0 if value is None else transform.of(value) for value in values]


def struct(features: Sequence[Feature]) -> Any:
    """A msgspec Struct with a field for each feature. A value that is the default is not encoded."""
    fields = [(feature.name, feature.type, feature.default) for feature in features]
    return msgspec.defstruct("Declared", fields, frozen=True, kw_only=True, omit_defaults=True)


FLAG: Final = Transform("1 or 0", float)
_DAYS = Annotated[float, Meta(ge=0, examples=[3.5])]
_PRIORITY = Annotated[float, Meta(description="Higher matters more; any scale.", examples=[2])]
_OF_PROFILE = ("completion", "dismissal", "dwell", "volume", "hour_distance_cos", "hour_distance_sin")
_OF_CANDIDATE = ("is_overdue", "task_age", "priority")
VERSIONS: Final = (
    Version(
        candidate=[
            Feature("is_overdue", bool, {"is_overdue": FLAG}, NODEFAULT),
            Feature("task_age_days", _DAYS, {"task_age": log_share(365, "days")}, NODEFAULT),
            Feature("priority", _PRIORITY, {"priority": soft_sign("p")}, NODEFAULT),
        ],
        inputs=[(ONE, ONE), *product([ONE], _OF_CANDIDATE), ("hour_cos", ONE), ("hour_sin", ONE)],
        precision=1.0,
    ),
    Version([("profile_present", ONE), *product(_OF_PROFILE, _OF_CANDIDATE)]),
)
CANDIDATE_FEATURES: Final = [feature for version in VERSIONS for feature in version.candidate]
CONTEXT_FEATURES: Final = [feature for version in VERSIONS for feature in version.context]
