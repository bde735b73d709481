"""Compares two registries: one that processes have served, as recorded in the database, and a new one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

from app.features.clock import MILLISECOND, spoken
from app.features.registry import Dtype, Feature, Registry, Scalar
from app.features.views import view

Kind = Literal["added", "removed", "changed"]


class Definition(msgspec.Struct, frozen=True, kw_only=True):
    """A feature's declaration, as a process that serves it has recorded it in the database."""

    name: str
    dtype: Dtype
    ttl_ms: int
    window_ms: int
    default: Scalar
    description: str
    compute: str
    invalidated_by: tuple[str, ...]
    relations: tuple[str, ...]
    fingerprint: str


class Announced(NamedTuple):
    """A registry that processes have served, with the times at which a process first and last reported it."""

    fingerprint: str
    definitions: tuple[Definition, ...]
    first_seen_ms: int
    last_seen_ms: int


class Registries(Protocol):
    """Stores which registries processes have served, and which features are disabled. Raises `StoreUnavailable`."""

    async def announced(self) -> list[Announced]:
        """Every registry that was ever served, the most recently served last."""

    async def switch(self, feature: str, actor: str, reason: str, now_ms: int, *, on: bool) -> str:
        """Enable or disable a feature; return the outcome as text for the audit trail.

        Raises:
            Conflict: the feature is already enabled, or already disabled.
        """


class Change(NamedTuple):
    """The difference of one feature between two registries.

    `breaks`: programs that read the feature may fail, because it is removed or its dtype changes. `recomputed`: its
    cached values are not used any more, so its values are computed again.
    """

    feature: str
    kind: Kind
    details: tuple[str, ...]
    breaks: bool
    recomputed: bool


def definitions_of(registry: Registry) -> tuple[Definition, ...]:
    return tuple(view(Definition, entry) for entry in registry)


def feature_of(definition: Definition) -> Feature:
    names = ("name", "dtype", "description", "compute", "default", "invalidated_by", "relations")
    same: dict[str, Any] = {name: getattr(definition, name) for name in names}
    return Feature(**same, ttl=definition.ttl_ms * MILLISECOND, window=definition.window_ms * MILLISECOND)


def changes(before: Sequence[Definition], after: Sequence[Definition]) -> list[Change]:
    """Compare two registries, given as the definitions of their features. Return the added and changed features in the
    order of `after`, then the removed ones."""
    old = {item.name: item for item in before}
    new = {item.name: item for item in after}
    found = [
        Change(name, "added", (), breaks=False, recomputed=True) if name not in old else _changed(old[name], item)
        for name, item in new.items()
    ]
    found += [Change(name, "removed", (), breaks=True, recomputed=False) for name in old if name not in new]
    return [change for change in found if change is not None]


def _changed(old: Definition, new: Definition) -> Change | None:
    shown: Mapping[str, tuple[object, object]] = {
        "dtype": (old.dtype, new.dtype),
        "window": (spoken(old.window_ms * MILLISECOND), spoken(new.window_ms * MILLISECOND)),
        "TTL": (spoken(old.ttl_ms * MILLISECOND), spoken(new.ttl_ms * MILLISECOND)),
        "default": (json.dumps(old.default), json.dumps(new.default)),
        "invalidated by": (", ".join(sorted(old.invalidated_by)), ", ".join(sorted(new.invalidated_by))),
    }
    details = [f"{name}: {was} → {now}" for name, (was, now) in shown.items() if was != now]
    if old.compute != new.compute:
        details.append("SQL")
    if old.description != new.description:
        details.append("description")
    recomputed = old.fingerprint != new.fingerprint
    if recomputed and not details:
        details.append("protocol of the cache")
    if not details:
        return None
    return Change(new.name, "changed", tuple(details), breaks=old.dtype != new.dtype, recomputed=recomputed)
