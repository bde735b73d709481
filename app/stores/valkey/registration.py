"""Records in the database which server is the cache: all processes must read from and delete on the same server.

With a Sentinel group, a proxy or a DNS name, two processes can be connected to different servers: one still reads from
the old master while the other deletes on the new one. The server's identity is therefore registered in the database
under a *generation*, a number that is part of every key. Before a process uses another server, it registers that server
under the next generation, which has no keys yet.

Interleavings prevented; R reads on the old server S, E ingests on the new server T:
  1. E registers T, E commits, E deletes on T, R hits on S    R's query of the registration is at most 50 ms old, and
                                                               E's delete returns 100 ms after E first saw T registered
  2. R registers S again, R hits an old value on S            S is registered under a new generation without keys
  3. E deletes on S, which is no longer registered            E checks again after its commit and is refused

In a cluster, these rules hold slot by slot. The generation of a slot rises whenever another master is registered as its
owner. So keys from before a failover, or from before a slot was moved and moved back, are never read again, and no
other keys are lost. The registration has the config epoch of each owner. By this number a cluster decides which of two
masters owns a slot. A master with a lower one is on the old side of a partition, and does not take the slot from the
registered owner. If no node knows that owner, the cluster was replaced by another one, whose numbers start again.
"""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import msgspec

from app.errors import CacheRefused, StoreUnavailable
from app.features.clock import Clock
from app.features.ids import HASH_SLOTS
from app.profiles.ports import EVERY_SLOT, Epoch, ObservedState, State
from app.telemetry import logger, warn

HOLD_BACK_S = 0.100
REGISTER_EVERY_S = 1.0
log = logger("stores.valkey")


def key_epoch(database_id: str, server: str, generation: int) -> Epoch:
    """The epoch of the cache keys on a server that is registered under a generation."""
    return hashlib.sha256(f"{database_id}:{server}:{generation}".encode()).hexdigest()[:12]


class InMemoryState:
    """A state that no other process sees, for a cache without a database."""

    def __init__(self, database_id: str) -> None:
        self.last = State(database_id=database_id)

    def look(self) -> State:
        return self.last

    async def query(self) -> State:
        return self.last

    async def store(self, server: str, after: int) -> None:
        self.last = self.last._replace(server=server, generation=after + 1)


class ServerRegistration(msgspec.Struct, eq=False):
    """Registers the cache's server in the database, and notices when another one takes its place. One per process.
    `store(server, g)` registers a server under generation g + 1, if the current generation is still g."""

    state: ObservedState
    store: Callable[[str, int], Awaitable[None]]
    clock: Clock
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep
    _seen: State = State()
    _seen_at: float = float("-inf")
    _tried_at: float = float("-inf")
    _registering: asyncio.Task[None] | None = None

    def require(self, server: str) -> State:
        """The `State` as of the last query. If another server than `server` is registered in it as the cache, raise
        `CacheRefused`, and register `server` in the background."""
        state = self.state.last
        self._note(state)
        if state.server != server:
            now = self.clock.monotonic()
            idle = self._registering is None or self._registering.done()
            if idle and now - self._tried_at >= REGISTER_EVERY_S:
                self._tried_at = now
                self._registering = asyncio.get_running_loop().create_task(self.try_to_revise(lambda _: server))
            raise CacheRefused("another server is registered as the cache; this one is being registered")
        return state

    async def refresh(self) -> None:
        """Query which server is registered as the cache, and under which generation. Later keys contain a hash of both.
        Raises `CacheRefused` if the database does not answer."""
        try:
            self._note(await self.state.query())
        except StoreUnavailable as error:
            raise CacheRefused("the registered server is unknown, because the database does not answer") from error

    async def settle(self) -> None:
        """Wait until `HOLD_BACK_S` after this process first saw the current generation and database. By then no process
        reads keys of an earlier one: see interleaving 1 of this module."""
        remaining = HOLD_BACK_S - (self.clock.monotonic() - self._seen_at)
        if remaining > 0:
            await self.pause(remaining)

    async def revise(self, server_after: Callable[[State], str]) -> None:
        """Pass the current registration to `server_after`, and register the result if it differs: the identity of a
        server or, for a cluster, the list of slot owners as JSON. Raises `StoreUnavailable`."""
        state = await self.state.query()
        if state.server != (server := server_after(state)):
            await self.store(server, state.generation)
            state = await self.state.query()
            log.info("cache_registered", server=server[:12], generation=state.generation)
        self._note(state)

    async def try_to_revise(self, server_after: Callable[[State], str]) -> None:
        """Do as `revise`, but log a warning if the database does not answer."""
        try:
            await self.revise(server_after)
        except StoreUnavailable as error:
            warn(log, error)("cache_not_registered", error=str(error))

    async def close(self) -> None:
        """Wait for the registration that runs in the background, if there is one."""
        if self._registering is not None:
            await asyncio.gather(self._registering, return_exceptions=True)

    def _note(self, state: State) -> None:
        if not state.has_keys_of(self._seen):
            self._seen, self._seen_at = state, self.clock.monotonic()


@dataclass(frozen=True, slots=True, eq=False)
class Owner:
    """The registered owner of some slots. `node`: its id in the cluster. `server`: its identity, which changes when it
    starts, and when it becomes a master again. `epoch`: the epoch of its cache keys."""

    node: str
    server: str
    config_epoch: int
    generation: int
    epoch: str = ""


class ClusterNode(NamedTuple):
    """A line of `CLUSTER NODES`. `address` is empty if the node that answered does not know it. `flags` has `myself` if
    the line is about this node. `master`: the id of the master of a replica, otherwise `-`. `ranges`: the first and
    last slots that a master owns. `server`: the node's `run_id` and replication id (`Owner.server`), set only in
    a master's own line about itself."""

    node: str
    address: str
    flags: Collection[str]
    master: str
    config_epoch: int
    ranges: Sequence[tuple[int, int]]
    server: str = ""


Owners = Sequence[Owner | None]


def parse_nodes(text: str) -> list[ClusterNode]:
    found: list[ClusterNode] = []
    for line in text.splitlines():
        node, address, flags, master, _, _, config_epoch, _, *slots = line.split()
        host, _, port = address.partition("@")[0].rpartition(":")
        known = bool(host) and "noaddr" not in flags and "handshake" not in flags
        address = (f"[{host}]:{port}" if ":" in host else f"{host}:{port}") if known else ""
        # A slot that is being moved is in square brackets.
        ranges = [(int((ends := part.split("-"))[0]), int(ends[-1])) for part in slots if part[0] != "["]
        found.append(ClusterNode(node, address, flags.split(","), master, int(config_epoch), ranges))
    return found


@lru_cache(maxsize=16)
def owners(epoch: Epoch) -> Owners:
    """The registered owner of each slot; None if a slot has none. The `epoch` of a cluster is the database's id, `|`,
    and the registration: a JSON array of `[first slot, last slot, node, server, config epoch, generation]`."""
    database_id, _, text = epoch.partition("|")
    found: list[Owner | None] = [None] * HASH_SLOTS
    # Otherwise nothing is registered, or a single server.
    for first, last, node, server, config_epoch, generation in json.loads(text) if text.startswith("[") else ():
        owner = Owner(node, server, config_epoch, generation, key_epoch(database_id, server, generation))
        found[first : last + 1] = [owner] * (last + 1 - first)
    return found


def replaced_slots(before: State, after: State) -> frozenset[int]:
    """The slots whose cache keys have another epoch in `after` than in `before`; `{EVERY_SLOT}` if all have."""
    pairs = zip(*(owners(f"{state.database_id}|{state.server}") for state in (before, after)), strict=True)
    replaced = {slot for slot, (old, new) in enumerate(pairs) if not (old and new and old.epoch == new.epoch)}
    return frozenset(replaced if len(replaced) < HASH_SLOTS else (EVERY_SLOT,))


def with_claims(state: State, claims: Iterable[ClusterNode], known: Collection[str]) -> str:
    """The registration, as JSON, after masters have claimed their slots. A registered owner in `known`, the ids of all
    nodes of the cluster, loses a slot only to a claim with a higher config epoch."""
    new = list(owners(f"|{state.server}"))
    for claim in sorted(claims, key=lambda claim: claim.config_epoch):
        for first, last in claim.ranges:
            for held, places in groupby(range(first, last + 1), new.__getitem__):
                slots = list(places)
                new[slots[0] : slots[-1] + 1] = [_next_owner(held, claim, known, state.generation)] * len(slots)
    ranges: list[tuple[int | str, ...]] = []
    fields = [(own.node, own.server, own.config_epoch, own.generation) if own else None for own in new]
    for owner, places in groupby(range(HASH_SLOTS), fields.__getitem__):
        slots = list(places)
        if owner is not None:
            ranges.append((slots[0], slots[-1], *owner))
    return json.dumps(ranges, separators=(",", ":"))


def _next_owner(held: Owner | None, claim: ClusterNode, known: Collection[str], registrations: int) -> Owner:
    if held is None:  # the number of registrations is at least as high as any earlier generation of the slots
        return Owner(claim.node, claim.server, claim.config_epoch, registrations + 1)
    lower = (claim.config_epoch, claim.node == held.node) <= (held.config_epoch, False)
    if lower and held.node in known:
        return held
    same = claim.server == held.server
    return Owner(claim.node, claim.server, claim.config_epoch, held.generation + (0 if same else 1))
