"""Which master of a cluster is registered as the owner of each hash slot, and under which generation.

`app.stores.valkey.server_registration` explains why all processes must use the registered server; here the same rules
hold slot by slot. The generation of a slot rises whenever another master is registered as its owner. So keys from
before a failover, or from before a slot was moved and moved back, are never read again, and no other keys are lost.

The registration has the config epoch of each owner. By this number a cluster decides which of two masters owns a slot.
A master with a lower config epoch is on the old side of a partition, and does not take the slot from the registered
owner. If no node knows the registered owner, the cluster was replaced by another one, whose numbers start again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from app.features.ids import HASH_SLOTS
from app.profiles.ports import EVERY_SLOT, Epoch, State


@dataclass(frozen=True, slots=True, eq=False)
class Owner:
    """The registered owner of some slots. `node`: its id in the cluster. `server`: its identity, which changes when it
    is started, and when it becomes a master again. `epoch`: a hash of database id, `server` and `generation`, for cache
    keys."""

    node: str
    server: str
    config_epoch: int
    generation: int
    epoch: str = ""


class Claim(NamedTuple):
    """The ranges of slots that a master says it owns, each with its first and last slot."""

    node: str
    server: str
    config_epoch: int
    ranges: Sequence[tuple[int, int]]


Owners = Sequence[Owner | None]


@lru_cache(maxsize=16)
def owners(epoch: Epoch) -> Owners:
    """The registered owner of each slot, None if it has none. `epoch`, that of a cluster, is the database's id, `|`,
    and the registration: a JSON array of `[first slot, last slot, node, server, config epoch, generation]`."""
    database_id, _, text = epoch.partition("|")
    found: list[Owner | None] = [None] * HASH_SLOTS
    # Otherwise nothing is registered, or a single server.
    for first, last, node, server, config_epoch, generation in json.loads(text) if text.startswith("[") else ():
        identity = f"{database_id}:{server}:{generation}"
        key_epoch = hashlib.sha256(identity.encode()).hexdigest()[:12]
        found[first : last + 1] = [Owner(node, server, config_epoch, generation, key_epoch)] * (last + 1 - first)
    return found


def replaced_slots(before: State, after: State) -> frozenset[int]:
    """The slots whose cache keys have another epoch in `after` than in `before`; `{EVERY_SLOT}` if all have."""
    pairs = zip(*(owners(f"{state.database_id}|{state.server}") for state in (before, after)), strict=True)
    replaced = {slot for slot, (old, new) in enumerate(pairs) if not (old and new and old.epoch == new.epoch)}
    return frozenset(replaced if len(replaced) < HASH_SLOTS else (EVERY_SLOT,))


def with_claims(state: State, claims: Iterable[Claim], known: Collection[str]) -> str:
    """The registration, as JSON, after the masters have claimed their slots. A registered owner in `known`, the ids of
    all nodes of the cluster, loses a slot only to a claim with a higher config epoch."""
    new = list(owners(f"|{state.server}"))
    for claim in sorted(claims, key=lambda claim: claim.config_epoch):
        for first, last in claim.ranges:
            for held, places in groupby(range(first, last + 1), new.__getitem__):
                slots = list(places)
                new[slots[0] : slots[-1] + 1] = [_next_owner(held, claim, known, state.generation)] * len(slots)
    ranges: list[tuple[int | str, ...]] = []
    for owner, places in groupby(range(HASH_SLOTS), lambda slot: _fields(new[slot])):
        slots = list(places)
        if owner:
            ranges.append((slots[0], slots[-1], *owner))
    return json.dumps(ranges, separators=(",", ":"))


def _next_owner(held: Owner | None, claim: Claim, known: Collection[str], registrations: int) -> Owner:
    if held is None:  # the number of registrations is at least as high as any earlier generation of the slots
        return Owner(claim.node, claim.server, claim.config_epoch, registrations + 1)
    lower = (claim.config_epoch, claim.node == held.node) <= (held.config_epoch, False)
    if lower and held.node in known:
        return held
    same = claim.server == held.server
    return Owner(claim.node, claim.server, claim.config_epoch, held.generation + (0 if same else 1))


def _fields(owner: Owner | None) -> tuple[str, str, int, int] | tuple[()]:
    return (owner.node, owner.server, owner.config_epoch, owner.generation) if owner is not None else ()
