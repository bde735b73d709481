"""Compares two registries: one that processes have served, as recorded in the database, and a new one."""

import json
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import msgspec

from app.features.clock import MILLISECOND, spoken
from app.features.registry import Definition, Feature, Registry
from app.features.views import view

Kind = Literal["added", "removed", "changed"]


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
        """Enable or disable a feature; return the outcome for the audit trail. Raises `Conflict` if nothing changes."""


class Change(NamedTuple):
    """The difference of one feature between two registries. `breaks`: programs that read it may fail, because it is
    removed or its dtype changes. `recomputed`: its cached values are not used any more."""

    feature: str
    kind: Kind
    details: tuple[str, ...]
    breaks: bool
    recomputed: bool


def definitions_of(registry: Registry) -> tuple[Definition, ...]:
    return tuple(view(Definition, entry) for entry in registry)


def feature_of(definition: Definition) -> Feature:
    """The definition as an entry of a registry, with the fingerprint that this release gives it."""
    ttl, window = definition.ttl_ms * MILLISECOND, definition.window_ms * MILLISECOND
    return Feature(**msgspec.structs.asdict(definition), ttl=ttl, window=window)


def changes(before: Sequence[Definition], after: Sequence[Definition]) -> list[Change]:
    """The added and changed features in the order of `after`, then the removed ones."""
    old = {item.name: item for item in before}
    new = {item.name: item for item in after}
    found = []
    for name, item in new.items():
        if name not in old:
            found.append(Change(name, "added", (), breaks=False, recomputed=True))
        elif details := _details(old[name], item):
            breaks, recomputed = old[name].dtype != item.dtype, old[name].fingerprint != item.fingerprint
            found.append(Change(name, "changed", details, breaks=breaks, recomputed=recomputed))
    return found + [Change(name, "removed", (), breaks=True, recomputed=False) for name in old if name not in new]


def _details(old: Definition, new: Definition) -> tuple[str, ...]:
    before, after = (
        {
            "dtype": item.dtype,
            "window": spoken(item.window_ms * MILLISECOND),
            "TTL": spoken(item.ttl_ms * MILLISECOND),
            "default": json.dumps(item.default),
            "invalidated by": ", ".join(sorted(item.invalidated_by)),
        }
        for item in (old, new)
    )
    details = [f"{name}: {before[name]} → {now}" for name, now in after.items() if before[name] != now]
    if old.compute != new.compute:
        details.append("SQL")
    if old.description != new.description:
        details.append("description")
    if not details and old.fingerprint != new.fingerprint:
        details.append("protocol of the cache")
    return tuple(details)
