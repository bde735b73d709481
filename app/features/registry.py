"""The registry: one entry per feature, the rules that entries must meet, and records of which values were read.

A feature's *index* is its position in the registry. A *mask* is a set of features as an int, in which `1 << index` is
the feature's bit. A `Registry` object meets every rule that can be checked without SQL. The store
*compiles* the entries: it checks the other rules, and derives which relations each entry reads and which subjects, that
is kinds of events, invalidate it.
"""

from __future__ import annotations

import hashlib
import json
import keyword
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from textwrap import dedent
from typing import Literal, NamedTuple

import msgspec
from msgspec.structs import force_setattr, replace

from app.errors import Issue, RegistryError, UnknownFeature
from app.features.clock import MILLISECOND
from app.features.events import KNOWN_SUBJECTS, RELATIONS
from app.features.examples import Example

Dtype = Literal["float", "int", "str"]
Scalar = float | int | str | None
# Part of every fingerprint. Values of a release with other rules of expiry are misses: increment it with the rules.
CACHE_PROTOCOL = 2
SHOWN = 80  # characters of an unknown name that an error repeats
DTYPES: dict[str, type] = {"float": float, "int": int, "str": str}
_INT64 = 1 << 63


class Definition(msgspec.Struct, frozen=True, kw_only=True):
    """A feature, as the processes that serve it record it in the database. `relations`: the tables and views that the
    SQL in `compute` reads."""

    name: str
    dtype: Dtype
    ttl_ms: int = 0
    window_ms: int = 0
    default: Scalar = None
    description: str
    compute: str
    invalidated_by: tuple[str, ...] = ()
    relations: tuple[str, ...] = ()
    fingerprint: str = ""


class Feature(Definition, frozen=True, kw_only=True):
    """The declaration of a feature, an entry of the registry. `app/features/README.md` describes the fields. `ttl_ms`,
    `window_ms` and `fingerprint` are derived from other fields. `relations`, the tables and views that the SQL reads,
    is empty until `compiled` sets it."""

    ttl: timedelta
    window: timedelta
    examples: Sequence[Example] = ()

    def __post_init__(self) -> None:
        # Values of another type, which an untyped file may contain, are reported by `_check`.
        if isinstance(self.compute, str):
            force_setattr(self, "compute", dedent(self.compute).strip())
        if self.dtype in DTYPES and (default := as_dtype(self.dtype, self.default)) is not None:
            force_setattr(self, "default", default)
        for name in ("ttl", "window"):
            value = getattr(self, name)
            force_setattr(self, f"{name}_ms", value // MILLISECOND if isinstance(value, timedelta) else 0)
        identity = json.dumps([CACHE_PROTOCOL, self.compute, self.dtype, self.default, self.window_ms], default=repr)
        force_setattr(self, "fingerprint", hashlib.sha256(identity.encode()).hexdigest()[:8])

    def compiled(self, relations: Iterable[str]) -> Feature:
        """A copy of the entry with the `relations` that its SQL reads. Each relation holds events of one subject (kind
        of event). `invalidated_by` defaults to the subjects of the relations. Raises `RegistryError` if the SQL reads
        no relation, or if `invalidated_by` lacks the subject of one of them."""
        read = tuple(name for name in RELATIONS if name in set(relations))
        if not read:
            raise RegistryError(self.name, f"the SQL reads none of the relations {', '.join(RELATIONS)}")
        invalidated_by = self.invalidated_by or tuple(RELATIONS[name] for name in read)
        for name in read:
            if (subject := RELATIONS[name]) not in invalidated_by:
                reason = (
                    f"the SQL reads {name}, so invalidated_by must name {subject!r}; "
                    "or leave invalidated_by out, and it is derived"
                )
                raise RegistryError(self.name, reason)
        return replace(self, relations=read, invalidated_by=invalidated_by)

    def value_of(self, raw: object) -> tuple[Scalar, str | None]:
        """Convert a result of the SQL to the feature's value; NULL gives the default. Return the value and None, or
        None and an error text if the result is not of the dtype."""
        if raw is None:
            return self.default, None
        if (value := as_dtype(self.dtype, raw)) is not None:
            return value, None
        found = f"{type(raw).__name__} {raw}" if isinstance(raw, int | float) else "text"
        if isinstance(raw, bytes):
            found = "more than one row, or a blob,"
        return None, f"the SQL gave {found} where {self.dtype} is declared"

    def newest_event(self, newest: Mapping[str, int]) -> int:
        """The sequence number of the user's newest event that invalidates the feature; 0 if there is none. `newest` has
        the number of the user's newest event of each subject."""
        return max((newest.get(subject, 0) for subject in self.invalidated_by), default=0)


def as_dtype(dtype: Dtype, value: object) -> Scalar:
    """Convert `value` to `dtype`; None if it is not of that dtype. An int is accepted as a float, and an integral float
    as an int. Bools are not numbers, and numbers that JSON or 64 bits cannot represent are not accepted."""
    kind = type(value)
    if dtype == "str":
        return value if isinstance(value, str) else None
    if kind not in (int, float):
        return None
    assert isinstance(value, int | float)
    if not math.isfinite(value) or (kind is int and not -_INT64 <= value < _INT64):
        return None
    if dtype == "float":
        return float(value)
    return int(value) if value == int(value) and -_INT64 <= value < _INT64 else None


def _check(entry: Feature) -> None:
    name = str(entry.name)
    named = _is_text(entry.name) and name.isidentifier() and name.isascii() and not keyword.iskeyword(name)
    rules = (
        (named, "the name must be an ASCII identifier, and no keyword of Python"),
        (entry.dtype in DTYPES, f"unknown dtype {entry.dtype!r}; allowed are {', '.join(DTYPES)}"),
        (entry.ttl_ms > 0, "the TTL must be positive: a timedelta of at least a millisecond"),
        (entry.window_ms > 0, "the window must be positive: a timedelta of at least a millisecond"),
        (_is_text(entry.description), "the description is empty"),
        (_is_text(entry.compute), "the SQL in compute is empty"),
        (isinstance(entry.invalidated_by, tuple), "invalidated_by must be a tuple of subjects"),
        (all(isinstance(item, Example) for item in entry.examples), "examples must be a list of Example"),
    )
    for kept, problem in rules:
        if not kept:
            raise RegistryError(str(entry.name), problem)
    if unknown := sorted(set(entry.invalidated_by) - KNOWN_SUBJECTS):
        known = ", ".join(sorted(KNOWN_SUBJECTS))
        raise RegistryError(entry.name, f"unknown subject {unknown[0]!r}; known are {known}")
    if entry.default is not None and as_dtype(entry.dtype, entry.default) is None:
        raise RegistryError(entry.name, f"the default {entry.default!r} is not of dtype {entry.dtype}")


def _is_text(text: object) -> bool:
    return isinstance(text, str) and bool(text.strip())


class Registry(Sequence[Feature]):
    """The features that a process serves, in a fixed order. Raises `RegistryError`, which names entry and rule."""

    def __init__(self, entries: Iterable[Feature]) -> None:
        self._entries = tuple(entries)
        self._index: dict[str, int] = {}
        if not 1 <= len(self._entries) <= 62:
            raise RegistryError("*", f"it must hold 1 to 62 features, not {len(self._entries)}")
        for index, entry in enumerate(self._entries):
            if not isinstance(entry, Feature):
                raise RegistryError(str(entry)[:SHOWN], "an entry must be a Feature")
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

    @property
    def fingerprint(self) -> str:
        """A hash of the features' order, names, fingerprints, TTLs, and the subjects that invalidate them."""
        parts = [[entry.name, entry.fingerprint, entry.ttl_ms, sorted(entry.invalidated_by)] for entry in self]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    def named(self, name: str) -> Feature:
        """The feature of this name. Raises `UnknownFeature`."""
        return self._entries[self.mask([name]).bit_length() - 1]

    def mask(self, names: Iterable[str] | None) -> int:
        """The bit mask of the features with these names, or of all features if `names` is None. Raises
        `UnknownFeature`, which names every unknown feature and the known ones."""
        if names is None:
            return self.full_mask
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

    def known_mask(self, names: Iterable[str]) -> int:
        """The bit mask of the features with these names. Names that the registry lacks are ignored."""
        return self.mask(name for name in names if name in self._index)

    def invalidated_by(self, subject: str) -> frozenset[str]:
        """Names of the features that an event of this subject (kind of event) makes stale."""
        return frozenset(entry.name for entry in self._entries if subject in entry.invalidated_by)

    def longest_window_ms(self, mask: int | None = None) -> int:
        """The longest window (ms) of the features in the mask, or of all. Older events change no feature."""
        entries = self._entries if mask is None else [self._entries[index] for index in indices(mask)]
        return max((entry.window_ms for entry in entries), default=0)


def indices(mask: int) -> list[int]:
    """The indices of the features in a bit mask, ascending."""
    return [index for index in range(mask.bit_length()) if mask >> index & 1]


class ValueRead(NamedTuple):
    """Which value of a feature was read: the fingerprint of its definition, and its version, the sequence number of the
    user's newest event in the computation."""

    fingerprint: str
    version: int


class ProfileRead(msgspec.Struct, frozen=True):
    """A read of a profile, as stored with the decision that was made from the profile.

    `values` has a `ValueRead` for each feature, by name. The value that was read equals a computation as of `at_ms`
    from the user's events with a sequence number up to the version in the `ValueRead`. Features that were disabled or
    failing, and so read as null, are left out.
    """

    at_ms: int
    values: dict[str, ValueRead]

    @property
    def versions(self) -> dict[str, int]:
        return {name: value.version for name, value in self.values.items()}

    @property
    def version(self) -> int:
        """The highest version among the values; 0 if there are none."""
        return max(self.versions.values(), default=0)
