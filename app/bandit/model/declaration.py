"""What `app.bandit.model.definitions` is written with: the features of requests, their bounded transforms, and versions.

A transform depends on no data seen before, so a vector logged a year ago still has the same meaning. Its formula is part
of the hash of every spec that uses it: a changed formula needs a new text and a new name.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from operator import eq
from typing import Annotated, Any, Final, NamedTuple, TypeAlias

import msgspec
from msgspec import NODEFAULT, Meta

ONE: Final = "one"  # the factor that is always 1
NEW_PRECISION: Final = 39_000.0  # the README derives it

Text: TypeAlias = Annotated[str, Meta(max_length=128, pattern=r"^[^\x00-\x1f\x7f-\x9f\ud800-\udfff]*$")]


class Transform(NamedTuple):
    """Maps any valid value of a feature into [-1, 1]."""

    formula: str
    of: Callable[[Any], float]


class Feature(NamedTuple):
    """A feature of a candidate or of the context, as clients send it: a field of a msgspec Struct, and the transforms
    of its value, by the names of the factors. The factors of null are 0.

    `default` is the value if a client does not send the feature. A feature with `NODEFAULT` is required, which only
    those of the first spec are, since older clients do not send others.
    """

    name: str
    type: Any
    factors: Mapping[str, Transform]
    default: bool | float | str | None | Any = None

    def formulas(self) -> dict[str, str]:
        absent = "" if self.default is NODEFAULT else f"; {self.default!r} if {self.name} is absent; 0 if it is null"
        return {name: transform.formula + absent for name, transform in self.factors.items()}


class Version(NamedTuple):
    """What a spec adds to the spec before it: features of candidates and of the context, and inputs.

    An input is the product of a shared factor and a candidate factor, in this order. An input of one factor has `ONE`
    in the place of the other. `precision` is the prior precision λ of the weights of these inputs.
    """

    inputs: Sequence[tuple[str, str]]
    candidate: Sequence[Feature] = ()
    context: Sequence[Feature] = ()
    precision: float = NEW_PRECISION
    pooled: bool = True


FLAG: Final = Transform("1 or 0", float)


def log_share(full: float, unit: str) -> Transform:
    """An amount on a logarithmic scale: 0 at 0, 1 from `full` on."""
    return Transform(f"min(1, log1p(max(0, {unit})) / log1p({full}))", partial(share_of_log, full))


def soft_sign(symbol: str) -> Transform:
    """A number of any sign and scale. Monotone up to rounding, and 1 + |x| is finite for every finite x."""
    return Transform(f"{symbol} / (1 + |{symbol}|)", lambda number: number / (1.0 + abs(number)))


def listed(prefix: str, categories: Sequence[str]) -> dict[str, Transform]:
    """A factor of 1 or 0 for each category."""
    return {f"{prefix}_{item}": Transform(f"1 if {item!r}, else 0", partial(eq, item)) for item in categories}


def hashed(prefix: str, size: int) -> dict[str, Transform]:
    """`size` factors of 1 or 0, for texts that cannot be listed. The text's hash selects the factor that is 1."""
    formula = f"1 if the first 8 bytes of SHA-256 mod {size} are %d, else 0"
    return {f"{prefix}_{n}": Transform(formula % n, lambda text, n=n: _hash(text) % size == n) for n in range(size)}


def share_of_log(full: float, amount: float) -> float:
    return min(1.0, math.log1p(max(0.0, amount)) / math.log1p(full))


def struct_of(features: Sequence[Feature]) -> Any:
    """A msgspec Struct with these fields. Those that have their default are not encoded."""
    fields = [(feature.name, feature.type, feature.default) for feature in features]
    return msgspec.defstruct("Declared", fields, frozen=True, kw_only=True, omit_defaults=True)


def factor_values(features: Sequence[Feature], given: object) -> Iterator[float]:
    """The factors of the features, whose values are attributes of `given`."""
    for feature in features:
        value = getattr(given, feature.name)
        for transform in feature.factors.values():
            yield 0.0 if value is None else transform.of(value)


@lru_cache(maxsize=4096)
def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
