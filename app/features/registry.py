"""The registry: one entry per feature, and the rules that every entry keeps.

Invariant: a `Registry` that exists is sound as far as that can be told without a database; `app.stores.sqlite.
feature_check` adds what only the migrated schema can tell. The order of entries gives each feature its index, and
`1 << index` its bit in a *mask*, by which reads name sets of features. Must not know how values are stored.
"""

from __future__ import annotations

import hashlib
import json
import keyword
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

import msgspec

from app.errors import Issue, RegistryError, UnknownFeature
from app.features.events import KNOWN_SUBJECTS

Dtype = Literal["float", "int", "str"]
Scalar = float | int | str | None
SHOWN = 80  # of a name that is none, in a refusal
DTYPES: dict[str, type] = {"float": float, "int": int, "str": str}
_INT64 = 1 << 63
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """One feature.

    `compute` is one set-based SELECT of `(user_id, value)`, at most one row a user, over the relations `views` and
    `feedback`, with `:now_ms` as its only parameter. `default` stands where it yields no row or NULL. `window` is
    how far back in event time the relations reach; the SELECT may look at less, never at more. `ttl_ms` is the TTL in
    whole milliseconds.
    """

    name: str
    dtype: Dtype
    ttl: timedelta
    description: str
    invalidated_by: tuple[str, ...]
    compute: str
    default: Scalar = None
    window: timedelta = timedelta(days=30)
    fingerprint: str = field(init=False)
    ttl_ms: int = field(init=False)

    def __post_init__(self) -> None:
        identity = json.dumps([self.compute, self.dtype, self.default, self.window.total_seconds()], default=repr)
        object.__setattr__(self, "fingerprint", hashlib.sha256(identity.encode()).hexdigest()[:8])
        object.__setattr__(self, "ttl_ms", self.ttl // timedelta(milliseconds=1))


def conforms(dtype: Dtype, value: object) -> bool:
    """Whether `value` is exactly of `dtype`: no int for a float, no bool for an int, nothing JSON cannot say."""
    if type(value) is not DTYPES[dtype]:
        return False
    return math.isfinite(value) if isinstance(value, float) else True


def _check(entry: Feature) -> None:
    if not entry.name.isidentifier() or not entry.name.isascii() or keyword.iskeyword(entry.name):
        raise RegistryError(entry.name, "the name must be an ASCII identifier")
    if entry.dtype not in DTYPES:
        raise RegistryError(entry.name, f"unknown dtype {entry.dtype!r}; allowed are {', '.join(DTYPES)}")
    if entry.ttl_ms <= 0:
        raise RegistryError(entry.name, "the TTL must be positive (at least a millisecond)")
    if entry.window <= timedelta(0):
        raise RegistryError(entry.name, "the window must be positive")
    if not entry.description.strip():
        raise RegistryError(entry.name, "the description is empty")
    if not entry.invalidated_by:
        raise RegistryError(entry.name, "invalidated_by names no subject")
    if unknown := sorted(set(entry.invalidated_by) - KNOWN_SUBJECTS):
        raise RegistryError(
            entry.name, f"unknown subject {unknown[0]!r}; known are {', '.join(sorted(KNOWN_SUBJECTS))}"
        )
    if entry.default is not None and not conforms(entry.dtype, entry.default):
        raise RegistryError(entry.name, f"the default {entry.default!r} is not of dtype {entry.dtype}")
    if isinstance(entry.default, int) and not -_INT64 <= entry.default < _INT64:
        raise RegistryError(entry.name, "the default is beyond 64 bits")


class Registry(Sequence[Feature]):
    """The features, in order.

    Raises:
        RegistryError: naming the entry and the rule, when an entry breaks one or a name repeats.
    """

    def __init__(self, entries: Iterable[Feature]) -> None:
        self._entries = tuple(entries)
        self._index: dict[str, int] = {}
        if not 1 <= len(self._entries) <= 62:
            raise RegistryError("*", f"a registry holds 1 to 62 features, not {len(self._entries)}")
        for index, entry in enumerate(self._entries):
            _check(entry)
            if entry.name in self._index:
                raise RegistryError(entry.name, "the name repeats")
            self._index[entry.name] = index
        self.names = tuple(self._index)
        self.full_mask = (1 << len(self._entries)) - 1

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Feature:  # type: ignore[override]  # no slices: indices are bits of a mask
        return self._entries[index]

    def named(self, name: str) -> Feature:
        """The entry of that name; `UnknownFeature` where there is none."""
        return self._entries[self.mask([name]).bit_length() - 1]

    def mask(self, names: Iterable[str]) -> int:
        """The mask of those features.

        Raises:
            UnknownFeature: naming every unknown one, and the known.
        """
        mask = 0
        unknown: list[Issue] = []
        for name in names:
            index = self._index.get(name)
            if index is None:
                shown = name if len(name) <= SHOWN else f"{name[:SHOWN]}…"
                unknown.append(Issue("features", f"unknown feature {shown!r}; known are {', '.join(self.names)}"))
            else:
                mask |= 1 << index
        if unknown:
            raise UnknownFeature("unknown feature", unknown)
        return mask

    def invalidated_by(self, subject: str) -> frozenset[str]:
        """Names of the features that an event of `subject` makes untrue."""
        return frozenset(entry.name for entry in self._entries if subject in entry.invalidated_by)

    @property
    def longest_window(self) -> timedelta:
        """The longest window of any entry."""
        return max(entry.window for entry in self._entries)


def indices(mask: int) -> list[int]:
    """Indices of the features in a mask, ascending."""
    return [index for index in range(mask.bit_length()) if mask >> index & 1]


def encode_value(dtype: Dtype, value: object) -> bytes | None:
    """A value as JSON, or None where it is not of its dtype."""
    if not conforms(dtype, value):
        return None
    return _encode(value)
